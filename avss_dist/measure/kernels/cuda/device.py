"""Kernels on a CUDA device: loaded and launched through the driver, on torch's streams and in its context."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from avss_dist.measure.kernels.cuda.calls import window
from avss_dist.measure.kernels.cuda.nvrtc import compile_for, library

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@lru_cache(maxsize=64)
def launcher_of(device: torch.device) -> Device:
    """Return the launcher of a device, which caches the compiled kernels.

    Raises:
        NotCompiled: if torch has no NVIDIA CUDA, or there is no NVRTC of its version.
    """
    library(cuda_version())
    return Device(device)


def cuda_version() -> int:
    """Return the major version of torch's CUDA, or 0 if it has none, as on ROCm."""
    return int((torch.version.cuda or "0").split(".")[0])


class Device:
    """Launcher of a CUDA device. See `cuda.backend.Launcher`."""

    threads = 1024

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.blocks = properties.multi_processor_count
        self._device = device
        self._architecture = f"sm_{properties.major}{properties.minor}"
        self._shared = int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._modules: dict[torch.dtype, ctypes.c_void_p] = {}
        self._functions: dict[tuple[torch.dtype, str], ctypes.c_void_p] = {}

    def span(self, dtype: torch.dtype) -> int:
        """See `cuda.backend.Launcher`. The first call for a dtype compiles and loads its kernels in about a second."""
        if dtype not in self._modules:
            cubin, _ = compile_for(dtype, self._architecture, self._shared, cuda_version())
            module = ctypes.c_void_p()
            with torch.cuda.device(self._device):
                torch.zeros(1, device=self._device)  # makes torch's context current in this thread
                self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin), "load the kernels")
            self._modules[dtype] = module
        return window(dtype, self._shared)[1]

    def launch(self, dtype: torch.dtype, kernel: str, grid: int, block: int, shared: int, arguments: bytes) -> None:
        """See `cuda.backend.Launcher`."""
        with torch.cuda.device(self._device):
            function = self._functions.get((dtype, kernel)) or self._function(dtype, kernel)
            pointers = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p))
            stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
            code = self._driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, pointers, None)
            self._check(code, f"launch {kernel}")

    def _function(self, dtype: torch.dtype, kernel: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        got = self._driver.cuModuleGetFunction(ctypes.byref(function), self._modules[dtype], kernel.encode())
        self._check(got, f"find {kernel}")
        if kernel.startswith("count"):
            allowed = self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, self._shared)
            self._check(allowed, f"give {kernel} shared memory")
        self._functions[dtype, kernel] = function
        return function

    def _check(self, code: int, what: str) -> None:
        if code:
            text: Any = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode()
            raise RuntimeError(f"CUDA error: {reason}: the driver could not {what} on {self._device} (error {code}).")
