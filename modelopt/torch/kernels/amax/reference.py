"""amax by the law (`modelopt.numerics.reference`), in chunks that fit the cache."""

from __future__ import annotations

from torch import Tensor

from modelopt.numerics import Format
from modelopt.numerics import reference as law
from modelopt.torch.kernels import chunks


def amax(x: Tensor, fmt: Format) -> Tensor:
    """Return max |x| of each block, float32, in the shape `fmt.grid(x.shape)`. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    if x.numel() == 0:
        return law.block_amax(x, fmt)
    return chunks.chunked_amax(chunks.plan(x, fmt)).reshape(fmt.grid(x.shape))
