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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch

from avss_dist.measure.kernels.reference import Accumulator, Kernels, limits_on

# The first four are as in kernels.cu.
UNITS_A_WARP = 128
STRIP = 32
RUN = 8
MAX_CALLS = 8
ENOUGH_ITEMS = 4096
"""Number of work items that are enough for every warp of a large card."""
MIN_CHUNK = 16
"""Number of tokens of which chunks are multiples."""
ALIGNMENT = 256
"""Alignment of the parts of a call's memory, in bytes."""
ARGUMENT_BYTES = 8
"""Number of bytes of an argument of a launch."""

NUMBERS = {torch.bfloat16: 0, torch.float16: 16, torch.float32: 32}
"""DTYPE in kernels.cu."""
OCTAVE = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 128}
"""Number of counters of an octave of one sign."""
MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of the driver."""
COMPARING_THREADS = 256
"""Number of threads of a block that compares."""
RESIDENT_THREADS = 2048
"""Number of threads that a multiprocessor holds."""


class NotCompiled(Exception):
    """Failure to compile the kernels for a device."""


@dataclass(frozen=True, eq=False)
class _PendingCall:
    """A launch whose results are added to an accumulator in `finish`.

    Attributes:
        groups: number of groups of units that a warp has.
        arguments: packed arguments of the launch.
    """

    into: Accumulator
    dtype: torch.dtype
    groups: int
    arguments: bytes


class CudaKernels(Kernels):
    """CUDA backend, see `kernels.reference.Kernels`. Accumulators are up to date after `finish`."""

    def __init__(self, launcher: Device, *, chunk: int | None = None) -> None:
        self._launcher = launcher
        self._chunk = chunk
        self._memory: dict[int, list[torch.Tensor]] = {}
        self._pending: list[_PendingCall] = []
        self._without: set[torch.dtype] = set()

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Add the statistics of a batch to an accumulator, as `kernels.reference.Kernels.add`."""
        if not self._can(x, before):
            super().add(into, x, mask, before)
        elif "unit_sums" in into.tensors:
            self._add(into, x, mask, before, "count_squared")
        else:
            self._add(into, x, mask, before, "count")

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
        pending = self._pending
        self._pending = []
        calls = b"".join(call.arguments for call in pending)
        room = MAX_CALLS * ARGUMENT_BYTES * len(fields())
        arguments = struct.pack("q", len(pending)) + calls.ljust(room, b"\0")
        groups = sum(call.groups for call in pending)
        self._launcher.launch(pending[0].dtype, "finish", groups, UNITS_A_WARP, 0, arguments)

    def _can(self, x: torch.Tensor, before: torch.Tensor | None) -> bool:
        if x.numel() == 0 or x.dtype in self._without:
            return False
        if before is not None and before.dtype != x.dtype:
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
        if len(self._pending) == MAX_CALLS or any(call.into is into for call in self._pending):
            self.finish()
        into.reserve(x.numel())
        rows, tokens, units = x.shape
        chunk = self._chunk or chunk_of(rows, tokens, units)
        compared = before is not None and kernel != "count_update"
        mask = mask.contiguous()
        values = {"rows": rows, "tokens": tokens, "units": units, "chunk": chunk}
        values["x"] = x.data_ptr()
        values["mask"] = mask.data_ptr()
        if before is not None:
            before = before.contiguous()
            values["before"] = before.data_ptr()
        limits = 0
        if x.dtype == torch.float32:
            limits = len(into.thresholds)
        if limits:
            values["num_limits"] = limits
            values["limits"] = limits_on(into.thresholds.tobytes(), x.device).data_ptr()
        values |= self._room((rows, tokens, units), chunk, x, kernel != "count", compared)
        for name, tensor in into.tensors.items():
            values[f"all_{name}"] = tensor.data_ptr()
        values["wide"] = "patterns" in into.tensors and into.tensors["patterns"].dtype == torch.int64
        in_order = [values.get(name, 0) for name in fields()]
        arguments = struct.pack(f"{len(in_order)}q", *in_order)
        launcher = self._launcher
        shared = shared_bytes(x.dtype, launcher.span(x.dtype), limits)
        launcher.launch(x.dtype, kernel, launcher.blocks, launcher.threads, shared, arguments)
        if compared:
            threads = min(COMPARING_THREADS, launcher.threads)
            blocks = launcher.blocks * max(1, RESIDENT_THREADS // threads)
            launcher.launch(x.dtype, "compare", blocks, threads, 0, arguments)
        self._pending.append(_PendingCall(into, x.dtype, _divided(units, UNITS_A_WARP), arguments))

    def _room(
        self, shape: tuple[int, int, int], chunk: int, x: torch.Tensor, squared: bool, compared: bool
    ) -> dict[str, int]:
        """Return the addresses of a call's memory, by field. Each call that waits for `finish` has its own memory.

        Memory is reused across layers: a part that kernels leave as zeros, and the rest.
        """
        planned = layout(shape, chunk, x.dtype, squared, compared)
        zeros = planned.zeros
        empty = torch.empty(0, dtype=torch.uint8)
        memory = self._memory.setdefault(len(self._pending), [empty, empty])
        if memory[0].numel() < zeros:
            memory[0] = torch.zeros(zeros, dtype=torch.uint8, device=x.device)
        if memory[1].numel() < planned.size - zeros:
            memory[1] = torch.empty(planned.size - zeros, dtype=torch.uint8, device=x.device)
        addresses = {}
        for name, offset in planned.offsets.items():
            if offset < zeros:
                addresses[name] = memory[0].data_ptr() + offset
            else:
                addresses[name] = memory[1].data_ptr() + offset - zeros
        return addresses


def _divided(number: int, size: int) -> int:
    """Return the number of parts of at most ``size``."""
    return -(-number // size)


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
    version = torch.version.cuda or "0"
    return int(version.split(".")[0])


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
                torch.zeros(1, device=self._device)  # This makes torch's context current in this thread.
                self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin), "load the kernels")
            self._modules[dtype] = module
        _, span = window(dtype, self._shared)
        return span

    def launch(self, dtype: torch.dtype, kernel: str, grid: int, block: int, shared: int, arguments: bytes) -> None:
        """Start a kernel on the current stream, after the kernels that were started before."""
        with torch.cuda.device(self._device):
            function = self._functions.get((dtype, kernel)) or self._function(dtype, kernel)
            address = ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p)
            pointers = (ctypes.c_void_p * 1)(address)
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
            text = ctypes.c_char_p()
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
    without_comments = re.sub(r"//.*", "", body[1])
    return tuple(re.findall(r"(\w+);", without_comments))


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
    if dtype == torch.float32:
        return 4 * (span + STRIP + 2 * limits + 3)
    return 8 * (span + STRIP)


