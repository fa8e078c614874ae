"""CUDA kernels: CUDA C++, compiled on first use by the NVRTC that torch brings.

The source is `kernels.cu`. A `Device` compiles and launches it, and `CudaKernels` is the interface for the observer.
There is one launch for each site of a layer, one more for the comparison of a block with its input, and one at the end
of the layer. No launch waits for the host.

- **Counts** are integers in the shared memory of a multiprocessor, for zero and for the patterns of the octaves in
  which activations lie, as far as the card has room. The other patterns are rare and counted in global memory.
- **Floats** are added in an order that depends only on shapes. Results are bitwise reproducible for any grid.

Tests compile the same source with g++ and run it on a CPU, thread by thread in drawn orders
(`tests/support/cuda`).
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
import warnings
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from avss_dist.measure.kernels.reference import Accumulator, Kernels, limits_on

UNITS_A_WARP, STRIP, RUN = 128, 32, 8  # as in kernels.cu
MAX_CALLS = 8
ENOUGH_ITEMS = 4096  # for every warp of a large card
MIN_CHUNK = 16  # tokens; chunks are multiples of it
ALIGNMENT = 256

NUMBERS = {torch.bfloat16: 0, torch.float16: 16, torch.float32: 32}  # DTYPE in kernels.cu
OCTAVE = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 128}  # counters of an octave of one sign
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class NotCompiled(Exception):
    """Failure to compile the kernels for a device."""


class CudaKernels(Kernels):
    """CUDA backend, see `kernels.reference.Kernels`. Accumulators are up to date after `finish`."""

    def __init__(self, launcher: Device, *, chunk: int | None = None) -> None:
        self._launcher, self._chunk = launcher, chunk
        self._memory: dict[int, list[torch.Tensor]] = {}
        self._pending: list[tuple[Accumulator, torch.dtype, int, bytes]] = []
        self._without: set[torch.dtype] = set()

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Add the statistics of a batch to an accumulator, as `kernels.reference.Kernels.add`."""
        if self._can(x, before):
            self._add(into, x, mask, before, "count_squared" if "unit_sums" in into.tensors else "count")
        else:
            super().add(into, x, mask, before)

    def add_update(self, into: Accumulator, after: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the statistics of ``after - before``, as `kernels.reference.Kernels.add_update`.

        The difference is computed inside the kernel, without a buffer.
        """
        if self._can(after, before):
            self._add(into, after, mask, before, "count_update")
        else:
            super().add(into, after - before, mask)

    def finish(self) -> None:
        """Complete pending additions, after which accumulators are up to date."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        _, dtypes, groups, calls = zip(*pending, strict=True)
        arguments = struct.pack("q", len(calls)) + b"".join(calls).ljust(MAX_CALLS * 8 * len(fields()), b"\0")
        self._launcher.launch(dtypes[0], "finish", sum(groups), UNITS_A_WARP, 0, arguments)

    def _can(self, x: torch.Tensor, before: torch.Tensor | None) -> bool:
        if not x.numel() or x.dtype in self._without or (before is not None and before.dtype != x.dtype):
            return False
        try:
            self._launcher.span(x.dtype)
        except NotCompiled as error:
            warnings.warn(f"torch counts {x.dtype}, which is slower: {error}", RuntimeWarning, stacklevel=2)
            self._without.add(x.dtype)
            return False
        return True

    def _add(
        self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None, kernel: str
    ) -> None:
        if len(self._pending) == MAX_CALLS or any(call[0] is into for call in self._pending):
            self.finish()
        into.reserve(x.numel())
        rows, tokens, units = x.shape
        chunk = self._chunk or chunk_of(rows, tokens, units)
        compared = before is not None and kernel != "count_update"
        mask, before = mask.contiguous(), None if before is None else before.contiguous()
        values = {"rows": rows, "tokens": tokens, "units": units, "chunk": chunk}
        values |= {"x": x.data_ptr(), "mask": mask.data_ptr(), "before": 0 if before is None else before.data_ptr()}
        limits = len(into.thresholds) if x.dtype == torch.float32 else 0
        if limits:
            values |= {"num_limits": limits, "limits": limits_on(into.thresholds.tobytes(), x.device).data_ptr()}
        values |= self._room((rows, tokens, units), chunk, x, kernel != "count", compared)
        values |= {f"all_{name}": tensor.data_ptr() for name, tensor in into.tensors.items()}
        values["wide"] = "patterns" in into.tensors and into.tensors["patterns"].dtype == torch.int64
        arguments = struct.pack(f"{len(fields())}q", *(values.get(name, 0) for name in fields()))
        shared = shared_bytes(x.dtype, self._launcher.span(x.dtype), limits)
        self._launcher.launch(x.dtype, kernel, self._launcher.blocks, self._launcher.threads, shared, arguments)
        if compared:
            threads = min(256, self._launcher.threads)
            blocks = self._launcher.blocks * max(1, 2048 // threads)
            self._launcher.launch(x.dtype, "compare", blocks, threads, 0, arguments)
        self._pending.append((into, x.dtype, -(-units // UNITS_A_WARP), arguments))

    def _room(
        self, shape: tuple[int, int, int], chunk: int, x: torch.Tensor, squared: bool, compared: bool
    ) -> dict[str, int]:
        """Return the addresses of a call's memory, by field. Each call that waits for `finish` has its own memory.

        Memory is reused across layers: a part that kernels leave as zeros, and the rest.
        """
        offsets, zeros, size = layout(shape, chunk, x.dtype, squared, compared)
        empty = torch.empty(0, dtype=torch.uint8)
        memory = self._memory.setdefault(len(self._pending), [empty, empty])
        if memory[0].numel() < zeros:
            memory[0] = torch.zeros(zeros, dtype=torch.uint8, device=x.device)
        if memory[1].numel() < size - zeros:
            memory[1] = torch.empty(size - zeros, dtype=torch.uint8, device=x.device)
        first, second = memory[0].data_ptr(), memory[1].data_ptr() - zeros
        return {name: at + (first if at < zeros else second) for name, at in offsets.items()}


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
    """Launcher of the kernels on a CUDA device, through the driver, on torch's streams and in its context.

    Attributes:
        blocks: number of blocks for kernels that take any number.
        threads: maximum number of threads of their blocks.
    """

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
        """Return the number of patterns with a counter in shared memory.

        The first call for a dtype compiles and loads its kernels in about a second.

        Raises:
            NotCompiled: if there is no kernel for the dtype.
        """
        if dtype not in self._modules:
            cubin, _ = compile_for(dtype, self._architecture, self._shared, cuda_version())
            module = ctypes.c_void_p()
            with torch.cuda.device(self._device):
                torch.zeros(1, device=self._device)  # makes torch's context current in this thread
                self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin), "load the kernels")
            self._modules[dtype] = module
        return window(dtype, self._shared)[1]

    def launch(self, dtype: torch.dtype, kernel: str, grid: int, block: int, shared: int, arguments: bytes) -> None:
        """Start a kernel on the current stream, after the kernels that were started before."""
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


@lru_cache(maxsize=1)
def source() -> str:
    """Return the CUDA C++ of all kernels."""
    return (files(__package__) / "kernels.cu").read_text("utf-8")


@lru_cache(maxsize=1)
def fields() -> tuple[str, ...]:
    """Return the names of the arguments of a launch, in the order of ``struct Call``."""
    body = re.search(r"struct Call \{\n(.*?)\n\};", source(), re.DOTALL)
    assert body is not None
    return tuple(re.findall(r"(\w+);", re.sub(r"//.*", "", body[1])))


def window(dtype: torch.dtype, shared: int) -> tuple[int, int]:
    """Return LOW and SPAN: the first pattern with a counter in a block's shared memory, and their number.

    They cover the 64 octaves up to 2**17 for bfloat16 and float32, in which activations lie, and the 30 octaves of
    float16. With less memory, they cover fewer octaves: for float16, those around 1/4.

    Args:
        shared: bytes of shared memory of a block.
    """
    octave = OCTAVE[dtype]
    maximum = (shared // 8 - STRIP) // octave
    if dtype != torch.float16:
        octaves = min(64, maximum)
        return (144 - octaves) * octave, octaves * octave
    octaves = min(30, maximum)
    return max(1, (31 - octaves) // 2 - 2) * octave, octaves * octave


def shared_bytes(dtype: torch.dtype, span: int, limits: int) -> int:
    """Return the bytes of shared memory of a counting block."""
    return 4 * (span + STRIP + 2 * limits + 3) if dtype == torch.float32 else 8 * (span + STRIP)


def chunk_of(rows: int, tokens: int, units: int) -> int:
    """Return the tokens per work item, small enough that every warp of a large card gets items.

    The order of float sums depends on it, so it is a function of shapes only.
    """
    chunks = -(-ENOUGH_ITEMS // (rows * -(-units // UNITS_A_WARP)))
    return -(-tokens // (chunks * MIN_CHUNK)) * MIN_CHUNK


@lru_cache(maxsize=64)
def layout(
    shape: tuple[int, int, int], chunk: int, dtype: torch.dtype, squared: bool, compared: bool
) -> tuple[dict[str, int], int, int]:
    """Return the layout of a call's memory: offsets by field, size of the leading zeroed part, total size."""
    rows, tokens, units = shape
    parts = rows * -(-tokens // chunk)
    items = parts * -(-units // UNITS_A_WARP) if dtype == torch.float32 else 0
    zeros = {"ticket": 4, "arrived": 4 * parts, "bad": rows * tokens}
    scratch = {
        "sums": 8 * parts * units,
        "squares": 8 * parts * units * squared,
        "seen": 16 * parts,
        "moments": 40 * items,
        "compared": 56 * rows * -(-tokens // RUN) * compared,
        "spread": 16 * rows * -(-units // STRIP),
        "pooled": 8 * rows,
        "row_seen": 16 * rows,
    }
    sizes = {name: size for name, size in (zeros | scratch).items() if size}
    *starts, end = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()), initial=0)
    offsets = dict(zip(sizes, starts, strict=True))
    return offsets, offsets["sums"], end


@lru_cache(maxsize=2)
def library(major: int) -> Any:
    """Load libnvrtc of a CUDA major version from installed wheels or from the system.

    Raises:
        NotCompiled: if it is not installed.
    """
    name = f"libnvrtc.so.{major}"
    homes = [Path(path) / "nvidia" for path in sys.path if path]
    for folder in [home / part / "lib" for home in homes for part in (f"cu{major}", "cuda_nvrtc")]:
        if (folder / name).is_file():
            with suppress(OSError):
                for builtins in folder.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(builtins))  # which it opens by name alone
                return ctypes.CDLL(str(folder / name))
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NotCompiled(f"{name} is neither among the packages of this Python nor on the system") from error


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
        "--std=c++17",
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
