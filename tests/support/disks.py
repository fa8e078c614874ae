"""Small file systems, which can be filled; mounting them takes root."""

from __future__ import annotations

import subprocess
from pathlib import Path


class SmallDisk:
    """A file system of so many megabytes, for a ``with`` block."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._size = f"size={megabytes}m"
        self._filler = folder / "filler"

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", self._size, "tmpfs", self.folder], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def fill(self) -> None:
        """Leave no space."""
        with open(self._filler, "ab", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def free(self) -> None:
        """Leave the space that was there before."""
        self._filler.unlink(missing_ok=True)
