"""Folder on disk of a replica, for weights and hidden states that do not fit in memory."""

from __future__ import annotations

import shutil
import tempfile

from avss_dist.core.errors import ConfigError, unwritable
from avss_dist.core.text import describe_bytes


class OffloadFolder:
    """Temporary folder of a replica, for weights and hidden states that do not fit in memory.

    Args:
        needed: number of bytes that will be written.

    Raises:
        ConfigError: the folder cannot be written, or has too little free space.
    """

    def __init__(self, needed: int) -> None:
        parent = tempfile.gettempdir()
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="avss-offload-", ignore_cleanup_errors=True)
        except OSError as error:
            hint = "Set the variable TMPDIR to another."
            raise unwritable(f"The temporary folder '{parent}'", error, hint, ConfigError) from error
        self.path = self._folder.name
        free = shutil.disk_usage(self.path).free
        if free < needed:
            self.remove()
            raise ConfigError(
                f"The temporary folder '{parent}' needs {describe_bytes(needed)} and has {describe_bytes(free)} free: "
                f"{describe_bytes(needed - free)} of weights have no place.",
                "Set the variable TMPDIR to a larger one, or allow more `max_memory`.",
            )

    def remove(self) -> None:
        """Delete the folder and its files."""
        self._folder.cleanup()
