"""Weights that repair models: files of a warehouse beside its tables, in safetensors, named by their content."""

from __future__ import annotations

import hashlib
import re

import pyarrow.fs as pafs

from avss_dist.core.errors import DamagedFile
from avss_dist.warehouse.storage import Storage

FOLDER = "patches"
_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


class Patches:
    """The patches of a warehouse. Each is written in one step. A key is the SHA-256 of a file, in hex."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def write(self, data: bytes) -> str:
        """Write a patch and return its key."""
        key = hashlib.sha256(data).hexdigest()
        self._storage.write(self._path(key), data)
        return key

    def keys(self) -> set[str]:
        """Return the keys of all patches."""
        folder = f"{self._storage.base}/{FOLDER}"
        with self._storage.reading(folder):
            infos = self._storage.filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        return {match[1] for match in (_NAME.fullmatch(info.base_name) for info in infos) if match}

    def read(self, key: str) -> bytes:
        """Read a patch.

        Raises:
            DamagedFile: it is missing, or its content does not match the key.
        """
        data = self._storage.read(path := self._path(key))
        if data is None or hashlib.sha256(data).hexdigest() != key:
            raise DamagedFile(
                f"Cannot read {path}: it is {'gone' if data is None else 'not what was written'}.",
                "Delete it, and run the same command again: it is fitted again.",
            )
        return bytes(data)

    def _path(self, key: str) -> str:
        return f"{self._storage.base}/{FOLDER}/{key}.safetensors"
