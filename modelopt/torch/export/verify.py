"""Verification of an export by a consumer that is not ours: transformers with compressed-tensors.

The directory is loaded afresh, run on token ids, and its logits are compared with those of the fake-quantized model:

    weights   both without activation quantizers: what is in the files against what the model computes with
    full      both with them

Everything runs in float32, so that what is seen is the checkpoint and not the order of bf16 sums; weights are rounded to the
model's dtype first, as they are wherever it runs. What may differ is the last bit, and the rounding of the scales that
pack-quantized keeps in bf16. Where `full` differs although `weights` agrees, each layer is compared by itself (`layerwise`),
since quantizers amplify the last bit of their inputs. Dynamic INT8 and MXFP4 inputs are scaled by compressed-tensors in its own
way (amax / 127.5, and another rounding of the power of two) and inputs of fused experts not at all: there only `weights` has to
agree. The hf layout is converted into compressed-tensors terms first: codes and block scales stay, global scales are inverted.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ExportError
from modelopt.core.plugins import require
from modelopt.torch.export import huggingface
from modelopt.torch.export.checkpoint import Checkpoint, differences
from modelopt.torch.export.files import write_json
from modelopt.torch.export.layerwise import largest_layer_difference, model_inputs
from modelopt.torch.export.readers import compressed_tensors as ct_reader
from modelopt.torch.export.readers.files import Tensors, read_json
from modelopt.torch.export.readers.model import layer_targets, load, read
from modelopt.torch.export.schemes import Scheme, input_scheme
from modelopt.torch.export.writers.compressed_tensors import CompressedTensorsWriter, quantization_config

LAYER_TOLERANCE = 0.005  # of the norm of a layer's output: some inputs fall to the other side of a rounding boundary
ULPS = 1  # of a global scale, which one layout stores as the reciprocal of the other's


@dataclass(frozen=True)
class VerifyResult:
    """What the consumer computed against what was wanted. Differences are the largest of |logits - logits|."""

    ok: bool
    layout: str
    reason: str
    weights_difference: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    largest_logit: float | None = None
    num_tokens: int = 0
    inputs_comparable: bool = True
    conversion: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{'verified' if self.ok else 'FAILED'}: {self.layout}: {self.reason}"
        if self.difference is None:
            return head
        numbers = f"{self.difference:.3g}, weights alone {self.weights_difference:.3g}, of {self.largest_logit:.3g}"
        return f"{head} (largest difference {numbers})"


def verify(directory: str | Path, model: nn.Module | None = None, input_ids: Tensor | None = None) -> VerifyResult:
    """Load an exported directory in transformers + compressed-tensors and compare its logits.

    Args:
        directory: what `export` wrote, in either layout.
        model: the fake-quantized model that was exported; None compares with our own reader's model of the directory.
        input_ids: token ids [batch, tokens]; None takes 2 x 32 ids spread over the vocabulary.

    Raises CheckpointError for files that cannot be read, MissingDependencyError without transformers and compressed-tensors.

    >>> verify("out", model).ok    # doctest: +SKIP
    True
    """
    require("transformers", "hf", "to verify an export")
    require("compressed_tensors", "hf", "to verify an export")
    directory = Path(directory)
    checkpoint = read(directory)
    if not checkpoint.config.get("architectures"):
        return VerifyResult(False, "unknown", "config.json names no transformers architecture; only the files could be read")
    layout = "compressed-tensors" if _is_compressed_tensors(directory) else "hf"
    if layout == "compressed-tensors":
        return _compare(directory, checkpoint, checkpoint, model, input_ids, layout, ())
    writer = CompressedTensorsWriter()
    reason = writer.why_not(checkpoint)
    if reason is not None:
        return _against_reader(
            directory, model, input_ids, f"no counterpart in compressed-tensors ({reason}); read by our reader"
        )
    with tempfile.TemporaryDirectory() as folder:
        writer.write(checkpoint, Path(folder))
        other = ct_reader.read(folder)
        found = tuple(differences(checkpoint, _named_alike(other, checkpoint), ULPS))
        result = _compare(Path(folder), checkpoint, other, model, input_ids, layout, found)
        del other
    return result


def _is_compressed_tensors(directory: Path) -> bool:
    quantization = read_json(directory / "config.json").get("quantization_config") or {}
    return quantization.get("quant_method") == "compressed-tensors"


def _named_alike(one: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return `one` with the shapes and types in which the two layouts hold the same scales differently made the same."""
    layers = {}
    for name, record in one.layers.items():
        twin = other.layers.get(name)
        q, p = record.quantized(), None if twin is None else twin.quantized()
        if q is not None and p is not None and q.scales[0].dtype in (torch.bfloat16, torch.float16):
            # pack-quantized rounds its scales to the model's dtype, on purpose: compare after the same rounding
            rounded = CompressedTensorsWriter().prepare(twin, p)
            same = torch.equal(rounded.scales[0], q.scales[0])
            scales = p.scales if same else q.scales
            q = type(q)(q.codes, scales, p.format if same else q.format, q.shape, q.dtype, q.zero)
            record = type(record)(**{**record.__dict__, "weight": q, "weight_format": q.format})
        layers[name] = record
    return one.replace(layers=layers)


