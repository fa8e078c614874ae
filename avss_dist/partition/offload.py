"""Folder on disk of a replica, for weights and hidden states that do not fit in memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from avss_dist.core.errors import ConfigError, unwritable
from avss_dist.core.text import describe_bytes


class OffloadFolder:
    """Temporary folder of a replica, for weights and hidden states that do not fit in memory.

    Args:
        parent: folder in which it is created; created if missing, and kept. None is the system's temporary folder.
        needed: number of bytes that will be written.

    Raises:
        ConfigError: the folder cannot be written, or has too little free space.
    """

    def __init__(self, parent: str | None, needed: int) -> None:
        try:
            if parent is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="avss-offload-", dir=parent, ignore_cleanup_errors=True)
        except OSError as error:
            folder = f"The offload folder '{parent or tempfile.gettempdir()}'"
            raise unwritable(folder, error, "Set `offload_folder` to another.", ConfigError) from error
        self.path = self._folder.name
        free = shutil.disk_usage(self.path).free
        if free < needed:
            self.remove()
            raise ConfigError(
                f"The offload folder '{Path(self.path).parent}' needs {describe_bytes(needed)} and has "
                f"{describe_bytes(free)} free: {describe_bytes(needed - free)} of weights have no place.",
                "Set `offload_folder` to a larger one, or allow more `max_memory`.",
            )

    def remove(self) -> None:
        """Delete the folder and its files."""
        self._folder.cleanup()
