"""Element types against ml_dtypes (every type it has) and against their published tables."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from modelopt.core.errors import FormatError
from modelopt.numerics.elements import ELEMENT_NAMES, NF4_TABLE, element

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
FLOATS = [n for n in ELEMENT_NAMES if element(n).kind == "float"]
INTS = [n for n in ELEMENT_NAMES if element(n).kind == "int"]
VALUES = [n for n in ELEMENT_NAMES if not element(n).scale_only]


def grid_of(name: str) -> torch.Tensor:
    e = element(name)
    table = e.table()
    return torch.unique(table[table.isfinite() & (table >= e.min)])  # a narrow integer has one code that is never used


def neighbourhoods(name: str) -> torch.Tensor:
    """Every value, every midpoint, and the floats just above and below each of them; small and random values; -0."""
    grid = grid_of(name).double()
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).float()
    around = torch.cat(
        [points, torch.nextafter(points, torch.tensor(float("inf"))), torch.nextafter(points, -torch.tensor(float("inf")))]
    )
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.exp2(torch.randint(-24, 10, (20000,), generator=generator).float())
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 2.0**-149])
    x = torch.cat([around, spread, tiny])
    return x[x.abs() <= element(name).max]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_cast_equals_ml_dtypes_bit_for_bit(name):
    x = neighbourhoods(name)
    theirs = x.numpy().astype(ML_DTYPES[name])
    ours = element(name).cast(x)
    assert np.array_equal(ours.numpy().view(np.int32), theirs.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_equal_ml_dtypes(name):
    e = element(name)
    codes = torch.arange(2**e.bits, dtype=torch.uint8)
    theirs = codes.numpy().view(ML_DTYPES[name]).astype(np.float32)
    ours = e.decode(codes).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(np.signbit(ours[~np.isnan(ours)]), np.signbit(theirs[~np.isnan(theirs)]))
    x = e.cast(neighbourhoods(name))
    assert np.array_equal(e.encode(x).numpy(), x.numpy().astype(ML_DTYPES[name]).view(np.uint8))


@pytest.mark.parametrize("name", ["i4", "u4", "i2", "u2"])
def test_small_integers_have_the_values_of_ml_dtypes(name):
    theirs = {"i4": ml_dtypes.int4, "u4": ml_dtypes.uint4, "i2": ml_dtypes.int2, "u2": ml_dtypes.uint2}[name]
    info = ml_dtypes.iinfo(theirs)
    assert (element(name).min, element(name).max) == (info.min, info.max)


@pytest.mark.parametrize("name", INTS)
def test_integers_round_half_to_even_and_saturate(name):
    e = element(name)
    x = torch.arange(-300, 300, 0.25)
    assert torch.equal(e.cast(x), torch.from_numpy(np.clip(np.rint(x.numpy()), e.min, e.max)))
    assert not torch.signbit(e.cast(torch.tensor([-0.25, -0.0]))).any(), "integers have no negative zero"


@pytest.mark.parametrize("name", VALUES)
def test_encode_then_decode_is_the_identity_on_the_grid(name):
    e = element(name)
    values = grid_of(name)
    codes = e.encode(values)
    assert torch.equal(e.decode(codes), values)
    assert int(codes.max()) <= e.code_mask
    assert torch.equal(e.cast(values), values), "a representable value is its own nearest"


@pytest.mark.parametrize("name", VALUES)
def test_cast_takes_a_nearest_value_of_the_grid(name):
    e, grid = element(name), grid_of(name).double()
    x = neighbourhoods(name)
    best = (x.double()[:, None] - grid[None, :]).abs().min(dim=1).values
    error = (x.double() - e.cast(x).double()).abs()
    assert torch.equal(error, best) if name != "nf4" else (error <= best + 1e-7).all()  # NF4's midpoints are float32


@pytest.mark.parametrize("name", [n for n in FLOATS if n != "e3m0"])
def test_ties_go_to_the_even_code(name):
    e, grid = element(name), grid_of(name)
    positive = grid[grid >= 0]
    ties = ((positive[1:].double() + positive[:-1].double()) / 2).float()
    codes = e.encode(e.cast(ties))
    assert (codes % 2 == 0).all()


@pytest.mark.parametrize("name", VALUES)
def test_values_beyond_the_range_saturate_and_nan_stays_nan(name):
    e = element(name)
    x = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, e.max * 1.01 + 1, e.min * 1.01 - 1])
    assert e.cast(x).tolist() == [e.max, e.min] * 3
    assert e.cast(torch.tensor([float("nan")])).isnan().all()


def test_published_maxima():
    expected = {
        "e4m3": 448,
        "e5m2": 57344,
        "e3m2": 28,
        "e2m3": 7.5,
        "e2m1": 6,
        "e1m2": 3.5,
        "e3m0": 16,
        "i8": 127,
        "i4": 7,
        "u4": 15,
        "i8n": 127,
    }
    assert {n: element(n).max for n in expected} == expected
    assert element("i8n").min == -127 and element("i8").min == -128
    assert grid_of("e2m1")[grid_of("e2m1") >= 0].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_nf4_ties_go_down_and_the_table_is_monotone():
    table = torch.tensor(NF4_TABLE)
    assert (table[1:] > table[:-1]).all() and table[7] == 0 and table[0] == -1 and table[-1] == 1
    middle = (table[1:] + table[:-1]) / 2
    assert torch.equal(element("nf4").encode(element("nf4").cast(middle)), torch.arange(15, dtype=torch.uint8))


def test_unknown_elements_are_answered_with_the_nearest_name():
    with pytest.raises(FormatError, match='Did you mean "e4m3"'):
        element("e4m4")
    with pytest.raises(FormatError, match="scale"):
        element("e8m0").cast(torch.ones(1))
