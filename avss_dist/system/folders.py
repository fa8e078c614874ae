"""Folders of the program's own files."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def cache_folder(*parts: str) -> Path:
    """Return a folder in the user's cache, such as ``~/.cache/avss_dist/tables``. It may not exist."""
    return platformdirs.user_cache_path("avss_dist").joinpath(*parts)
