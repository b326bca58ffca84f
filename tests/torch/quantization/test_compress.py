"""Packed weights: less memory, the same outputs, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import CheckpointError, ConfigError, ModeError
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.opt import modelopt_state, restore, restore_from_modelopt_state, save
from modelopt.torch.quantization.backends import GEMMRegistry, find_kernel, register_kernel
from modelopt.torch.quantization.backends.gemm_registry import unregister_kernel


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 512, bias=False)
        self.down = nn.Linear(512, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def weight_only(**cfg) -> dict:
    return {"quant_cfg": {"*weight_quantizer": cfg}, "algorithm": "max"}


# format -> bits per weight, scales included
FORMATS = {
    "i8[1,...]*f32": 8.25,
    "e4m3[...]*f32": 8.1,
    "i4[64]*f32": 4.6,
    "i4[64]*bf16": 4.3,
    "u4[64]*f16+u4": 4.5,
    "i3[64]*f16": 3.3,
    "e2m1[16]~*e4m3[...]*f32": 4.6,
    "e2m1[32]~*e8m0": 4.3,
    "e4m3[32]~*e8m0": 8.3,
    "e3m2[32]~*e8m0": 6.3,
    "i8[32]~*e8m0": 8.3,
    "nf4[64]*i8[256]*f32": 4.3,
    "e4m3[128,128]*f32": 8.1,
}


def nbytes(model: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_memory_falls_and_outputs_stay(fmt: str, dtype: torch.dtype, tmp_path) -> None:
    torch.manual_seed(0)
    model = mtq.quantize(Net().to(dtype).eval(), weight_only(format=fmt))
    x = torch.randn(3, 256).to(dtype)
    with torch.no_grad():
        expected, values = model(x), model.up.quantized()
        full = nbytes(model)
        assert mtq.compress(model) is model
        assert torch.equal(model(x), expected)
        assert torch.equal(model.up.weight, values) and model.up.weight.dtype == dtype
    count = 2 * 256 * 512
    ranges = sum(b.nbytes for n, b in model.named_buffers() if "quantizer" in n)
    assert full >= count * dtype.itemsize and nbytes(model) - ranges <= count * FORMATS[fmt] / 8 + 64
    assert "up.weight" not in model.state_dict()
    save(model, tmp_path / "out")
    again = restore(Net().to(dtype).eval(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(x), expected) and nbytes(again) == nbytes(model)
    assert [s["mode"] for s in modelopt_state(again)["steps"]] == ["quantize", "compress"]


def test_patterns_choose() -> None:
    model = mtq.quantize(Net(), weight_only(num_bits=8))
    mtq.compress(model, {"compress": {"default": True, "*down*": False}})
    assert "up.weight" not in model.state_dict() and "down.weight" in model.state_dict()
    mtq.compress(model)
    assert "down.weight" not in model.state_dict()
    with pytest.raises(ModeError, match="no weight to pack"):
        mtq.compress(model)
    with pytest.raises(ConfigError, match='Did you mean "compress"'):
        mtq.compress(model, {"compres": {}})
    with pytest.raises(ModeError, match="Quantize first"):
        mtq.compress(Net())


def test_what_was_packed_in_two_steps_is_restored(tmp_path) -> None:
    model = mtq.quantize(Net().eval(), weight_only(num_bits=8))
    mtq.compress(model, {"compress": {"default": False, "up": True}})
    mtq.compress(model.to(torch.bfloat16))
    save(model, tmp_path / "out")
    again = restore(Net().to(torch.bfloat16).eval(), tmp_path / "out")
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and nbytes(again) == nbytes(model)


def test_a_refusal_packs_nothing() -> None:
    model = mtq.quantize(Net(), weight_only(num_bits=8))
    model.down.weight_quantizer.pre_quant_scale = torch.ones(512)
    with pytest.raises(ModeError, match="down.weight is rotated, shifted or scaled"):
        mtq.compress(model)
    assert {"up.weight", "down.weight"} <= model.state_dict().keys()


def test_sequences_pack_their_last_link() -> None:
    cfg = [{"num_bits": 4, "block_sizes": {-1: 64}}, {"num_bits": (4, 3)}]
    model = mtq.quantize(Net().eval(), {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": cfg}]})
    x = torch.randn(2, 256)
    with torch.no_grad():
        expected = model(x)
        mtq.compress(model)
        assert torch.equal(model(x), expected)
    assert model.up.weight_packed.format == "e4m3[...]*f32"


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(8, 16, 3), lambda: nn.ConvTranspose1d(8, 16, 3), lambda: nn.Embedding(32, 16)]
)
def test_other_modules(make) -> None:
    model = nn.Sequential(make()).eval()
    name = type(model[0]).__name__
    rules = [{"quantizer_name": "*weight_quantizer", "parent_class": f"nn.{name}", "cfg": {"num_bits": 8, "axis": 0}}]
    mtq.quantize(model, {"quant_cfg": rules})
    x = torch.tensor([1, 5]) if name == "Embedding" else torch.randn(2, 8, *([7] * (model[0].weight.dim() - 2)))
    with torch.no_grad():
        expected = model(x)
        mtq.compress(model)
        assert torch.equal(model(x), expected) and "0.weight" not in model.state_dict()


def test_moves_and_casts() -> None:
    model = mtq.compress(mtq.quantize(Net().eval(), weight_only(format="nvfp4")))
    parts = [p.clone() for p in model.up.weight_packed.parts]
    model.to(torch.bfloat16)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parts, model.up.weight_packed.parts, strict=True))
    assert model(torch.randn(2, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16
    twin = copy.deepcopy(model)
    assert torch.equal(twin.up.weight, model.up.weight)


def test_state_of_other_shapes_is_refused() -> None:
    state = modelopt_state(mtq.compress(mtq.quantize(Net(), weight_only(num_bits=8))))
    other = Net()
    other.up = nn.Linear(256, 128, bias=False)
    with pytest.raises(CheckpointError, match="up should have a weight"):
        restore_from_modelopt_state(other, state)


def test_weights_that_cannot_be_packed_are_named() -> None:
    model = nn.ModuleList([nn.LSTM(8, 8), nn.Linear(8, 8)])
    mtq.quantize(model, weight_only(num_bits=8))
    with pytest.warns(ModelOptWarning, match=r"2 weights stay fake-quantized.*0.weight_ih_l0 \(QuantLSTM\)"):
        mtq.compress(model)
    assert "1.weight" not in model.state_dict() and "0.weight_ih_l0" in model.state_dict()


def test_compressed_coverage() -> None:
    model = mtq.compress(mtq.quantize(Net(), weight_only(num_bits=8)))
    assert mtq.coverage(model).share == 1.0


def test_registered_kernel_multiplies_the_codes() -> None:
    model = mtq.compress(mtq.quantize(Net().eval(), weight_only(num_bits=8, axis=0)))
    calls = []

    def kernel(input: torch.Tensor, module: nn.Module) -> torch.Tensor:
        calls.append(module.weight_packed.format)
        return torch.zeros(*input.shape[:-1], module.out_features)

    register_kernel(("float32", "i8[1,...]*f32", "float32"), kernel)
    try:
        assert find_kernel("float32", "i8[1,...]*f32", "float32") is kernel and find_kernel("bfloat16", "i8", "float32") is None
        assert not model(torch.randn(1, 256)).any() and calls == ["i8[1,...]*f32"] * 2
    finally:
        unregister_kernel(kernel)
    assert model(torch.randn(1, 256)).any()
    with pytest.raises(ConfigError, match="three wildcards"):
        GEMMRegistry().register_kernel("i8", kernel)
