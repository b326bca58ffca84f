"""Ranges of weights, from the weights themselves: the largest magnitude, or the one with the least squared error.

    max   a_g = max |W_g|
    mse   a_g = argmin over m in {start, start + step, ..., stop} of sum (W_g - Q(W_g; m max|W_g|))^2
    sweep s_g = argmin over the 126 positive finite E4M3 codes c of sum (W_g - Q(W_g; scale c t))^2,  t: the tensor's scale

for every scale group g. The sweep looks only at codes that can win. With s0 = max|W_g| / element.max, rounded to a code, no
element errs by more than half the widest step of the element; so a scale so small that clipping the largest value alone
costs more cannot win, and one so large that everything rounds to zero costs sum W_g^2 whatever it is. The result is that of
all 126.

Work goes over the tensor in chunks (`kernels.chunks`): temporary memory is a few chunks and a few grids, not copies of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from modelopt.core.errors import CalibrationError, ConfigError
from modelopt.numerics import Element, Format, Scales, parse
from modelopt.numerics.blocks import to_blocks
from modelopt.numerics.reference import apply_scales, cast_scale, compute_scales
from modelopt.torch import kernels
from modelopt.torch.calibration import AbsMax
from modelopt.torch.kernels.chunks import block_range, plan, scaled_chunks
from modelopt.torch.quantization.calib.observers import Ranges, _Base

MULTIPLIERS_46 = (1.0, 1.5)


def max_ranges(weight: Tensor, fmt: Format, tensor_amax: Tensor | None = None) -> Ranges | None:
    """Return the ranges of `weight` by its largest magnitudes, or None where the format computes its own at each call.

    `tensor_amax` (scalar): for static two-level formats, the amax under the tensor-wide scale if not the weight's own.
    """
    if fmt.dynamic and not fmt.needs_global:
        return None
    weight = weight.detach()
    if fmt.zero is not None:
        low, high = block_range(weight, fmt)
        return Ranges(high, amin=low)
    if fmt.dynamic:
        return Ranges(kernels.amax(weight, "i8[...]*f32"))
    amax = kernels.amax(weight, fmt)
    if not fmt.needs_global:
        return Ranges(amax)
    if fmt.rule == "46":
        return mse_ranges(weight, fmt, MULTIPLIERS_46, tensor_amax=tensor_amax)
    if tensor_amax is None:
        tensor_amax = amax.amax() if amax.numel() else amax.new_zeros(())
    return Ranges(amax, tensor_amax)


SEARCHED = 1 << 21  # elements searched at a time: the candidates of a scale per 16 weights take several times the weights


def multipliers(start: float, stop: float, step: float) -> tuple[float, ...]:
    """Return start, start + step, ... up to and including stop. Raises ConfigError for values that make no list."""
    if not (0 < start <= stop < math.inf and step > 0) or (stop - start) / step > 10_000:
        raise ConfigError(f"Multipliers from {start} to {stop} in steps of {step} make no list: 0 < start <= stop, step > 0.")
    return tuple(start + i * step for i in range(int((stop - start) / step + 1e-6) + 1))


def mse_ranges(
    weight: Tensor, fmt: Format, factors: tuple[float, ...], fp8_sweep: bool = False, tensor_amax: Tensor | None = None
) -> Ranges | None:
    """Return the ranges with the least squared error; formats without static ranges are as in `max_ranges`.

    `tensor_amax` as there. `fp8_sweep` applies to static two-level formats with E4M3 block scales; others take `factors`.
    Ties go to the first.
    """
    if fmt.dynamic:
        return max_ranges(weight, fmt)
    weight = weight.detach()
    rows = _rows_at_once(weight, fmt)
    if weight.dim() and rows < len(weight):
        return _mse_by_rows(weight, rows, fmt, factors, fp8_sweep, tensor_amax)
    amin = None
    if fmt.zero is not None:
        amin, amax = block_range(weight, fmt)
    else:
        amax = kernels.amax(weight, fmt)
    if weight.numel() == 0 or not bool(torch.isfinite(amax).all()):
        return Ranges(amax, amax.amax() if fmt.needs_global and amax.numel() else None, amin)
    if not fmt.needs_global:
        tensor_amax = None
    elif tensor_amax is None:
        tensor_amax = amax.amax()
    if fp8_sweep and _sweepable(fmt):
        assert tensor_amax is not None
        candidates = _sweep(amax, tensor_amax, fmt)
    else:
        candidates = ((amax * f, None if amin is None else amin * f) for f in factors)
    best_amax, best_amin = amax, amin
    best = torch.full_like(amax, torch.inf)
    for high, low in candidates:
        error = block_errors(weight, fmt, compute_scales(high, fmt, tensor_amax, low))
        better = error < best
        best = torch.where(better, error, best)
        best_amax = torch.where(better, high, best_amax)
        if low is not None and best_amin is not None:
            best_amin = torch.where(better, low, best_amin)
    return Ranges(best_amax, tensor_amax, best_amin)


def _rows_at_once(weight: Tensor, fmt: Format) -> int:
    """Return how many rows to search together: whole blocks, about `SEARCHED` elements, or all rows where a block spans them."""
    if weight.dim() < 2 or weight.numel() <= SEARCHED:
        return weight.shape[0] if weight.dim() else 0
    unit = fmt.block.sizes(weight.shape)[0]
    if unit == weight.shape[0]:
        return unit
    return max(SEARCHED // (weight.numel() // weight.shape[0]) // unit, 1) * unit


def _mse_by_rows(
    weight: Tensor, rows: int, fmt: Format, factors: tuple[float, ...], fp8_sweep: bool, tensor_amax: Tensor | None
) -> Ranges:
    if fmt.needs_global and tensor_amax is None:
        tensor_amax = kernels.amax(weight, "i8[...]*f32")
    parts = [mse_ranges(part, fmt, factors, fp8_sweep, tensor_amax) for part in weight.split(rows)]
    found = [p for p in parts if p is not None]
    lows = [p.amin for p in found if p.amin is not None]
    whole = tensor_amax if fmt.needs_global else None
    return Ranges(torch.cat([p.amax for p in found]), whole, torch.cat(lows) if lows else None)


def block_errors(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Return sum (W - Q(W))^2 of each scale group, float32, in the grid's shape, reading `weight` chunk by chunk."""
    p = plan(weight, fmt)
    out = torch.zeros(p.grid, dtype=torch.float32, device=weight.device)
    for rows, grid, part, local in scaled_chunks(p, scales.effective, scales.zero):
        x = p.x[rows].float()
        squared = to_blocks(apply_scales(x, part, local).sub_(x).square_(), local.block.sizes(x.shape))
        out[grid] += squared.sum(dim=list(range(1, squared.dim(), 2))).reshape(out[grid].shape)
    return out.reshape(fmt.grid(weight.shape))


