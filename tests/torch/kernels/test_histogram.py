"""Histograms of |x|: equal bins and logarithmic ones, merging, odd values, and the kernel against the law."""

from __future__ import annotations

import pytest
import torch

from modelopt.core.errors import ShapeError
from modelopt.torch import kernels
from modelopt.torch.kernels.histogram import edges, reference


def test_equal_bins_count_as_histc_does_and_keep_what_lies_beyond():
    x = torch.randn(1000)
    counts, peak = kernels.histogram(x, 64, 4.0)
    assert torch.equal(counts.float(), torch.histc(x.abs().clamp(max=3.999), 64, 0.0, 4.0))
    assert peak == x.abs().amax() and counts.sum() == 1000
    counts, peak = kernels.histogram(torch.tensor([float("nan"), 9.0, float("inf")]), 8, 2.0)
    assert counts.tolist() == [0] * 7 + [2] and peak.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logarithmic_bins_need_no_range_and_add_up(dtype):
    x = (torch.randn(3, 500) * 100).to(dtype)
    counts, peak = kernels.histogram(x)
    low = edges(2048)
    expected = torch.bucketize(x.float().abs().flatten(), low[:2040], right=True) - 1
    assert torch.equal(counts, torch.bincount(expected, minlength=2048)) and peak == x.abs().amax()
    parts = [kernels.histogram(row)[0] for row in x]
    assert torch.equal(sum(parts), counts)
    assert kernels.histogram(torch.tensor([0.0, -0.0]))[0][0] == 2
    assert kernels.histogram(torch.empty(0))[0].sum() == 0


def test_opcheck_and_refusals():
    torch.library.opcheck(torch.ops.modelopt.histogram.default, (torch.randn(8, 4), 256, None))
    torch.library.opcheck(torch.ops.modelopt.histogram.default, (torch.randn(8, 4), 100, torch.tensor(2.0)))
    for bins in (100, 128, 65536):
        with pytest.raises(ShapeError, match=str(bins)):
            kernels.histogram(torch.randn(4), bins)
    with pytest.raises(ShapeError, match="limit"):
        kernels.histogram(torch.randn(4), 100, torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_the_law(dtype):
    for count in (1, 7, 1000, 100003, 3000000):
        x = torch.randn(count, device="cuda", dtype=dtype) * 3
        if count > 100:
            x[3], x[5], x[6] = float("nan"), float("inf"), 0.0
        for bins, limit in ((2048, None), (32768, None), (256, None), (2048, 4.0), (1000, 3.3)):
            at = None if limit is None else torch.tensor(limit, device="cuda")
            for part in (x, x[1:]):
                ours, theirs = kernels.histogram(part, bins, at), reference.histogram(part, bins, at)
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1].view(torch.int32) & 0x7F800000, theirs[1].view(torch.int32) & 0x7F800000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(2**31 + 100, device="cuda", dtype=torch.bfloat16)
    x[-3:] = 5.0
    counts, peak = kernels.histogram(x)
    assert counts.sum() == x.numel() and counts[0] == x.numel() - 3 and peak == 5.0
