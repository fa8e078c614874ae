"""Columns of rows, and the rows that have given values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Row = Mapping[str, Any]
AnyRow = TypeVar("AnyRow", bound=Row)


def column(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the values of a column, row by row."""
    return [row[name] for row in rows]


def columns(rows: Iterable[Row], *names: str) -> list[tuple[Any, ...]]:
    """Return the values of several columns, a tuple for each row."""
    return [tuple(row[name] for name in names) for row in rows]


def mapping(rows: Iterable[Row], key: str, value: str) -> dict[Any, Any]:
    """Return the values of a column by those of another column."""
    return {row[key]: row[value] for row in rows}


def where(rows: Iterable[AnyRow], **values: object) -> list[AnyRow]:
    """Return the rows that have these values."""
    return [row for row in rows if _has(row, values)]


def only_row(rows: Iterable[AnyRow], **values: object) -> AnyRow:
    """Return the only row that has these values."""
    (row,) = where(rows, **values)
    return row


def values_in(rows: Iterable[Row], name: str) -> set[Any]:
    """Return the different values of a column."""
    return set(column(rows, name))


def _has(row: Row, values: Row) -> bool:
    return all(row[name] == value for name, value in values.items())
