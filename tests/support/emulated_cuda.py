"""The CUDA kernels on a CPU: their source, compiled with a C++ compiler under `cuda/emulate.h`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from avss_dist.measure.kernels.cuda import NUMBERS, fields, source, window

HERE = Path(__file__).parent / "cuda"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
SHARED = 100 << 10  # bytes of a block's shared memory, as consumer cards have
OPTIONS = ("-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas")


@lru_cache
def libraries() -> Mapping[torch.dtype, Any]:
    """Return a library of the kernels for each dtype; kept in the temporary folder."""
    assert COMPILER is not None, "needs a C++ compiler"
    parts = '#include "emulate.h"', source(), '#include "entry.h"', ""
    everything = "\n".join([*parts, *(file.read_text() for file in sorted(HERE.glob("*.h"))), *OPTIONS])
    folder = Path(tempfile.gettempdir()) / f"emulated_cuda_{hashlib.sha256(everything.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as other:
            compiled = Path(other) / "made"
            compiled.mkdir()
            (compiled / "kernels.cpp").write_text("\n".join(parts), encoding="utf-8")
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda dtype: _compile(compiled, dtype), NUMBERS))
            if not folder.is_dir():
                shutil.copytree(compiled, folder, dirs_exist_ok=True)
    return {dtype: _library(folder / f"{NUMBERS[dtype]}.so") for dtype in NUMBERS}


def _compile(folder: Path, dtype: torch.dtype) -> None:
    low, span = window(dtype, SHARED)
    defines = (f"-DDTYPE={NUMBERS[dtype]}", f"-DLOW={low}u", f"-DSPAN={span}u", f"-I{HERE}")
    library = str(folder / f"{NUMBERS[dtype]}.so")
    subprocess.run([str(COMPILER), *OPTIONS, *defines, str(folder / "kernels.cpp"), "-o", library], check=True)


def _library(file: Path) -> Any:
    library = ctypes.CDLL(str(file))
    number = ctypes.c_uint
    library.launch.argtypes = [ctypes.c_char_p, number, number, ctypes.c_ulong, number, ctypes.c_char_p]
    library.sizes.restype = ctypes.c_ulong
    library.take_traffic.restype = ctypes.c_ulonglong
    assert library.sizes(0) == 8 * len(fields())
    return library


class Emulator:
    """See `cuda.Device`: some blocks and threads, which run in an order drawn from a seed.

    Attributes:
        launches: the kernels that were launched, in order; traffic: bytes that they moved to and from global memory.
    """

    def __init__(self, blocks: int = 3, threads: int = 64, seed: int = 0) -> None:
        self.blocks = blocks
        self.threads = threads
        self.launches: list[str] = []
        self.traffic = 0
        self._libraries = libraries()
        self._seed = seed

    def span(self, dtype: torch.dtype) -> int:
        """See `cuda.Device`."""
        return window(dtype, SHARED)[1]

    def launch(self, dtype: torch.dtype, kernel: str, grid: int, block: int, shared: int, arguments: bytes) -> None:
        """See `cuda.Device`."""
        assert shared <= SHARED
        assert len(arguments) == self._libraries[dtype].sizes(kernel == "finish")
        self.launches.append(kernel)
        self._seed += 1
        library = self._libraries[dtype]
        failed = library.launch(kernel.encode(), grid, block, shared, self._seed, arguments)
        assert not failed, {1: "a block of a wrong size", 2: "threads wait for ever", 3: "no such kernel"}[failed]
        self.traffic += library.take_traffic()