def _compare(
    directory: Path,
    checkpoint: Checkpoint,
    written: Checkpoint,
    model: nn.Module | None,
    ids: Tensor | None,
    layout: str,
    conversion: tuple[str, ...],
) -> VerifyResult:
    """Compare the consumer of `directory`, whose content is `written`, with the model that `checkpoint` was made from."""
    wanted = load(directory, mode="fake") if model is None else model
    asymmetric = any(r.weight_format is not None and not r.weight_format.symmetric for r in checkpoint.records())
    if _fused_two_level(wanted, checkpoint):
        reason = _layer_by_layer(directory, checkpoint)
        return _against_reader(directory, model, ids, reason, layout)
    consumer, rounding = _consumer(directory, checkpoint, asymmetric)
    ids = _default_ids(checkpoint) if ids is None else ids
    comparable = all(_comparable(r.input_format) for r in checkpoint.records()) and not asymmetric
    # transformers fuses experts into one tensor while it loads, and their inputs are then not quantized
    comparable &= all(r.input_format is None or r.name in rounding for r in checkpoint.records())
    reference = _in_float32(wanted, rounding)
    plain = _logits(consumer, ids, inputs=False), _logits(reference, ids, inputs=False)
    full = plain if asymmetric else (_logits(consumer, ids, inputs=True), _logits(reference, ids, inputs=True))
    largest = float(full[1].abs().max())
    weights, whole = float((plain[0] - plain[1]).abs().max()), float((full[0] - full[1]).abs().max())
    tolerance = _tolerance(written, model) * max(largest, 1e-6)
    close = whole <= _full_tolerance(tolerance, checkpoint) or not comparable
    ok = weights <= tolerance and close and not conversion
    reason = "logits agree" if ok else conversion[0] if conversion else "logits differ by more than rounding"
    if not ok and not conversion and (weights <= tolerance or _weights_agree(reference, consumer, rounding)):
        worst, name = largest_layer_difference(reference, consumer, ids) if comparable else (0.0, "inputs are not comparable")
        ok = worst <= LAYER_TOLERANCE and _same_cache_scales(checkpoint, consumer)
        numbers = f"the largest difference of a layer by itself is {worst:.2g} of its output ({name})"
        amplified = "every weight agrees to its last bit, and every layer; the layers after it amplify that bit"
        reason = f"{amplified if ok else reason}; {numbers}"
    return VerifyResult(ok, layout, reason, weights, whole, tolerance, largest, ids.numel(), comparable, conversion)


def _weights_agree(one: nn.Module, other: nn.Module, rounding: dict[str, torch.dtype]) -> bool:
    """Return whether all weights are equal up to one step of the dtype that they were rounded to.

    The consumer divides by the global scale, which we multiply by: a product in the middle between two steps goes either way.
    """
    for name, dtype in rounding.items():
        a, b = one.get_submodule(name).weight, other.get_submodule(name).weight
        if bool(((a - b).abs() > torch.finfo(dtype).eps * a.abs()).any()):
            return False
    return True


def _same_cache_scales(checkpoint: Checkpoint, consumer: nn.Module) -> bool:
    """Return whether the consumer quantizes keys and values with the scales of the checkpoint."""
    for kv in checkpoint.kv.values():
        for key, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
            theirs = getattr(consumer.get_submodule(kv.name), key, None)
            if scale is None or theirs is None or not torch.equal(theirs.detach().float().reshape(()), scale.float().reshape(())):
                return False
    return True


