"""Folders of the program's own files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder in the user's cache, such as ``~/.cache/avss_dist/tables``. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache").joinpath("avss_dist", *parts)
