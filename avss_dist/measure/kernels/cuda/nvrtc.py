"""NVIDIA's run-time compiler from torch's CUDA wheels. It compiles CUDA C++ to machine code for one architecture."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from avss_dist.measure.kernels.cuda.backend import NotCompiled
from avss_dist.measure.kernels.cuda.calls import NUMBERS, source, window

OPTIONS = ("--std=c++17",)


@lru_cache(maxsize=2)
def library(major: int) -> Any:
    """Load libnvrtc of a CUDA major version from installed wheels or from the system.

    Raises:
        NotCompiled: if it is not installed.
    """
    name = f"libnvrtc.so.{major}"
    for folder in _folders(major):
        if (folder / name).is_file():
            try:
                for builtins in folder.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(builtins))  # which it opens by name alone
                return ctypes.CDLL(str(folder / name))
            except OSError:
                continue
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NotCompiled(f"{name} is neither among the packages of this Python nor on the system") from error


def _folders(major: int) -> list[Path]:
    homes = [Path(path) / "nvidia" for path in sys.path if path]
    return [home / name / "lib" for home in homes for name in (f"cu{major}", "cuda_nvrtc")]


def compile_for(dtype: torch.dtype, architecture: str, shared: int, major: int, *options: str) -> tuple[bytes, str]:
    """Compile the kernels of a dtype, and return the cubin and the compiler's log.

    Args:
        architecture: GPU architecture, such as ``sm_90``.
        shared: maximum bytes of shared memory of a block.
        major: major version of CUDA.
        options: further compiler options.

    Raises:
        NotCompiled: if there is no compiler, or it rejects the architecture or the source.
    """
    nvrtc, program = library(major), ctypes.c_void_p()
    low, span = window(dtype, shared)
    flags = [
        f"--gpu-architecture={architecture}",
        *OPTIONS,
        *(f"-D{name}={value}" for name, value in (("DTYPE", NUMBERS[dtype]), ("LOW", f"{low}u"), ("SPAN", f"{span}u"))),
        *options,
    ]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source().encode(), b"kernels.cu", 0, None, None)
    try:
        arguments = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), arguments)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if failed:
            raise NotCompiled(f"NVRTC {major} fails for {architecture} (error {failed}): {log.strip()[:2000]}")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    return text.raw
