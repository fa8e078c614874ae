"""Files of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """Return what a file of JSON holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, value: Any) -> None:
    """Write a file of JSON in one line."""
    file.write_text(json.dumps(value), encoding="utf-8")


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file with an object of JSON in each line."""
    lines = [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
