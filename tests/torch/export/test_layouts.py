"""Every writer and format: what is written is read back, in the tensors that the layout promises."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelopt.core.errors import CheckpointError, ExportError
from modelopt.numerics import Quantized, parse
from modelopt.torch.export import WRITERS, Checkpoint, Deferred, KVRecord, LayerRecord, differences, read
from modelopt.torch.export.passes import share_scales

N, K = 128, 256
NVFP4 = "e2m1[16]~*e4m3[...]*f32"

# (weight, input) -> the tensors below the layer. No input scale is listed: it follows from the input.
CT = {
    ("i8[1,...]*f32", "i8[...]*f32"): {"weight": ("I8", [N, K]), "weight_scale": ("F32", [N, 1]), "input_scale": ("F32", [1])},
    ("i8[1,...]*f32", "i8[-1]~*f32"): {"weight": ("I8", [N, K]), "weight_scale": ("F32", [N, 1])},
    ("i8[...]*f32", "i8[...]*f32"): {"weight": ("I8", [N, K]), "weight_scale": ("F32", [1]), "input_scale": ("F32", [1])},
    **{
        (f"i{b}[64]*f32", None): {
            "weight_packed": ("I32", [N, K * b // 32]),
            "weight_scale": ("BF16", [N, K // 64]),
            "weight_shape": ("I64", [2]),
        }
        for b in range(2, 9)
    },
    **{
        (f"u{b}[128]*f32+u{b}", None): {
            "weight_packed": ("I32", [N, K * b // 32]),
            "weight_scale": ("BF16", [N, K // 128]),
            "weight_shape": ("I64", [2]),
            "weight_zero_point": ("I32", [N * b // 32, K // 128]),
        }
        for b in range(2, 9)
    },
    ("i4[1,...]*f32", None): {"weight_packed": ("I32", [N, 32]), "weight_scale": ("BF16", [N, 1]), "weight_shape": ("I64", [2])},
    ("e4m3[...]*f32", "e4m3[...]*f32"): {
        "weight": ("F8_E4M3", [N, K]),
        "weight_scale": ("F32", [1]),
        "input_scale": ("F32", [1]),
    },
    ("e4m3[1,...]*f32", "e4m3[-1]~*f32"): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("F32", [N, 1])},
    ("e4m3[128,128]*f32", "e4m3[128]~*f32"): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("F32", [1, 2])},
    (NVFP4, NVFP4): {
        "weight_packed": ("U8", [N, K // 2]),
        "weight_scale": ("F8_E4M3", [N, K // 16]),
        "weight_global_scale": ("F32", [1]),
        "input_global_scale": ("F32", [1]),
    },
    ("e2m1[16]*e4m3:46[...]*f32", None): {
        "weight_packed": ("U8", [N, K // 2]),
        "weight_scale": ("F8_E4M3", [N, K // 16]),
        "weight_global_scale": ("F32", [1]),
    },
    ("e2m1[32]~*e8m0", "e2m1[32]~*e8m0"): {"weight_packed": ("U8", [N, K // 2]), "weight_scale": ("U8", [N, K // 32])},
    ("e4m3[32]~*e8m0:floor", "e4m3[32]~*e8m0"): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("U8", [N, K // 32])},
}
FP4 = {"weight": ("U8", [N, K // 2])}
HF = {
    ("e4m3[...]*f32", "e4m3[...]*f32"): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("F32", []), "input_scale": ("F32", [])},
    ("e4m3[1,...]*f32", "e4m3[-1]~*f32"): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("F32", [N])},
    ("e4m3[128,128]*f32", None): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("F32", [1, 1, 2, 1])},
    ("i8[1,...]*f32", "i8[...]*f32"): {"weight": ("I8", [N, K]), "weight_scale": ("F32", [N]), "input_scale": ("F32", [])},
    ("i8[1,...]*f32", None): {"weight": ("I8", [N, K]), "weight_scale": ("F32", [N])},
    ("i4[128]*f32", None): {"weight": ("U8", [N // 2, K]), "weight_scale": ("F32", [N, 2])},
    (NVFP4, NVFP4): {
        **FP4,
        "weight_scale": ("F8_E4M3", [N, K // 16]),
        "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
    (NVFP4, None): {**FP4, "weight_scale": ("F8_E4M3", [N, K // 16]), "weight_scale_2": ("F32", [])},
    ("e2m1[32]~*e4m3:fp8[...]*f32", "e4m3[...]*f32"): {
        **FP4,
        "weight_scale": ("F8_E4M3", [N, K // 32]),
        "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
    ("e4m3[32]~*e8m0", "e4m3[32]~*e8m0"): {"weight": ("F8_E4M3", [N, K]), "weight_scale": ("U8", [N, K // 32])},
    ("e2m1[32]~*e8m0", "e2m1[32]~*e8m0"): {**FP4, "weight_scale": ("U8", [N, K // 32])},
    ("e2m1[32]~*e8m0", "e4m3[...]*f32"): {**FP4, "weight_scale": ("U8", [N, K // 32]), "input_scale": ("F32", [])},
}
CASES = [(w, *pair, wanted) for w, table in (("compressed-tensors", CT), ("hf", HF)) for pair, wanted in table.items()]


def static(fmt: str | None) -> bool:
    return fmt is not None and parse(fmt).needs_calibration


def checkpoint(
    weight: str, inputs: str | None, seed: int = 0, dtype: torch.dtype = torch.bfloat16, n: int = N, k: int = K
) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in ("a.q_proj", "a.k_proj", "b.down_proj"):
        tensor = (torch.randn(n, k, generator=generator) * 0.02).to(dtype)
        fmt = parse(inputs) if inputs else None
        scale = torch.rand((), generator=generator) * 1e-3 if static(inputs) else None
        layers[name] = LayerRecord(name, Deferred(tensor, parse(weight)), parse(weight), fmt, scale)
    tensors = {"lm_head.weight": torch.randn(8, 4, generator=generator).to(dtype), "norm.bias": torch.zeros(3)}
    config = {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}
    groups = (("a.q_proj", "a.k_proj"),)
    return Checkpoint(layers, tensors, config, unquantized=("lm_head",), shared_inputs=groups, dtype=dtype)


def write(name: str, c: Checkpoint, directory) -> Checkpoint:
    writer = WRITERS.get(name)()
    writer.write(c, directory)
    return writer.prepared(c)


def described(path) -> dict[str, tuple[str, list[int]]]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {k: (v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"}


@pytest.mark.parametrize("name, weight, inputs, wanted", CASES)
def test_written_tensors_are_those_of_the_layout_and_read_back_equal(tmp_path, name, weight, inputs, wanted):
    c = checkpoint(weight, inputs)
    prepared = write(name, c, tmp_path)
    found = described(tmp_path / "model.safetensors")
    assert {k: v for k, v in found.items() if k.startswith("b.")} == {f"b.down_proj.{k}": v for k, v in wanted.items()}
    assert set(found) - {f"{r}.{k}" for r in c.layers for k in wanted} == {"lm_head.weight", "norm.bias"}
    # compressed-tensors keeps the reciprocal of a global scale, from which the scale comes back to one unit
    assert differences(prepared, read(tmp_path), ulps=1 if name == "compressed-tensors" else 0) == []


@pytest.mark.parametrize("name, weight, inputs", [("compressed-tensors", NVFP4, NVFP4), ("hf", "i4[128]*f32", None)])
def test_reading_back_sees_a_changed_code_scale_and_tensor(tmp_path, name, weight, inputs):
    c = checkpoint(weight, inputs)
    prepared = write(name, c, tmp_path)
    back = read(tmp_path)
    q = back.layers["b.down_proj"].quantized()
    codes = q.codes.clone()
    codes[3, 5] ^= 1
    changed = {
        "codes": replace(q, codes=codes),
        "scale level 1": replace(q, scales=(q.scales[0].flip(0), *q.scales[1:])),
    }
    for what, value in changed.items():
        layers = {**back.layers, "b.down_proj": replace(back.layers["b.down_proj"], weight=value)}
        assert [d for d in differences(prepared, back.replace(layers=layers), 1) if what in d]
    assert differences(prepared, back.replace(tensors={**back.tensors, "norm.bias": torch.ones(3)}), 1) == [
        "tensor norm.bias: values differ"
    ]


@pytest.mark.parametrize("name, scale", [("compressed-tensors", "k_scale"), ("hf", "k_proj.k_scale")])
def test_key_value_cache(tmp_path, name, scale):
    kv = KVRecord("a", parse("e4m3[...]*f32"), torch.tensor(0.25), torch.tensor(0.5))
    c = checkpoint("e4m3[...]*f32", "e4m3[...]*f32").replace(kv={"a": kv})
    prepared = write(name, c, tmp_path)
    assert f"a.{scale}" in described(tmp_path / "model.safetensors")
    assert differences(prepared, read(tmp_path)) == []
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (quantization["kv_cache_scheme"]["num_bits"], quantization["kv_cache_scheme"]["type"]) == (8, "float")


def test_hf_configuration_files(tmp_path):
    write("hf", checkpoint(NVFP4, NVFP4), tmp_path)
    data = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert data["producer"]["name"] == "modelopt"
    assert data["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    words = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert config["config_groups"] == {"group_0": {"input_activations": words, "weights": words, "targets": ["Linear"]}}
    assert (config["ignore"], config["quant_algo"], config["quant_method"]) == (["lm_head"], "NVFP4", "modelopt")


def test_int4_blocks_claim_no_pre_quant_scale_and_pack_rows_in_pairs(tmp_path):
    prepared = write("hf", checkpoint("i4[128]*f32", None), tmp_path)
    quantization = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["pre_quant_scale"], quantization["has_zero_point"]) == (
        "W4A16_AWQ",
        False,
        False,
    )
    stored = load_file(tmp_path / "model.safetensors")["b.down_proj.weight"].to(torch.int16)
    codes = prepared.layers["b.down_proj"].quantized().unpacked().to(torch.int16)
    assert torch.equal(stored % 16, codes[0::2]) and torch.equal(stored // 16, codes[1::2])


@pytest.mark.parametrize("name", ["compressed-tensors", "hf"])
def test_mixed_precision(tmp_path, name):
    one, two = checkpoint("e4m3[...]*f32", "e4m3[...]*f32"), checkpoint(NVFP4, NVFP4, seed=1)
    c = one.replace(layers={**one.layers, "b.down_proj": two.layers["b.down_proj"]})
    prepared = write(name, c, tmp_path)
    assert differences(prepared, read(tmp_path), ulps=1) == []
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    if name == "hf":
        assert quantization["quant_algo"] == "MIXED_PRECISION"
        assert quantization["quantized_layers"]["b.down_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    else:
        assert quantization["format"] == "mixed-precision"
        assert {g["format"] for g in quantization["config_groups"].values()} == {"float-quantized", "nvfp4-pack-quantized"}


@pytest.mark.parametrize(
    "name, weight, inputs, reason",
    [
        ("compressed-tensors", "e3m2[32]~*e8m0", None, "no layout for the weight format"),
        ("compressed-tensors", "i8[32]~*e8m0", "i8[32]~*e8m0", "no layout for the weight format"),
        ("compressed-tensors", "nf4[64]*f32", None, "codebook"),
        ("hf", "e3m2[32]~*e8m0", "e3m2[32]~*e8m0", "no algorithm"),
        ("hf", "u4[64]*f32+u4", None, "no algorithm"),
        ("hf", "i3[64]*f32", None, "no algorithm"),
        ("hf", "i4[96]*f32", None, "a block that does not divide the dimension"),
        ("compressed-tensors", "i4[96]*f32", None, "a block that does not divide the dimension"),
    ],
)
def test_why_not(tmp_path, name, weight, inputs, reason):
    c = checkpoint(weight, inputs)
    assert reason in WRITERS.get(name)().why_not(c)
    with pytest.raises(ExportError, match="a.q_proj"):
        WRITERS.get(name)().write(c, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_bad_input_scale_stops_the_export_by_name(tmp_path, bad):
    c = checkpoint("e4m3[...]*f32", "e4m3[...]*f32")
    record = replace(c.layers["b.down_proj"], input_scale=torch.tensor(bad))
    with pytest.raises(ExportError, match="b.down_proj.input_scale"):
        WRITERS.get("hf")().write(c.replace(layers={**c.layers, "b.down_proj": record}), tmp_path)


def test_a_bad_weight_scale_stops_the_export_by_name(tmp_path):
    c = checkpoint("e4m3[...]*f32", "e4m3[...]*f32")
    q: Quantized = c.layers["b.down_proj"].quantized()
    record = replace(c.layers["b.down_proj"], weight=replace(q, scales=(torch.tensor(float("nan")),)))
    with pytest.raises(ExportError, match="b.down_proj.weight_scale"):
        WRITERS.get("hf")().write(c.replace(layers={**c.layers, "b.down_proj": record}), tmp_path)


def test_fused_layers_share_scales_and_their_codes_follow():
    c = checkpoint(NVFP4, NVFP4)
    shared = share_scales(c)
    q, k, other = (shared.layers[n].quantized() for n in ("a.q_proj", "a.k_proj", "b.down_proj"))
    assert torch.equal(q.scales[1], k.scales[1]) and not torch.equal(q.scales[1], other.scales[1])
    assert torch.equal(shared.layers["a.q_proj"].input_scale, shared.layers["a.k_proj"].input_scale)
    before = {n: c.layers[n].quantized() for n in ("a.q_proj", "a.k_proj")}
    largest = max(b.scales[1] for b in before.values())
    assert torch.equal(q.scales[1], largest)
    for name, after in (("a.q_proj", q), ("a.k_proj", k)):
        weight = c.layers[name].weight.tensor.float()
        assert (after.dequantize(torch.float32) - weight).norm() < 0.12 * weight.norm()
    with pytest.raises(ExportError, match="fused by engines"):
        share_scales(c.map_layers(lambda r: replace(r, weight=r.quantized())))


def test_damaged_directories(tmp_path):
    write("hf", checkpoint("e4m3[...]*f32", "e4m3[...]*f32"), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 64):
        file.write_bytes(damage)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            read(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        read(tmp_path)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no safetensors file of the same directory"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="missing"):
        read(tmp_path)


def test_a_missing_scale_is_named(tmp_path):
    write("hf", checkpoint(NVFP4, NVFP4), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["b.down_proj.weight_scale_2"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="b.down_proj.weight_scale_2"):
        read(tmp_path)
