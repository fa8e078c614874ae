"""Offloading of hidden states while other batches run: on the GPU up to a limit, then in host memory, then in files."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import count
from pathlib import Path

import torch

from avss_dist.core.errors import RunFailed
from avss_dist.partition.memory import OffloadFolder

_Offloaded = tuple[torch.UntypedStorage, int, torch.Tensor | Path]
"""Emptied storage, its size, and its bytes in host memory or the file that has them."""


class HiddenStateOffloader:
    """Offloader that moves the bytes of waiting tensors out of their storages and back, under live references.

    A batch may have several tensors, such as inputs of earlier layers that the model still refers to.

    Args:
        device: device of the tensors.
        device_bytes: GPU memory that all tensors may take together; 0 on a CPU.
        host_bytes: host memory that the others may take; None is no limit.
    """

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int | None) -> None:
        self._device = device
        self._room = {"device": float(device_bytes), "host": math.inf if host_bytes is None else float(host_bytes)}
        self._held: dict[str, Counter[Hashable]] = {place: Counter() for place in self._room}
        self._idle = device.type == "cpu" and host_bytes is None
        self._folder: OffloadFolder | None = None
        self._numbers = count()
        self._offloaded: dict[Hashable, list[_Offloaded]] = {}

    def close(self) -> None:
        """Delete what is in files."""
        if self._folder:
            self._folder.remove()

    def offload(self, batch: Hashable, tensors: Sequence[torch.Tensor]) -> None:
        """Move the hidden states of a batch out. They must not be used before `restore`.

        Raises:
            RunFailed: the bytes do not fit in memory, and cannot be written to a file.
        """
        if self._idle:
            return
        activations = [(x.untyped_storage(), x.nbytes) for x in tensors if not isinstance(x, torch.nn.Parameter)]
        storages = {s._cdata: s for s, size in activations if s.nbytes() == size > 0}  # that a tensor covers
        moved = (self._offload_storage(batch, storage) for storage in storages.values())
        self._offloaded[batch] = [offloaded for offloaded in moved if offloaded]

    def restore(self, batch: Hashable) -> None:
        """Move the hidden states of a batch back into the storages of its tensors."""
        for storage, size, place in self._offloaded.pop(batch, []):
            storage.resize_(size)
            if isinstance(place, Path):
                _read(place, storage)
                place.unlink()
            else:
                _as_tensor(storage).copy_(place, non_blocking=True)
        for held in self._held.values():
            held.pop(batch, None)

    def _take(self, place: str, batch: Hashable, size: int) -> bool:
        """Reserve bytes for a batch, and return whether the room suffices."""
        fits = self._held[place].total() + size <= self._room[place]
        self._held[place][batch] += size * fits
        return fits

    def _offload_storage(self, batch: Hashable, storage: torch.UntypedStorage) -> _Offloaded | None:
        """Move the bytes of a storage out and return where they are, or return None if it stays as it is."""
        size = storage.nbytes()
        if self._take("device", batch, size):
            return None
        fits = self._take("host", batch, size)
        if fits and self._device.type == "cpu":
            return None
        if fits:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            host.copy_(_as_tensor(storage), non_blocking=True)
        place = host if fits else self._write(storage)
        storage.resize_(0)
        return storage, size, place

    def _write(self, storage: torch.UntypedStorage) -> Path:
        self._folder = self._folder or OffloadFolder(storage.nbytes())
        file = Path(self._folder.path) / str(next(self._numbers))
        try:
            with file.open("wb", buffering=0) as stream:
                host = storage.cpu()
                unwritten = _memory_of(host)
                while unwritten:
                    unwritten = unwritten[stream.write(unwritten) :]
        except OSError as error:
            raise RunFailed(
                f"Hidden states cannot be written to {file.parent.parent}: {error.strerror}.",
                "Set the variable TMPDIR to a larger folder, allow more `max_memory`, or lower `sequences_per_shard`.",
            ) from error
        return file


def _as_tensor(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a uint8 view of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(storage: torch.UntypedStorage) -> memoryview:
    """Return the bytes of a storage on the CPU. (One that numpy has seen cannot be resized any more.)"""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _read(file: Path, storage: torch.UntypedStorage) -> None:
    host = storage if storage.device.type == "cpu" else torch.UntypedStorage(storage.nbytes())
    unread = _memory_of(host)
    with file.open("rb", buffering=0) as stream:
        while unread:
            count = stream.readinto(unread)
            if not count:
                raise RunFailed(f"{file} is shorter than what was written to it.", "Run it again.")
            unread = unread[count:]
    if host is not storage:
        storage.copy_(host)
