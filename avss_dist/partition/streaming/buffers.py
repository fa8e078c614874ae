"""Tensors of safetensors files in memory: copied into a buffer, or mapped from the page cache."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from avss_dist.models.safetensors import DTYPES, StoredTensor, explaining_reads
from avss_dist.system.memory import populate

ELSEWHERE = (
    "Use `partition` device_map, which has transformers load the whole model."  # hint where streaming is impossible
)
_ALIGNMENT = 64  # bytes, of torch's allocations
_READERS = 4  # threads: one alone does not saturate the memory bandwidth
_PIECE = 8 << 20  # bytes that a thread reads at a time


def buffer_bytes(stored: Iterable[StoredTensor]) -> int:
    """Return the size of a buffer that holds these tensors, in bytes."""
    return sum(tensor.size + _ALIGNMENT for tensor in stored)


def readahead(stored: Iterable[StoredTensor]) -> None:
    """Ask the system to read tensors ahead of their use, and block while the disk's queue is full."""
    for tensor in stored:
        with suppress(OSError), tensor.file.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), tensor.start, tensor.size, os.POSIX_FADV_WILLNEED)


class ReadBuffer:
    """Buffer into which stored tensors are copied, one after the other.

    Each tensor keeps the alignment of its file, so that kernels compute as with a mapped file.

    Args:
        size: number of bytes, from `buffer_bytes`.
        pinned: pin the memory, for asynchronous copies to a GPU.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._used = 0

    def clear(self) -> None:
        """Start again at the beginning of the buffer, so that later reads overwrite earlier ones."""
        self._used = 0

    def read(self, stored: Sequence[StoredTensor]) -> Iterator[torch.Tensor]:
        """Copy stored tensors into this buffer, and yield each when it is complete.

        Threads read the next tensors in the meantime.

        Raises:
            ModelError: a file is gone, or ends before its tensor does.
        """
        parts = [self._take(source) for source in stored]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="avss-readers") as threads:
            reads = [
                [threads.submit(_fill, source, part.numpy().data, start) for start in range(0, source.size, _PIECE)]
                for source, part in zip(stored, parts, strict=True)
            ]
            for source, part, pieces in zip(stored, parts, reads, strict=True):
                with explaining_reads(source):
                    for piece in pieces:
                        piece.result()
                yield part.view(DTYPES[source.dtype]).view(source.shape)

    def _take(self, stored: StoredTensor) -> torch.Tensor:
        """Reserve the bytes of a tensor, as uint8."""
        residue = stored.start % _ALIGNMENT if stored.start % DTYPES[stored.dtype].itemsize == 0 else 0
        begin = self._used + (residue - self._memory.data_ptr() - self._used) % _ALIGNMENT
        self._used = begin + stored.size
        return self._memory[begin : self._used]


class ZeroCopyBuffer:
    """Buffer for CPUs alone of stored tensors that are mapped from their files, without a copy.

    Writes to the tensors stay in this process.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def clear(self) -> None:
        """Drop all mappings."""
        self._tensors.clear()

    def read(self, stored: Sequence[StoredTensor]) -> Iterator[torch.Tensor]:
        """Map stored tensors, one after the other, and read each into memory without holding the GIL.

        Raises:
            ModelError: a file is gone, or ends before its tensor does.
        """
        for source in stored:
            with explaining_reads(source):
                tensor = _map(source)
                populate(tensor.data_ptr(), source.size)
            self._tensors.append(tensor)
            aligned = tensor.clone() if source.start % DTYPES[source.dtype].itemsize else tensor
            yield aligned.view(DTYPES[source.dtype]).view(source.shape)


AnyBuffer = ReadBuffer | ZeroCopyBuffer


def _fill(stored: StoredTensor, whole: memoryview, at: int) -> None:
    """Read a piece of a tensor, from offset ``at``, into the same place of its memory."""
    unread = whole[at : at + _PIECE]
    with stored.file.open("rb", buffering=0) as file:
        while unread:
            count = os.preadv(file.fileno(), [unread], stored.start + at)
            if not count:
                raise EOFError
            unread, at = unread[count:], at + count


def _map(stored: StoredTensor) -> torch.Tensor:
    """Return a private mapping of a stored tensor, uint8[size]."""
    before = stored.start % mmap.ALLOCATIONGRANULARITY
    with stored.file.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < stored.start + stored.size:
            raise EOFError
        if not stored.size:
            return torch.empty(0, dtype=torch.uint8)
        mapped = mmap.mmap(file.fileno(), before + stored.size, access=mmap.ACCESS_COPY, offset=stored.start - before)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=stored.size, offset=before)
