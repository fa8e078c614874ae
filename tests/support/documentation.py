"""The documentation, as tests read it."""

from __future__ import annotations

from pathlib import Path

import avss_dist

ROOT = Path(__file__).parents[2]
DOCS = Path(avss_dist.__file__).parent / "docs"


def read(path: Path) -> str:
    """The text of a page."""
    return path.read_text(encoding="utf-8")