def chunk_of(rows: int, tokens: int, units: int) -> int:
    """Return the tokens per work item, small enough that every warp of a large card gets items.

    The order of float sums depends on it, so it is a function of shapes only.
    """
    chunks = _divided(ENOUGH_ITEMS, rows * _divided(units, UNITS_A_WARP))
    return _divided(tokens, chunks * MIN_CHUNK) * MIN_CHUNK


@dataclass(frozen=True)
class Layout:
    """Layout of a call's memory, in bytes.

    Attributes:
        offsets: offsets by field.
        zeros: size of the leading part, which is zero at first.
        size: size of the whole.
    """

    offsets: dict[str, int]
    zeros: int
    size: int


@lru_cache(maxsize=64)
def layout(shape: tuple[int, int, int], chunk: int, dtype: torch.dtype, squared: bool, compared: bool) -> Layout:
    """Return the layout of a call's memory.

    Args:
        shape: rows, tokens and units of the batch.
        squared: whether squares are summed, too.
        compared: whether a block is compared with its input.
    """
    rows, tokens, units = shape
    parts = rows * _divided(tokens, chunk)
    sizes = {"ticket": 4, "arrived": 4 * parts, "bad": rows * tokens}
    sizes["sums"] = 8 * parts * units
    if squared:
        sizes["squares"] = 8 * parts * units
    sizes["seen"] = 16 * parts
    if dtype == torch.float32:
        sizes["moments"] = 40 * parts * _divided(units, UNITS_A_WARP)
    if compared:
        sizes["compared"] = 56 * rows * _divided(tokens, RUN)
    sizes["spread"] = 16 * rows * _divided(units, STRIP)
    sizes["pooled"] = 8 * rows
    sizes["row_seen"] = 16 * rows
    offsets = {}
    end = 0
    for name, size in sizes.items():
        offsets[name] = end
        end += _divided(size, ALIGNMENT) * ALIGNMENT
    return Layout(offsets, zeros=offsets["sums"], size=end)


_NvrtcFunction = Callable[..., int]


@lru_cache(maxsize=2)
def library(major: int) -> ctypes.CDLL:
    """Load libnvrtc of a CUDA major version from installed wheels or from the system.

    Raises:
        NotCompiled: if it is not installed.
    """
    name = f"libnvrtc.so.{major}"
    for folder in _nvrtc_folders(major):
        if (folder / name).is_file():
            with suppress(OSError):
                # NVRTC opens these by their name alone.
                for builtins in folder.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(builtins))
                return ctypes.CDLL(str(folder / name))
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NotCompiled(f"{name} is neither among the packages of this Python nor on the system") from error


def _nvrtc_folders(major: int) -> Iterator[Path]:
    """Yield the folders in which wheels of NVIDIA install NVRTC."""
    for path in sys.path:
        if path:
            home = Path(path) / "nvidia"
            yield home / f"cu{major}" / "lib"
            yield home / "cuda_nvrtc" / "lib"


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
    nvrtc = library(major)
    program = ctypes.c_void_p()
    low, span = window(dtype, shared)
    flags = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"-DDTYPE={NUMBERS[dtype]}",
        f"-DLOW={low}u",
        f"-DSPAN={span}u",
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


def _text(size_of: _NvrtcFunction, get: _NvrtcFunction, program: ctypes.c_void_p) -> bytes:
    """Return a text of a program from the functions of NVRTC that give its size and its bytes."""
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    return text.raw
