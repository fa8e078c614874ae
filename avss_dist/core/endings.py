"""Endings of the names of files that are written: what each promises is what the file holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from avss_dist.core.errors import ConfigError, QueryError, nearest

PICTURES = (".png", ".svg", ".html")  # that charts are written to
PAGES = (".html", ".htm")
PLAN_FILES = (".yaml", ".yml", ".txt")
TABLES = {
    "table": (".txt",),
    "csv": (".csv", ".txt"),
    "json": (".json", ".jsonl", ".ndjson", ".txt"),
    "markdown": (".md", ".markdown", ".txt"),
    "parquet": (".parquet",),
}
"""Endings of tables by format, the usual one first."""
_OTHERS = (
    *(".pdf", ".ps", ".eps", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".tsv", ".xls", ".xlsx", ".ods", ".doc", ".docx", ".zip", ".gz", ".safetensors"),
)
PROMISING = frozenset(chain(PICTURES, PAGES, PLAN_FILES, *TABLES.values(), _OTHERS))
"""Endings that promise some content. Any content may be in a file with another ending, or without one."""


def require_ending(endings: Sequence[str], content: str) -> Callable[[str | Path], str | Path]:
    """Return a check of the name of a file for some content, which returns the name.

    Args:
        endings: endings of such files, the usual ones first.
        content: the content, in words, such as ``a plan``.

    Raises:
        ConfigError: the name ends like a file of other content.
    """

    def check_ending(path: str | Path) -> str | Path:
        suffix = Path(str(path)).suffix.lower()
        if suffix in PROMISING and suffix not in endings:
            usual = " or ".join(endings[:2])
            raise ConfigError(f"expected a file for {content}, not '{path}'.", f"Name one that ends in {usual}.")
        return path

    return check_ending


def require_picture(path: str | Path) -> None:
    """Check the name of a picture.

    Raises:
        QueryError: it ends like no picture that can be drawn.
    """
    suffix = Path(str(path)).suffix.lower()
    if suffix not in PICTURES:
        raise QueryError(f"'{path}' does not say what to draw.", nearest(suffix, PICTURES))


def require_table_file(path: str | Path, format: str, formats: Sequence[str], *, draws: bool = False) -> None:
    """Check the name of a file for a table.

    Args:
        format: format of the table.
        formats: formats that it may have instead.
        draws: whether the same command draws pictures, too.

    Raises:
        QueryError: the name ends like a file of another format, or like no table.
    """
    suffix = Path(str(path)).suffix.lower()
    if suffix not in PROMISING or suffix in TABLES[format]:
        return
    for other in formats:
        if suffix in TABLES[other]:
            raise QueryError(f"'{path}' is no file of `format` {format}.", f"Add `format` {other}.")
    valid = ", ".join(f"{TABLES[name][0]} (`format` {name})" for name in formats)
    hint = f"Name one that ends in {valid}."
    if draws:
        hint += f" Pictures of scores end in {', '.join(PICTURES)}."
    raise QueryError(f"'{path}' is no file of a table.", hint)
