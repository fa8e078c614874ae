"""Where hidden states are while their batch waits: not on a GPU, and beyond a limit not in memory either."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from avss_dist.errors import RunFailed
from avss_dist.partition.device_map import OffloadFolder


@dataclass
class _Away:
    """A storage that was emptied, and where its bytes are: in host memory or in a file."""

    storage: torch.UntypedStorage
    size: int
    host: torch.Tensor | None
    file: Path | None


class WaitingRoom:
    """Empties the storages of waiting tensors, which other frames hold too, and fills them again.

    A batch may have several: the inputs of earlier layers that the model still holds.

    Args:
        device: where the tensors are.
        room: bytes of host memory that they may take all together; None is no limit.
        folder: where the others go, a temporary folder if None.
    """

    def __init__(self, device: torch.device, room: int | None, folder: str | None) -> None:
        self._device, self._room, self._parent = device, room, folder
        self._idle = device.type == "cpu" and room is None
        self._folder: OffloadFolder | None = None
        self._numbers = count()
        self._seen: dict[Hashable, list[weakref.ref[torch.Tensor]]] = {}
        self._away: dict[Hashable, list[_Away]] = {}
        self._held: dict[Hashable, int] = {}

    def __enter__(self) -> WaitingRoom:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder:
            self._folder.remove()

    def enter(self, batch: Hashable, tensor: torch.Tensor | None) -> None:
        """A batch begins to wait; ``tensor`` is its hidden state. It must not be used before `leave`.

        Raises:
            RunFailed: it does not fit in memory, and cannot be written.
        """
        if self._idle:
            return
        seen = [ref for ref in self._seen.get(batch, []) if ref() is not None]
        if tensor is not None and all(ref() is not tensor for ref in seen):
            seen.append(weakref.ref(tensor))
        self._seen[batch] = seen
        owned = [t for ref in seen if (t := ref()) is not None and _owns_its_storage(t)]
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in owned}
        self._held[batch] = 0
        self._away[batch] = [away for storage in storages.values() if (away := self._put_away(batch, storage))]

    def leave(self, batch: Hashable) -> None:
        """A batch goes on: its tensors are what they were."""
        for away in self._away.pop(batch, []):
            away.storage.resize_(away.size)
            if away.file:
                _read(away.file, away.storage)
                away.file.unlink()
            elif away.host is not None:
                _as_tensor(away.storage).copy_(away.host, non_blocking=True)
        self._held.pop(batch, None)

    def _put_away(self, batch: Hashable, storage: torch.UntypedStorage) -> _Away | None:
        """None where it stays as it is."""
        size = storage.nbytes()
        fits = self._room is None or sum(self._held.values()) + size <= self._room
        if fits:
            self._held[batch] += size
        if fits and self._device.type == "cpu":
            return None
        if fits:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            host.copy_(_as_tensor(storage), non_blocking=True)
            away = _Away(storage, size, host, None)
        else:
            away = _Away(storage, size, None, self._write(storage))
        storage.resize_(0)
        return away

    def _write(self, storage: torch.UntypedStorage) -> Path:
        self._folder = self._folder or OffloadFolder(self._parent, storage.nbytes())
        file = Path(self._folder.path) / str(next(self._numbers))
        try:
            with file.open("wb", buffering=0) as stream:
                host = storage.cpu()
                rest = _memory_of(host)
                while rest:
                    rest = rest[stream.write(rest) :]
        except OSError as error:
            raise RunFailed(
                f"Hidden states cannot be written to {file.parent.parent}: {error.strerror}.",
                "Name a larger folder with --offload-folder, allow more with --max-memory, or use a smaller "
                "--sequences-per-shard.",
            ) from error
        return file


def _owns_its_storage(tensor: torch.Tensor) -> bool:
    """Whether nothing of a storage is beyond a tensor; a weight's is never a hidden state's own."""
    return not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().nbytes() == tensor.nbytes > 0


def _as_tensor(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 over a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(storage: torch.UntypedStorage) -> memoryview:
    """The bytes of a storage on the CPU. (One that numpy has seen cannot be resized any more.)"""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _read(file: Path, storage: torch.UntypedStorage) -> None:
    host = storage if storage.device.type == "cpu" else torch.UntypedStorage(storage.nbytes())
    rest = _memory_of(host)
    with file.open("rb", buffering=0) as stream:
        while rest:
            count = stream.readinto(rest)
            if not count:
                raise RunFailed(f"{file} is shorter than what was written to it.", "Run it again.")
            rest = rest[count:]
    if host is not storage:
        storage.copy_(host)
