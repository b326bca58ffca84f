"""Which kernel serves a call: the first whose `why_not` has nothing to say; the law serves what no kernel does."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

from torch import Tensor

from modelopt.core.errors import ConfigError
from modelopt.numerics import Format, parse

OPS = ("fake_quantize", "quantize", "dequantize", "amax")


@functools.cache
def _kernel(op: str) -> ModuleType | None:
    name = f"modelopt.torch.kernels.{op}.triton"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def forced() -> str:
    """Return what `MODELOPT_KERNELS` asks for: "" (choose) or "reference". Raises ConfigError for anything else."""
    wanted = os.environ.get("MODELOPT_KERNELS", "")
    if wanted not in ("", "auto", "reference"):
        raise ConfigError(f'MODELOPT_KERNELS is "{wanted}"; it can be "auto" or "reference".')
    return "reference" if wanted == "reference" else ""


def fast_kernel(op: str, x: Tensor, what: Any) -> ModuleType | None:
    """Return the module of the fast kernel that serves `op` for `x` and its format (or size), or None where the law must."""
    if not x.is_cuda or forced():
        return None
    kernel = _kernel(op)
    return kernel if kernel is not None and kernel.why_not(x, what) is None else None


def fast_module(op: str) -> ModuleType | None:
    """Return the module of the fast kernel of `op`, or None where there is none (Triton is not installed)."""
    return _kernel(op)


def explain(x: Tensor, fmt: Format | str) -> dict[str, str]:
    """Return for each op the kernel that would serve `x` in `fmt`: "triton", "cuda", or "reference: " and the reason."""
    fmt = parse(fmt) if isinstance(fmt, str) else fmt
    answer = {}
    for op in OPS:
        kernel = None
        if forced():
            reason: str | None = "MODELOPT_KERNELS=reference"
        elif not x.is_cuda:
            reason = f"the tensor is on {x.device}"
        else:
            kernel = _kernel(op)
            reason = "Triton is not installed" if kernel is None else kernel.why_not(x, fmt)
        name = getattr(kernel, "name_of", lambda *_: "triton")
        answer[op] = name(x, fmt) if reason is None else f"reference: {reason}"
    return answer
