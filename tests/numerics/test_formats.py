"""The notation: parsing, printing, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt.core.errors import FormatError, ShapeError
from modelopt.numerics import NAMES, Format, element, named, parse
from modelopt.numerics.blocks import Block, canonical
from modelopt.numerics.elements import ELEMENT_NAMES

VALUES = [n for n in ELEMENT_NAMES if not element(n).scale_only]
dims = st.one_of(st.integers(1, 4096), st.just(-1))
blocks = (
    st.tuples(st.lists(dims, max_size=3), st.booleans(), st.integers(0, 3))
    .filter(lambda t: t[0] or t[1])
    .map(lambda t: Block(tuple([*t[0][: t[2]], "...", *t[0][t[2] :]] if t[1] else t[0])))
)


@st.composite
def formats(draw) -> Format:
    e, block, dynamic = element(draw(st.sampled_from(VALUES))), draw(blocks), draw(st.booleans())
    kind = draw(st.sampled_from(["wide", "e8m0", "two", "zero"]))
    wide = element(draw(st.sampled_from(["f32", "f16", "bf16"])))
    if kind == "e8m0":
        return Format(e, block, element("e8m0"), rule=draw(st.sampled_from(["up", "floor", "nearest"])), dynamic=dynamic)
    if kind == "two":
        inner = Format(element(draw(st.sampled_from(["e4m3", "i8", "u8", "e5m2"]))), draw(blocks), wide)
        rules = ["nearest", "46", "fp8"] if inner.element.name == "e4m3" and inner.block.whole else ["nearest"]
        return Format(e, block, inner, rule=draw(st.sampled_from(rules)), dynamic=dynamic)
    if kind == "zero" and e.kind == "int":
        return Format(e, block, wide, zero=e, dynamic=dynamic)
    return Format(e, block, wide, dynamic=dynamic)


@settings(max_examples=400, deadline=None)
@given(formats())
def test_parse_and_print_are_inverse(fmt):
    assert parse(str(fmt)) == fmt
    assert str(parse(str(fmt))) == str(fmt)


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_for_formats(name):
    assert str(named(name)) == NAMES[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e4m3", "block"),
        ("e4m3[...]", "one or two scale levels"),
        ("e4m3[...]*f33", 'Did you mean "f32"'),
        ("e4m4[...]*f32", 'Did you mean "e4m3"'),
        ("f32[...]*f32", "scales only"),
        ("i4[0]*f32", "block dimension"),
        ("i4[64]*f32+u4", "zero point"),
        ("nf4[64]*f32+nf4", "zero point"),
        ("i4[64]*i8", "scale is"),
        ("i4[64]*e8m0:ceil", "Allowed"),
        ("i4[64]*f32:up", "does not fit"),
        ("i4[64]*e4m3[16]~*f32", "dynamic"),
        ("i4[...,...]*f32", "at most one"),
        ("i4[64]*f32+", "zero point type"),
        ("i4[64]**f32", "Cannot read"),
        ("i4[99999999999]*f32", "block dimension"),
        ("x" * 500, "string such as"),
    ],
)
def test_nonsense_is_refused_with_a_hint(text, message):
    with pytest.raises(FormatError, match=message):
        parse(text)


def test_a_misspelled_name_is_answered_with_the_nearest():
    with pytest.raises(FormatError, match='Did you mean "nvfp4"'):
        named("nvpf4")


@pytest.mark.parametrize(
    ("block", "shape", "grid"),
    [
        ("[...]", (3, 5), ()),
        ("[1,...]", (3, 5, 2), (3, 1, 1)),
        ("[-1,1,...]", (3, 5, 2), (1, 5, 1)),
        ("[...,1]", (3, 5, 2), (1, 1, 2)),
        ("[-1]", (3, 5, 2), (3, 5, 1)),
        ("[4]", (3, 10), (3, 3)),
        ("[128,128]", (300, 200), (3, 2)),
        ("[16]", (0, 32), (0, 2)),
    ],
)
def test_grids(block, shape, grid):
    assert parse(f"i8{block}*f32").grid(shape) == grid


def test_a_block_with_too_many_dimensions_says_so():
    fmt = parse("i8[128,128]*f32")
    assert "names 2 dimensions" in fmt.why_not((64,))
    with pytest.raises(ShapeError, match="names 2 dimensions"):
        fmt.grid((64,))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_canonical_keeps_elements_and_blocks(shape, data):
    sizes = tuple(data.draw(st.sampled_from(sorted({1, n, max(n // 2, 1)}))) for n in shape)
    new_shape, new_sizes = canonical(tuple(shape), sizes)
    count = lambda s, b: eval("*".join(str(-(-n // k)) for n, k in zip(s, b, strict=True)))  # noqa: E731
    assert eval("*".join(map(str, shape))) == eval("*".join(map(str, new_shape)))
    assert count(shape, sizes) == count(new_shape, new_sizes)


def test_bits_per_value_counts_scales():
    assert named("nvfp4").bits_per_value((4096, 4096)) == pytest.approx(4.5, abs=1e-4)
    assert named("mxfp4").bits_per_value((64, 64)) == 4.25
    assert parse("u4[64]*f16+u4").bits_per_value((64, 64)) == 4 + 20 / 64
    assert parse("i3[64]*f32").bits_per_value((8, 64)) == 3.5