def _fused_two_level(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Return whether experts that transformers fuses have two-level scales: it drops the second level while it fuses them."""
    experts = {name for name, (_, weight) in layer_targets(copy_structure(model)).items() if weight.expert is not None}
    return any(r.name in experts and r.weight_format is not None and r.weight_format.needs_global for r in checkpoint.records())


def copy_structure(model: nn.Module) -> nn.Module:
    """Return the model if it has quantizers, else a weightless copy that has."""
    from modelopt.torch.quantization.conversion import replace_quant_module
    from modelopt.torch.quantization.nn.modules import QuantModule

    if any(isinstance(m, QuantModule) for m in model.modules()):
        return model
    return replace_quant_module(copy.deepcopy(model).to("meta"))


def _layer_by_layer(directory: Path, checkpoint: Checkpoint) -> str:
    """Let compressed-tensors decompress every layer by itself; raise ExportError where it sees other values than our reader."""
    compressors = require("compressed_tensors.compressors", "hf")
    quantization = require("compressed_tensors.quantization", "hf")
    config = quantization_config(checkpoint)
    groups = [quantization.QuantizationScheme.model_validate(g) for g in config["config_groups"].values()]
    tensors = Tensors(directory)
    for record in checkpoint.records():
        scheme = next((g for g in groups if record.name in g.targets), groups[0])
        local = {k.removeprefix(f"{record.name}."): tensors[k] for k in tensors if k.rpartition(".")[0] == record.name}
        compressor = compressors.BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        theirs = compressor.decompress(local, scheme)["weight"]
        q = record.quantized()
        if q is None or not torch.equal(theirs.float(), q.dequantize(theirs.dtype).float()):
            raise ExportError(f"compressed-tensors sees other values in {record.name} than our reader.")
    return (
        "transformers cannot load fused experts with two-level scales; compressed-tensors decompresses each layer to equal values"
    )


def _tolerance(checkpoint: Checkpoint, model: nn.Module | None) -> float:
    """Return the difference to allow, relative to the largest logit: float32 sums, or scales that the layout keeps in fewer bits.

    Where `model` itself has its scales in 16 bits, or the directory is compared with its own reading, nothing was rounded.
    """
    steps = {"bf16": 2.0**-7, "f16": 2.0**-10}
    stored = {str(r.weight_format.stored_scale) for r in checkpoint.records() if r.weight_format}
    rounded = stored & set(steps) if model is not None and "f32" in _scale_types(model) else set()
    return max((steps[name] for name in rounded), default=2.0**-15)


def _scale_types(model: nn.Module) -> set[str]:
    """Return the types in which the enabled weight quantizers of a model keep their scales."""
    from modelopt.torch.quantization.nn.modules import QuantModule, leaf_quantizers

    weights = [qt for m in model.modules() if isinstance(m, QuantModule) for qt in m.quantized_tensors()]
    quantizers = [q for qt in weights for q in leaf_quantizers(qt.weight_quantizer) if qt.packed is not None or q.is_enabled]
    return {str(q.format.stored_scale) for q in quantizers if q.format is not None}


def _full_tolerance(tolerance: float, checkpoint: Checkpoint) -> float:
    """Inputs near a rounding boundary may fall to either side once weights differ in their last bit: allow a few such steps."""
    quantized = any(r.input_format is not None for r in checkpoint.records()) or bool(checkpoint.kv)
    return tolerance * 8 if quantized else tolerance


def _comparable(fmt: Any) -> bool:
    scheme = input_scheme(fmt) if fmt is not None else None
    if not isinstance(scheme, Scheme):
        return fmt is None
    return not (scheme.scale == "e8m0" or (scheme.kind == "int" and scheme.dynamic))


def _default_ids(checkpoint: Checkpoint) -> Tensor:
    vocabulary = int(checkpoint.config.get("vocab_size") or 0)
    if vocabulary <= 0:
        raise ExportError("config.json has no vocab_size; pass input_ids to verify.")
    return (torch.arange(64) * 7919 % vocabulary).reshape(2, 32)


def _consumer(directory: Path, checkpoint: Checkpoint, dequantize: bool) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """Return the model as transformers loads it, decompressed, in float32, and the dtype that each weight was rounded to.

    Weights are rounded to the checkpoint's dtype, as they are in a model of that dtype; FP4 weights always come out in bfloat16.
    """
    transformers = require("transformers", "hf")
    cls = huggingface.model_class(checkpoint.config)
    kwargs: dict[str, Any] = {}
    if dequantize:  # transformers cannot load packed zero points otherwise
        kwargs["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars of others
        warnings.simplefilter("ignore")
        model, info = cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **kwargs)
        if hasattr(model, "ct_decompress_hook"):
            model.hf_quantizer.compressor.decompress_model(model)
    missing = [k for k in info["missing_keys"] if not k.endswith(("zero_point",))]
    if missing or info["mismatched_keys"]:
        raise ExportError(f"transformers did not find {sorted(missing)[:3]} or found other shapes {info['mismatched_keys']}.")
    rounding = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.is_floating_point():
            rounding[name] = weight.dtype if weight.dtype != torch.float32 else checkpoint.dtype
            weight.data = weight.data.to(rounding[name]).float()
    return model.eval(), rounding


def _in_float32(model: nn.Module, rounding: dict[str, torch.dtype]) -> nn.Module:
    """Return a copy that computes in float32, its quantized weights rounded as `rounding` says."""
    from modelopt.torch.quantization.nn.modules import QuantModule

    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, QuantModule):
                _fold(module, rounding.get(name))
    return twin.float()


def _fold(module: Any, dtype: torch.dtype | None) -> None:
    for qt in list(module.quantized_tensors()):
        if qt.packed is not None:
            holder = module._modules.pop(f"{qt.name}_packed", None)
            if holder is not None:  # one for all experts of a parameter
                module.register_parameter(qt.name, nn.Parameter(_rounded(holder.stored(), dtype), requires_grad=False))
        else:  # our reader's models hold dequantized values and no weight quantizers
            value = _rounded(qt.weight_quantizer(qt.tensor) if qt.weight_quantizer.is_enabled else qt.tensor, dtype)
            if qt.expert is None:  # a parameter of its own: an embedding that it was tied to stays as it is
                module._parameters[qt.name] = nn.Parameter(value, requires_grad=False)
            else:
                qt.tensor.copy_(value)
            qt.weight_quantizer.disable()


def _rounded(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value if dtype is None else value.to(dtype).to(value.dtype)


def _logits(model: nn.Module, ids: Tensor, inputs: bool) -> Tensor:
    """Return the logits [batch, tokens, vocabulary] with activation quantizers on or off, whosever they are."""
    undo: list[Callable[[], None]] = []
    if not inputs:
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False
                undo.append(lambda m=module: setattr(m, "quantization_enabled", True))
            elif type(module).__name__ == "TensorQuantizer" and module.is_enabled:
                module.disable()
                undo.append(module.enable)
    try:
        with torch.no_grad():
            return model(**model_inputs(model, ids)).logits.float()
    finally:
        for one in undo:
            one()


def _against_reader(
    directory: Path, model: nn.Module | None, ids: Tensor | None, reason: str, layout: str = "hf"
) -> VerifyResult:
    """Compare our reader's model of the directory with the exported one, where no foreign consumer exists."""
    if model is None:
        return VerifyResult(True, layout, reason)
    checkpoint = read(directory)
    ids = _default_ids(checkpoint) if ids is None else ids
    ours, wanted = _in_float32(load(directory, mode="fake"), {}), _in_float32(model, {})
    weights = float((_logits(ours, ids, False) - _logits(wanted, ids, False)).abs().max())
    a, b = _logits(ours, ids, True), _logits(wanted, ids, True)
    whole, largest = float((a - b).abs().max()), float(b.abs().max())
    tolerance = _tolerance(checkpoint, model) * max(largest, 1e-6)
    ok = weights <= tolerance and whole <= _full_tolerance(tolerance, checkpoint)
    return VerifyResult(ok, layout, reason, weights, whole, tolerance, largest, ids.numel())


def write_result(result: VerifyResult, path: Path) -> None:
    """Write a result as JSON."""
    write_json(path, {**result.__dict__, "conversion": list(result.conversion)})
