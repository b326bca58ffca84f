"""CUDA C++ source to a kernel that can be launched, by the run-time compiler that torch brings along; nothing is built before.

    compiled(source, name, constants, device) -> Kernel;   Kernel.launch(grid, block, shared_bytes, stream, arguments)

Constants are preprocessor definitions. A kernel is launched so that it may start while the one ahead of it ends (it waits for it
itself: `griddepcontrol.wait`). Source: CUDA driver API and NVRTC reference manuals.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import MissingDependencyError, ModelOptError

# CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, ..._MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_SHARED, _MAX_SHARED, _PROGRAMMATIC = 1, 8, 6
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


def _library(names: Sequence[str]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            for root in sys.path:
                for path in sorted(pathlib.Path(root or ".").glob(f"nvidia/*/lib/{name}")):
                    return ctypes.CDLL(str(path))
    return None


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    major = (torch.version.cuda or "0").split(".")[0]
    return _library((f"libnvrtc.so.{major}", "libnvrtc.so"))


@functools.cache
def _driver() -> ctypes.CDLL | None:
    return _library(("libcuda.so.1",))


def why_not(device: torch.device | None = None) -> str | None:
    """Return why kernels cannot be compiled here, for `device` where it is given, or None."""
    if _nvrtc() is None:
        return "the CUDA run-time compiler (libnvrtc) is not found"
    if _driver() is None:
        return "the CUDA driver (libcuda) is not found"
    return None if device is None else _unknown(device)


@functools.cache
def _unknown(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    known = _capabilities()
    return None if not known or 10 * major + minor in known else f"libnvrtc does not know compute capability {major}.{minor}"


def _capabilities() -> frozenset[int]:
    """Return the compute capabilities (90 is 9.0) for which the run-time compiler compiles; none where it does not say."""
    nvrtc, count = _nvrtc(), ctypes.c_int()
    if nvrtc is None or nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        return frozenset()
    found = (ctypes.c_int * count.value)()
    return frozenset() if nvrtc.nvrtcGetSupportedArchs(found) else frozenset(found)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have on `device`, but for what the system and a kernel itself keep."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 1024


def _check(status: int, what: str) -> None:
    if status:
        raise ModelOptError(f"{what} failed with CUDA error {status}.")


def binary(source: str, constants: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """Compile CUDA C++ for `arch` ("sm_90a"). Raises MissingDependencyError without NVRTC, else ModelOptError with its log."""
    nvrtc = _nvrtc()
    if nvrtc is None:
        raise MissingDependencyError(
            "libnvrtc is not found. It comes with CUDA builds of torch: install one, or the CUDA toolkit."
        )
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None), "nvrtcCreateProgram")
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in constants)]
    given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), given)
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise ModelOptError(f"NVRTC could not compile for {arch} with {dict(constants)}:\n{log.value.decode()}")
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    code = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


class Boxes:
    """A tensor map (128 bytes, aligned to 64): how bulk copies find boxes of a tensor. Zeros where there are no bulk copies."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(192)
        self.address = (ctypes.addressof(self._buffer) + 63) // 64 * 64


def boxes(x: Tensor, dims: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int = 0) -> Boxes:
    """Return the map of the bytes of `x` as `dims` (innermost first; `strides` in bytes, from the second on), cut into boxes.

    `swizzle`: 0 none; 1, 2, 3: the 16-byte pieces of 32, 64 or 128 bytes change places from row to row (CUtensorMapSwizzle).
    """
    driver, rank, out = _driver(), len(dims), Boxes()
    if driver is None:
        raise MissingDependencyError("libcuda is not found; it comes with the NVIDIA driver.")
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(out.address),
        0,  # bytes
        rank,
        ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # no interleaving
        swizzle,
        3,  # the L2 cache reads 256 bytes at once
        0,  # outside: zeros
    )
    _check(status, "cuTensorMapEncodeTiled")
    return out


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel of one device."""

    function: ctypes.c_void_p
    module: ctypes.c_void_p
    overlapped: bool

    def launch(
        self, grid: tuple[int, int, int], block: int, shared: int, stream: int, arguments: Sequence[Tensor | Boxes | int | None]
    ) -> None:
        """Launch on `stream` (a handle). Arguments: tensors (passed as pointers; None is null), 32-bit integers, and `Boxes`."""
        values = [a if isinstance(a, Boxes) else _boxed(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(v.address if isinstance(v, Boxes) else ctypes.addressof(v) for v in values))
        attribute = _Attribute(_PROGRAMMATIC, 0, 1)
        launch = _Launch(
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(block, 1, 1),
            shared,
            stream,
            ctypes.pointer(attribute),
            int(self.overlapped),
        )
        driver = _driver()
        assert driver is not None
        status = driver.cuLaunchKernelEx(ctypes.byref(launch), self.function, pointers, None)
        if status == _NO_CONTEXT:  # a thread that has not called the CUDA runtime yet: this call makes its context current
            torch.cuda.mem_get_info()
            status = driver.cuLaunchKernelEx(ctypes.byref(launch), self.function, pointers, None)
        _check(status, "cuLaunchKernelEx")


def _boxed(argument: Tensor | int | None) -> ctypes.c_int | ctypes.c_void_p:
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


def capture(stream: int) -> int | None:
    """Return the number of the capture that `stream` (a handle) is in, or None where there is none or the driver does not say."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    for name, more in (("cuStreamGetCaptureInfo_v2", 3), ("cuStreamGetCaptureInfo_v3", 4), ("cuStreamGetCaptureInfo", 0)):
        ask = getattr(_driver(), name, None)
        if ask is not None and not ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), *[None] * more):
            return number.value if status.value else None
    return None


@functools.cache
def compiled(source: str, name: str, constants: tuple[tuple[str, str], ...], device: torch.device) -> Kernel:
    """Compile and load `name` of `source` for `device`, once."""
    major, minor = torch.cuda.get_device_capability(device)
    code = binary(source, constants, f"sm_{major}{minor}" + ("a" if major >= 9 else ""))
    driver = _driver()
    if driver is None:
        raise MissingDependencyError("libcuda is not found; it comes with the NVIDIA driver.")
    with torch.cuda.device(device):
        torch.cuda.current_stream().query()  # makes the context current
        module, function, fixed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
        most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        _check(driver.cuFuncGetAttribute(ctypes.byref(fixed), _SHARED, function), "cuFuncGetAttribute")
        _check(driver.cuFuncSetAttribute(function, _MAX_SHARED, most - fixed.value), "cuFuncSetAttribute")
    return Kernel(function, module, major >= 9)