def _sweepable(fmt: Format) -> bool:
    return fmt.needs_global and isinstance(fmt.scale, Format) and fmt.scale.element.name == "e4m3"


def positive_codes(scale: Element) -> Tensor:
    """Return all positive finite values of a float scale type, ascending, float32."""
    values = scale.table()
    return values[torch.isfinite(values) & (values > 0)].sort().values


def _sweep(amax: Tensor, tensor_amax: Tensor, fmt: Format) -> Iterator[tuple[Tensor, None]]:
    """Yield, lowest first, the block amax that stand for the E4M3 codes around that of each block's own amax."""
    assert isinstance(fmt.scale, Format)
    scale = fmt.scale.element
    codes = positive_codes(scale).to(amax.device)
    outer = compute_scales(amax, fmt, tensor_amax).stored[1].float().reshape(())
    own = cast_scale(amax / fmt.element.max / outer, scale)
    index = torch.searchsorted(codes, own.contiguous())
    below, above = window(fmt)
    for shift in range(-below, above + 1):
        code = codes[(index + shift).clamp(0, codes.numel() - 1)]
        yield code * outer * fmt.element.max, None


def window(fmt: Format) -> tuple[int, int]:
    """Return how many E4M3 codes below and above a block's own can win (see the module): safe bounds for any block."""
    if fmt.element.kind != "float":
        return 126, 126
    values, top = positive_codes(fmt.element), fmt.element.max
    step = float(torch.diff(values, prepend=torch.zeros(1)).max())
    size = math.prod(b if isinstance(b, int) and b > 0 else 1 << 16 for b in fmt.block.dims)
    # Clipping costs (top s0 - top s)^2 >= size (step s0 / 2)^2 for every s up to (1 - sqrt(size) step / 2 top) s0.
    room = 1.0 - math.sqrt(size) * step / (2 * top)
    below = _codes_within(-math.log2(room)) if room > 0 else 126
    above = _codes_within(math.log2(2 * top / float(values[0])))  # beyond it top s0 < smallest s / 2: everything is zero
    return min(below, 126), min(above, 126)


def _codes_within(octaves: float) -> int:
    """Return at most how many E4M3 codes lie within a ratio of 2^octaves: 8 in an octave, denser towards its end; 2 to spare."""
    whole = math.floor(octaves)
    return 8 * whole + math.ceil(16 * (1 - 2.0 ** (whole - octaves))) + 2


class MseCalibrator(_Base):
    """Least squared error over multiples of the amax of one tensor (a weight), in the shape of a format's scales.

    Example:
        >>> c = MseCalibrator("i4[...]*f32"); c.update(torch.tensor([0.1, 0.2, 1.0])); bool(c.amax() > 0)
        True
    """

    def __init__(
        self,
        fmt: Format | str,
        start_multiplier: float = 0.25,
        stop_multiplier: float = 4.0,
        step_size: float = 0.1,
        fp8_scale_sweep: bool = False,
    ) -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        self.factors = multipliers(start_multiplier, stop_multiplier, step_size)
        self.sweep = fp8_scale_sweep
        self.reset()

    def reset(self) -> None:
        """Forget the tensor."""
        self.statistic = AbsMax(self.format.block)
        self.tensor: Tensor | None = None

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Take the tensor; a second one is an error, since the error of both cannot be had from one."""
        if self.tensor is not None:
            raise CalibrationError("MseCalibrator takes one tensor (a weight). For activations use HistogramCalibrator with mse.")
        self.tensor = x.detach()

    def ranges(self) -> Ranges:
        """Return the best ranges. Raises CalibrationError before a tensor came."""
        if self.tensor is None:
            self._seen()
        assert self.tensor is not None
        found = mse_ranges(self.tensor, self.format, self.factors, self.sweep)
        if found is None:
            raise CalibrationError(f"{self.format} computes its own ranges at each call; there is none to calibrate.")
        return found
