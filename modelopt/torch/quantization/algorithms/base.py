"""What every calibration algorithm is, and the work that they share.

A `Job` carries what a run is given: the data, the progress callback, and statistics gathered before. `observe` runs the data
once with an observer in every activation quantizer that waits for a range; meanwhile nothing is quantized, so this costs a
plain forward and one reduction for each distinct input tensor. No range is set before everything was seen and is finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelopt.core.config import Config
from modelopt.core.errors import CalibrationError
from modelopt.core.logging import Progress, null_progress
from modelopt.numerics import Format
from modelopt.torch import kernels
from modelopt.torch.calibration import ForwardLoop, Statistic, TokenMask, gather, run_forward
from modelopt.torch.quantization.calib.observers import (
    AffineObserver,
    MaxObserver,
    MinMaxObserver,
    Observer,
    Ranges,
    Watch,
    nonfinite,
)
from modelopt.torch.quantization.nn.modules.quant_module import QuantModule
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer, leaf_quantizers
from modelopt.torch.quantization.shared_scales import groups_of
from modelopt.torch.quantization.validate import check_finite, shorten

MakeObserver = Callable[[TensorQuantizer], Observer]
FindRanges = Callable[[Tensor, Format, Tensor | None], Ranges | None]


@dataclass
class Job:
    """One calibration: its data, who is told how far it is, and statistics (quantizer name -> statistic) to use and to fill."""

    forward_loop: ForwardLoop | None = None
    progress: Progress = null_progress
    statistics: dict[str, Statistic] = field(default_factory=dict)


class Algorithm:
    """Base class of calibration algorithms."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[Config]] = Config

    @classmethod
    def run(cls, model: nn.Module, config: Any, job: Job) -> None:
        """Find the ranges of the quantizers of `model` and set them."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightSite:
    """A weight and its quantizer; `name` is the weight's, `quantizer` may be a sequence."""

    name: str
    tensor: Tensor
    quantizer: nn.Module
    layer: str = ""


def weight_sites(model: nn.Module) -> Iterator[WeightSite]:
    """Yield every weight that has a quantizer and is held as a tensor, enabled or not."""
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            for t in module.quantized_tensors():
                if t.packed is None:
                    expert = "" if t.expert is None else f"[{t.expert}]"
                    yield WeightSite(f"{name}.{t.name}{expert}".lstrip("."), t.tensor, t.weight_quantizer, name)


def weight_quantizer_ids(model: nn.Module) -> set[int]:
    """Return the ids of all quantizers of weights, packed weights included."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantModule):
            for t in module.quantized_tensors():
                found |= {id(q) for q in leaf_quantizers(t.weight_quantizer)}
    return found


def waiting_activations(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Return the enabled activation quantizers, by name, whose format needs a range that only data can give."""
    weights = weight_quantizer_ids(model)
    return {
        name: q
        for name, q in model.named_modules()
        if isinstance(q, TensorQuantizer)
        and id(q) not in weights
        and q.enabled
        and q.format is not None
        and not q.has_constant_amax
        and (q.format.needs_calibration or bias_dims(q) is not None)
    }


def bias_dims(quantizer: TensorQuantizer) -> tuple[int, ...] | None:
    """Return the dimensions over which the quantizer's affine bias is averaged, or None where it has none."""
    return None if quantizer.config is None else quantizer.config.bias_dims


def make_max_observer(quantizer: TensorQuantizer) -> Observer:
    """Return the observer of largest magnitudes (or of minimum and maximum, or around a bias) for a quantizer's format."""
    fmt = quantizer.format
    assert fmt is not None
    dims = bias_dims(quantizer)
    if dims is not None:
        return AffineObserver(fmt, dims)
    return MaxObserver(fmt) if fmt.zero is None else MinMaxObserver(fmt)


def observe(model: nn.Module, job: Job, make: MakeObserver = make_max_observer) -> None:
    """Find the ranges of all waiting activation quantizers, from statistics at hand or from one run over the data.

    Raises CalibrationError, before anything is set: no data, a quantizer that the data never reached, values that are not finite.
    """
    waiting = waiting_activations(model)
    observers = {name: make(q) for name, q in waiting.items()}
    missing = [name for name in waiting if not _known(observers[name], job.statistics.get(name))]
    if missing:
        _run(model, {name: (waiting[name], observers[name]) for name in missing}, job)
    for name in waiting:
        if name not in missing:
            observers[name].statistic = job.statistics[name]
    ranges = {name: observer.ranges() for name, observer in observers.items()}
    bad = [name for name, found in ranges.items() if nonfinite(found)]
    if bad:
        raise CalibrationError(
            f"Activations that are not finite (NaN or infinity) reached {len(bad)} quantizers: {shorten(bad)}. "
            "Check that the model computes finite values on this data, in this dtype."
        )
    job.statistics.update({name: observer.statistic for name, observer in observers.items()})
    for name, found in ranges.items():
        set_ranges(waiting[name], found)


