"""What the checkpoint layouts need to know of a format: its number kind, how scales are laid over a weight, when they are known.

A layout has no algebra. It knows integers and floats of some bits, and the strategies `tensor` (one scale), `channel` (one
per output row), `token` (one per input row, dynamic), `group` (g neighbours of a row) and `block` (a tile of rows and columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelopt.numerics.formats import Format


@dataclass(frozen=True)
class Scheme:
    """A format in the words of the layouts. `size` is (g,) for groups and (rows, columns) for blocks."""

    kind: str  # int | float
    element: str  # i8, e4m3, ...
    bits: int
    strategy: str  # tensor | channel | token | group | block
    size: tuple[int, ...]
    scale: str  # f32 f16 bf16 e8m0 e4m3, or "two-level"
    symmetric: bool
    dynamic: bool

    @property
    def key(self) -> str:
        """Element and scale family in one word: `e4m3`, `i8`, `u4`, `mx:e2m1`, `nv:e2m1`."""
        prefix = {"e8m0": "mx:", "two-level": "nv:"}.get(self.scale, "")
        return prefix + self.element


def weight_scheme(fmt: Format) -> Scheme | str:
    """Return the scheme of a weight format, or the reason why no layout has words for it."""
    dims = [d for d in fmt.block.dims if d != "..."]
    if fmt.block.whole:
        strategy, size = "tensor", ()
    elif fmt.block.dims in ((1, "..."), (1, -1), (-1,)):
        strategy, size = "channel", ()
    elif len(dims) == len(fmt.block.dims) and dims[-1] > 0 and all(d == 1 for d in dims[:-1]):
        strategy, size = "group", (int(dims[-1]),)
    elif len(dims) == len(fmt.block.dims) == 2 and min(dims) > 0:
        strategy, size = "block", (int(dims[0]), int(dims[1]))
    else:
        return f"scales over {fmt.block} have no name in a checkpoint"
    return _scheme(fmt, strategy, size)


def input_scheme(fmt: Format) -> Scheme | str:
    """Return the scheme of an input format, or the reason why no layout has words for it."""
    if fmt.zero is not None:
        return f"the input format {fmt} has a zero point"
    if fmt.block.whole:
        return _scheme(fmt, "tensor", ())
    if fmt.block.dims == (-1,):
        return _scheme(fmt, "token", ()) if fmt.dynamic else f"the input format {fmt} has a static range per token"
    if len(fmt.block.dims) == 1 and isinstance(fmt.block.dims[0], int) and fmt.dynamic:
        return _scheme(fmt, "group", (fmt.block.dims[0],))
    return f"the input format {fmt} has static scales over {fmt.block}"


def _scheme(fmt: Format, strategy: str, size: tuple[int, ...]) -> Scheme | str:
    if fmt.element.kind == "codebook":
        return f"{fmt.element} is a codebook, and the layouts know integers and floats only"
    if isinstance(fmt.scale, Format):
        inner = fmt.scale
        if inner.element.name != "e4m3" or not inner.block.whole or str(inner.scale) != "f32":
            return f"the two-level scale {inner} is not e4m3[...]*f32"
        scale = "two-level"
    else:
        scale = fmt.scale.name
    name = fmt.element.name.removesuffix("n")  # a narrow range is a way to choose scales, not another code
    return Scheme(fmt.element.kind, name, fmt.element.bits, strategy, size, scale, fmt.symmetric, fmt.dynamic)


def ragged(fmt: Format, shape: Sequence[int]) -> str | None:
    """Return a reason if some last block of a tensor of `shape` is not full: no layout stores such blocks."""
    if fmt.block.ragged(shape):
        return f"a block that does not divide the dimension: {fmt.block} on shape {list(shape)}"
    return None
