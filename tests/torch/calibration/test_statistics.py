"""Statistics are the same however the data is cut, and padding is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt.core.errors import CalibrationError, CheckpointError
from modelopt.numerics import parse
from modelopt.torch.calibration import AbsMax, ChannelRange, Histogram, MinMax, Statistic, load, save

CHANNEL = parse("i8[-1,-1,1]*f32").block


def build() -> list[Statistic]:
    return [AbsMax(), AbsMax(CHANNEL), MinMax(), MinMax(CHANNEL), ChannelRange((-2, -3)), Histogram(64)]


def equal(a: Statistic, b: Statistic) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.allclose(x[k].double(), y[k].double(), rtol=1e-12, atol=0) for k in x)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.lists(st.floats(-30, 30), min_size=2, max_size=4))
def test_parts_merge_to_the_whole_in_any_order(seed: int, scales: list[float]) -> None:
    torch.manual_seed(seed)
    parts = [torch.randn(2, 3, 4) * 2.0**s for s in scales]
    for whole, forth, back, left, right in zip(build(), build(), build(), build(), build(), strict=True):
        whole.update(torch.cat(parts))
        for x in parts:
            forth.update(x)
        for x in reversed(parts):
            back.update(x)
        left.update(parts[0])
        for x in parts[1:]:
            right.update(x)
        if not isinstance(whole, ChannelRange):
            assert equal(whole, forth) and equal(whole, back) and equal(whole, right.merge(left))
        else:
            torch.testing.assert_close(forth.mean(), whole.mean())
            torch.testing.assert_close(left.merge(right).mean(), whole.mean())


def test_padding_is_not_there_even_where_it_is_nan() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    dirty = x.clone()
    dirty[weights == 0] = torch.nan
    dirty[1, 4] = torch.inf
    for masked, real in zip(build(), build(), strict=True):
        masked.update(dirty, weights)
        real.update(x[weights != 0].unsqueeze(0))
        assert equal(masked, real), masked.kind


def test_histogram_counts_are_those_of_the_stored_data() -> None:
    torch.manual_seed(1)
    data = [torch.randn(1000) * s for s in (1e-3, 1.0, 40.0, 0.1)]
    stat = Histogram(128)
    for x in data:
        stat.update(x)
    everything = torch.cat(data).abs().double()
    assert stat.limit == 2.0 ** everything.max().log2().floor().add(1)
    index = (everything / (stat.limit / 128)).long()
    assert torch.equal(stat.counts, torch.bincount(index, minlength=128))
    assert stat.peak == everything.max().float()
    with pytest.raises(CalibrationError, match="power of two"):
        Histogram(100)


def test_statistics_of_different_kinds_do_not_merge() -> None:
    with pytest.raises(CalibrationError, match="different kinds"):
        AbsMax().merge(AbsMax(CHANNEL))
    changing = AbsMax(parse("i8[1,...]*f32").block)
    changing.update(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="scale groups changed"):
        changing.update(torch.ones(4, 3))


def test_save_and_load(tmp_path: Path) -> None:
    stats = {f"layer.{i}.input_quantizer": s for i, s in enumerate(build())}
    for s in stats.values():
        s.update(torch.randn(2, 3, 4))
    stats["never"] = AbsMax()
    save(stats, tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    assert again.keys() == stats.keys() and again["never"].empty
    for name, stat in stats.items():
        assert type(again[name]) is type(stat) and again[name].settings() == stat.settings() and equal(again[name], stat)
    again["layer.5.input_quantizer"].update(torch.full((1, 1, 4), 100.0))  # it can go on
    assert again["layer.5.input_quantizer"].limit == 128.0


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "broken").write_bytes(b"\xff" * 20)
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    save_file({"a": torch.ones(1)}, tmp_path / "odd", metadata={"modelopt_statistics": '{"x": {"kind": "nope"}}'})
    for name in ("missing", "broken", "plain", "odd"):
        with pytest.raises(CheckpointError):
            load(tmp_path / name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histogram_on_a_gpu_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = Histogram(4096), Histogram(4096)
    for scale in (1.0, 0.3, 7.0, 0.0, 1e-5):
        x = (torch.randn(40, 333) * scale).to(dtype)
        weights = (torch.rand(40) > 0.2).float()
        for part, mask in ((x, None), (x[:, ::3], None), (x, weights)):
            ours.update(part.cuda(), None if mask is None else mask.cuda())
            theirs.update(part, mask)
    for name, expected in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name].cpu(), expected), name