def _known(observer: Observer, statistic: Statistic | None) -> bool:
    """Whether a statistic gathered before answers this observer."""
    own = observer.statistic
    return statistic is not None and not statistic.empty and (own.kind, own.settings()) == (statistic.kind, statistic.settings())


def _run(model: nn.Module, targets: dict[str, tuple[TensorQuantizer, Observer]], job: Job) -> None:
    if job.forward_loop is None:
        raise CalibrationError(
            f"{len(targets)} activation quantizers need data to find their range, and no forward_loop was given: "
            f"{shorten(list(targets))}. Pass forward_loop (a function that runs the model on data, or an iterable of batches), "
            "or choose dynamic activations."
        )
    shared: dict[Any, Any] = {}

    def attach(tokens: TokenMask) -> None:
        for name, (quantizer, observer) in targets.items():
            inside_attention = any(word in name.rsplit(".", 1)[-1] for word in ("bmm", "softmax"))
            quantizer.observer = Watch(observer, tokens, inside_attention, shared)

    watched = {id(quantizer) for quantizer, _ in targets.values()}
    others = [q for q in model.modules() if isinstance(q, TensorQuantizer) and q.enabled and id(q) not in watched]
    try:
        for quantizer in others:  # ranges are those of the model as it is, and quantizing would only cost time
            quantizer.enabled = False
        count = run_forward(model, job.forward_loop, job.progress, attach)
    finally:
        for quantizer in others:
            quantizer.enabled = True
        for quantizer, _ in targets.values():
            quantizer.observer = None
    gather({name: observer.statistic for name, (_, observer) in targets.items()})
    unreached = [name for name, (_, observer) in targets.items() if observer.statistic.empty]
    if unreached:
        raise CalibrationError(
            f"The forward_loop ran the model {count} times and never reached {len(unreached)} of {len(targets)} quantizers: "
            f"{shorten(unreached)}. Give data that uses these layers, or disable their quantizers."
        )


def set_ranges(quantizer: TensorQuantizer, ranges: Ranges) -> None:
    """Write the ranges into a quantizer."""
    quantizer.amax = ranges.amax
    quantizer.global_amax = ranges.global_amax
    quantizer.amin = ranges.amin
    quantizer.bias_value = ranges.bias


def enabled_sites(model: nn.Module) -> list[WeightSite]:
    """Return the weights that some enabled quantizer quantizes."""
    return [s for s in weight_sites(model) if any(q.enabled for q in leaf_quantizers(s.quantizer))]


def check_weights(model: nn.Module) -> None:
    """Raise CalibrationError, naming the tensor and the first index, if a weight to be quantized is not finite."""
    for site in enabled_sites(model):
        check_finite(site.name, site.tensor)


def calibrate_weights(model: nn.Module, find: FindRanges, job: Job) -> None:
    """Set the ranges of all enabled weight quantizers from the weights, by `find(weight, format, tensor_amax)`.

    `tensor_amax` is that of the group of layers that share a second-level scale, or None. A sequence of quantizers is calibrated
    link by link, each on what the one before it returns.
    """
    sites = enabled_sites(model)
    with torch.no_grad():
        shared = _shared_amax(sites)
        for i, site in enumerate(sites):
            _calibrate_site(site, find, shared.get(site.name))
            job.progress(i + 1, len(sites), "scaling weights")


def _shared_amax(sites: list[WeightSite]) -> dict[str, Tensor]:
    """Return, by weight name, the amax of its group of fused layers, where static formats have a tensor-wide scale."""
    by_layer: dict[str, list[WeightSite]] = {}
    for site in sites:
        by_layer.setdefault(site.layer, []).append(site)
    found: dict[str, Tensor] = {}
    for group in groups_of(by_layer):
        members = [by_layer[layer][0] for layer in group if len(by_layer[layer]) == 1]
        formats = {q.format for m in members for q in leaf_quantizers(m.quantizer)}
        fmt = formats.pop() if len(formats) == 1 and len(members) == len(group) else None
        if fmt is not None and fmt.needs_global and not fmt.dynamic and members[0].tensor.device.type != "meta":
            amax = torch.stack(
                [kernels.amax(m.tensor.detach(), "i8[...]*f32").to(members[0].tensor.device) for m in members]
            ).amax()
            found.update({m.name: amax for m in members})
    return found


def _calibrate_site(site: WeightSite, find: FindRanges, shared: Tensor | None) -> None:
    if site.tensor.device.type == "meta":
        return
    links = [q for q in leaf_quantizers(site.quantizer) if q.enabled]
    x = site.tensor.detach()
    for i, quantizer in enumerate(links):
        if quantizer.format is not None and not quantizer.has_constant_amax:
            ranges = find(x, quantizer.format, None if shared is None else shared.to(x.device))
            if ranges is not None:
                set_ranges(quantizer, ranges)
        if i + 1 < len(links):
            x = quantizer(x)
