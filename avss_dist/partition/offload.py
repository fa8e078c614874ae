"""Temporary folder of a replica on a disk."""

from __future__ import annotations

import shutil
import tempfile
from tempfile import TemporaryDirectory

from avss_dist.core.errors import ConfigError, explain_unwritable
from avss_dist.core.text import describe_bytes


def offload_folder(needed: int) -> TemporaryDirectory[str]:
    """Make a temporary folder of a replica, for weights and hidden states that do not fit in memory.

    Args:
        needed: number of bytes that will be written.

    Raises:
        ConfigError: the folder cannot be written, or has too little free space.
    """
    parent = tempfile.gettempdir()
    hint = "Set the variable TMPDIR to another."
    with explain_unwritable(f"The temporary folder '{parent}'", hint, ConfigError):
        folder = TemporaryDirectory(prefix="avss-offload-", ignore_cleanup_errors=True)
    free = shutil.disk_usage(folder.name).free
    if free < needed:
        folder.cleanup()
        raise ConfigError(
            f"The temporary folder '{parent}' needs {describe_bytes(needed)} and has {describe_bytes(free)} free: "
            f"{describe_bytes(needed - free)} of weights have no place.",
            "Set the variable TMPDIR to a larger one, or allow more `max_memory`.",
        )
    return folder
