"""Where this program keeps files of its own."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def cache_folder(*parts: str) -> Path:
    """A folder under the user's cache, such as ``~/.cache/avss_dist/tables``; it may not exist."""
    return platformdirs.user_cache_path("avss_dist").joinpath(*parts)
