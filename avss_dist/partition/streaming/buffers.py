"""Tensors of safetensors files in memory: copied into a buffer, or used where the page cache has them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from avss_dist.errors import ModelError
from avss_dist.models.safetensors import DTYPES, StoredTensor, tensors_of, weight_files
from avss_dist.system.memory import populate

ELSEWHERE = "Use `partition` device_map, which has transformers load the whole model."  # where this cannot be done
_ALIGNMENT = 64  # of what torch allocates
_READERS = 4  # threads: one copies from the page cache at a fraction of what memory can give
_PIECE = 8 << 20  # bytes that one of them reads at a time


def stored_in(folder: Path) -> Iterator[StoredTensor]:
    """Return the tensors of a checkpoint's weight files, from their headers.

    Raises:
        ModelError: a header cannot be read, or names a dtype that torch does not compute with.
    """
    for tensor in (tensor for file in weight_files(folder) for tensor in tensors_of(file)):
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{tensor.file} holds '{tensor.name}' as {tensor.dtype}, which cannot be read layer by layer.",
                ELSEWHERE,
            )
        yield tensor


def buffer_bytes(stored: Iterable[StoredTensor]) -> int:
    """Return the size of a buffer that holds these tensors, in bytes."""
    return sum(tensor.size + _ALIGNMENT for tensor in stored)


def readahead(stored: StoredTensor) -> None:
    """Have the system read a tensor's part of its file ahead of its use; waits where the disk's queue is full."""
    with suppress(OSError), stored.file.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), stored.start, stored.size, os.POSIX_FADV_WILLNEED)


class ReadBuffer:
    """Memory into which stored tensors are copied, one after the other.

    Each gets the alignment that it has in its file, so that kernels compute as they do with a mapped file.

    Args:
        size: in bytes, from `buffer_bytes`.
        pinned: a GPU can copy from it by itself.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._used = 0

    def clear(self) -> None:
        """Start again; later reads overwrite earlier ones."""
        self._used = 0

    def read(self, stored: Sequence[StoredTensor]) -> Iterator[torch.Tensor]:
        """Copy stored tensors into this memory; each comes when it is there, while threads read those behind it.

        Raises:
            ModelError: a file is gone, or ends before its tensor does.
        """
        parts = [self._take(one) for one in stored]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="avss-readers") as threads:
            reads = [
                [threads.submit(_fill, one, part.numpy().data, at) for at in range(0, one.size, _PIECE)]
                for one, part in zip(stored, parts, strict=True)
            ]
            for one, part, pieces in zip(stored, parts, reads, strict=True):
                with _reading(one):
                    for piece in pieces:
                        piece.result()
                yield part.view(DTYPES[one.dtype]).view(one.shape)

    def _take(self, stored: StoredTensor) -> torch.Tensor:
        """Room for a tensor, uint8."""
        residue = stored.start % _ALIGNMENT if stored.start % DTYPES[stored.dtype].itemsize == 0 else 0
        begin = self._used + (residue - self._memory.data_ptr() - self._used) % _ALIGNMENT
        self._used = begin + stored.size
        return self._memory[begin : self._used]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in this memory."""
        return tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()


class ZeroCopyBuffer:
    """Stored tensors mapped from their files: nothing is copied, and no GPU can read them.

    What a model writes into them stays in this process.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def clear(self) -> None:
        """Forget what was read."""
        self._tensors.clear()

    def read(self, stored: Sequence[StoredTensor]) -> Iterator[torch.Tensor]:
        """Map stored tensors, one after the other, and have all of each read into memory. Other threads run meanwhile.

        Raises:
            ModelError: a file is gone, or ends before its tensor does.
        """
        for one in stored:
            with _reading(one):
                tensor = _map(one)
                populate(tensor.data_ptr(), one.size)
            self._tensors.append(tensor)
            aligned = tensor.clone() if one.start % DTYPES[one.dtype].itemsize else tensor
            yield aligned.view(DTYPES[one.dtype]).view(one.shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in this memory."""
        return any(one.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for one in self._tensors)


AnyBuffer = ReadBuffer | ZeroCopyBuffer


@contextmanager
def _reading(stored: StoredTensor) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise ModelError(f"{stored.file} ends before its tensor '{stored.name}' does.", "Copy it again.") from error
    except OSError as error:
        raise ModelError(f"{stored.file} cannot be read: {error.strerror}.", "Does it still exist?") from error


def _fill(stored: StoredTensor, whole: memoryview, at: int) -> None:
    """Read a piece of a tensor to its place among all of its bytes."""
    rest = whole[at : at + _PIECE]
    with stored.file.open("rb", buffering=0) as file:
        while rest:
            count = os.preadv(file.fileno(), [rest], stored.start + at)
            if not count:
                raise EOFError
            rest, at = rest[count:], at + count


def _map(stored: StoredTensor) -> torch.Tensor:
    """uint8[size], a mapping of its own."""
    before = stored.start % mmap.ALLOCATIONGRANULARITY
    with stored.file.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size < stored.start + stored.size:
            raise EOFError
        if not stored.size:
            return torch.empty(0, dtype=torch.uint8)
        mapped = mmap.mmap(file.fileno(), before + stored.size, access=mmap.ACCESS_COPY, offset=stored.start - before)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=stored.size, offset=before)
