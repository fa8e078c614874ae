"""CUDA backend: the interface of the CUDA kernels. See the package for their design."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

import torch

from avss_dist.measure.kernels.base import Accumulator, limits_on
from avss_dist.measure.kernels.cuda.calls import (
    MAX_CALLS,
    UNITS_A_WARP,
    chunk_of,
    layout,
    record,
    records,
    shared_bytes,
)
from avss_dist.measure.kernels.generic import TorchKernels


class NotCompiled(Exception):
    """Failure to compile the kernels for a device."""


class Launcher(Protocol):
    """Interface for the launch of kernels on a device.

    Attributes:
        blocks: number of blocks for kernels that take any number.
        threads: maximum number of threads of their blocks.
    """

    blocks: int
    threads: int

    def span(self, dtype: torch.dtype) -> int:
        """Return the number of patterns with a counter in shared memory.

        Raises:
            NotCompiled: if there is no kernel for the dtype.
        """

    def launch(self, dtype: torch.dtype, kernel: str, grid: int, block: int, shared: int, arguments: bytes) -> None:
        """Start a kernel on the current stream, after the kernels that were started before."""


@dataclass(frozen=True)
class _Pending:
    """A call of `add` that is counted but not finished."""

    into: Accumulator
    dtype: torch.dtype
    groups: int
    arguments: bytes


class CudaKernels:
    """CUDA backend, see `kernels.base.Kernels`. Accumulators are up to date after `finish`."""

    def __init__(self, launcher: Launcher, *, chunk: int | None = None) -> None:
        self._launcher, self._chunk = launcher, chunk
        self._rooms: dict[int, _CallMemory] = {}
        self._pending: list[_Pending] = []
        self._torch = TorchKernels()
        self._without: set[torch.dtype] = set()

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """See `kernels.base.Kernels`."""
        if self._can(x, before):
            self._add(into, x, mask, before, "count_squared" if "unit_sums" in into.tensors else "count")
        else:
            self._torch.add(into, x, mask, before)

    def add_update(self, into: Accumulator, after: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> None:
        """See `kernels.base.Kernels`. The difference is computed inside the kernel, without a buffer."""
        if self._can(after, before):
            self._add(into, after, mask, before, "count_update")
        else:
            self._torch.add_update(into, after, before, mask)

    def finish(self) -> None:
        """See `kernels.base.Kernels`."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        grid = sum(call.groups for call in pending)
        arguments = records([call.arguments for call in pending])
        self._launcher.launch(pending[0].dtype, "finish", grid, UNITS_A_WARP, 0, arguments)

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
        if len(self._pending) == MAX_CALLS or any(call.into is into for call in self._pending):
            self.finish()
        into.reserve(x.numel())
        rows, tokens, units = x.shape
        chunk = self._chunk or chunk_of(rows, tokens, units)
        compared = before is not None and kernel != "count_update"
        mask, before = mask.contiguous(), None if before is None else before.contiguous()
        values = {"rows": rows, "tokens": tokens, "units": units, "chunk": chunk}
        values |= {"x": x.data_ptr(), "mask": mask.data_ptr()}
        if before is not None:
            values["before"] = before.data_ptr()
        limits = len(into.thresholds) if x.dtype == torch.float32 else 0
        if limits:
            values |= {"num_limits": limits, "limits": limits_on(into.thresholds.tobytes(), x.device).data_ptr()}
        values |= self._room((rows, tokens, units), chunk, x, kernel != "count", compared)
        for name, tensor in into.tensors.items():
            values[f"all_{name}"] = tensor.data_ptr()
        values["wide"] = "patterns" in into.tensors and into.tensors["patterns"].dtype == torch.int64
        arguments = record(values)
        shared = shared_bytes(x.dtype, self._launcher.span(x.dtype), limits)
        self._launcher.launch(x.dtype, kernel, self._launcher.blocks, self._launcher.threads, shared, arguments)
        if compared:
            threads = min(256, self._launcher.threads)
            blocks = self._launcher.blocks * max(1, 2048 // threads)
            self._launcher.launch(x.dtype, "compare", blocks, threads, 0, arguments)
        self._pending.append(_Pending(into, x.dtype, -(-units // UNITS_A_WARP), arguments))

    def _room(
        self, shape: tuple[int, int, int], chunk: int, x: torch.Tensor, squared: bool, compared: bool
    ) -> dict[str, int]:
        """Return the addresses of a call's memory, by field. Each call that waits for `finish` has its own memory."""
        offsets, zeros, size = layout(shape, chunk, x.dtype, squared, compared)
        room = self._rooms.setdefault(len(self._pending), _CallMemory())
        return room.addresses(offsets, zeros, size, x.device)


class _CallMemory:
    """Memory of one call, reused across layers: a part that kernels leave as zeros, and the rest."""

    def __init__(self) -> None:
        self._zeros = self._scratch = torch.empty(0, dtype=torch.uint8)

    def addresses(self, offsets: dict[str, int], zeros: int, size: int, device: torch.device) -> dict[str, int]:
        if self._zeros.numel() < zeros:
            self._zeros = torch.zeros(zeros, dtype=torch.uint8, device=device)
        if self._scratch.numel() < size - zeros:
            self._scratch = torch.empty(size - zeros, dtype=torch.uint8, device=device)
        first, second = self._zeros.data_ptr(), self._scratch.data_ptr() - zeros
        return {name: at + (first if at < zeros else second) for name, at in offsets.items()}
