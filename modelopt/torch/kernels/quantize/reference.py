"""quantize by the law (`modelopt.numerics.reference`), in chunks that fit the cache."""

from __future__ import annotations

from torch import Tensor

from modelopt.numerics import Format
from modelopt.numerics import reference as law
from modelopt.torch.kernels import chunks


def quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> list[Tensor]:
    """Return [codes, *scales, (zero points)]. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    if x.numel() == 0:
        return law.quantize(x, fmt, amax, global_amax, amin).parts
    scales = chunks.find_scales(x, fmt, amax, global_amax, amin)
    codes = chunks.chunked_codes(x, fmt, scales)
    parts = [chunks.packed(codes.reshape(x.shape or (1,)), fmt.element.bits), *scales.stored]
    if scales.zero is not None:
        parts.append(scales.zero.to(fmt.element.dtype))
    return parts
