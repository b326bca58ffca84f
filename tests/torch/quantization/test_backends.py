"""The kernels of `backends/` against the fake-quantized model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import CalibrationError, ConfigError, ShapeError
from modelopt.torch import kernels
from modelopt.torch.quantization.backends.fp8_per_tensor_gemm import fp8_per_tensor_gemm
from modelopt.torch.quantization.backends.gemm_registry import register_kernel, unregister_kernel
from modelopt.torch.quantization.backends.nvfp4_gemm import FORMAT, NVFP4Kernel


def test_fp8_gemm_multiplies_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    x = torch.randn(3, 5, 64)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, [x])
    with torch.no_grad():
        expected = model(x)
        mtq.compress(model)
        register_kernel(("e4m3[...]*f32", "e4m3[...]*f32", "*"), fp8_per_tensor_gemm)
        try:
            got = model(x)
        finally:
            unregister_kernel(fp8_per_tensor_gemm)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    model[0].input_quantizer.amax = None
    with pytest.raises(CalibrationError):
        fp8_per_tensor_gemm(x, model[0])


def test_nvfp4_gemm() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(8, 64), torch.randn(3, 64).to(torch.float8_e4m3fn)
    codes, scales = NVFP4Kernel.apply_quantization(w)
    assert codes.shape == (8, 32) and scales[0].shape == (8, 4) and scales[0].dtype == torch.float8_e4m3fn
    expected = x.float() @ kernels.fake_quantize(w, FORMAT).t()
    assert torch.allclose(NVFP4Kernel.gemm(x, codes, scales), expected, rtol=1e-5, atol=1e-5)
    same = NVFP4Kernel.apply_quantization(w, w.abs().max() / 2688)
    assert torch.equal(same[0], codes)
    with pytest.raises(ConfigError, match="no offsets"):
        NVFP4Kernel.apply_quantization(w, None, torch.zeros(1))
    with pytest.raises(ShapeError):
        NVFP4Kernel.apply_quantization(torch.randn(8, 60))
    with pytest.raises(ShapeError):
        NVFP4Kernel.gemm(torch.randn(1, 32), codes, scales)


@pytest.mark.gpu
def test_nvfp4_gemm_on_a_gpu() -> None:
    torch.manual_seed(0)
    for n, k in ((512, 1024), (96, 128)):
        codes, scales = NVFP4Kernel.apply_quantization(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
        weight = kernels.dequantize([codes, *scales], FORMAT, (n, k), torch.float32).double()
        for m in (1, 16, 100, 1000):
            x = torch.randn(2, m, k, device="cuda").to(torch.float8_e4m3fn)
            expected = x.double() @ weight.t()
            got, short = (NVFP4Kernel.gemm(x, codes, scales, dtype) for dtype in (torch.float32, torch.bfloat16))
            assert got.dtype == torch.float32 and short.dtype == torch.bfloat16 and got.shape == short.shape == (2, m, n)
            assert ((got - expected).norm() / expected.norm()).item() < 1e-5  # exact products, float32 sums
            assert ((short - expected).norm() / expected.norm()).item() < 4e-3
