"""Output of results: tables to print and files to write."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from avss_dist.core.errors import QueryError, explain_unwritable
from avss_dist.core.files import staged_file
from avss_dist.core.streams import binary_output, console, emit, emit_json
from avss_dist.core.text import escape_markdown, printable
from avss_dist.core.values import TableRow

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ROWS_AT_ONCE = 10_000  # of a table, as Python objects
MAX_ROWS = 40  # of a table on a terminal
MAX_FITTED = 200  # rows of a table in a pipe that is fitted to the width of a page


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Redirect standard output to a file inside the block.

    The file is written in one step. If the block or the writing fails, a previous file stays as it was.

    Raises:
        AvssError: it cannot be written.
        StorageFull: there is no space left.
    """
    with (
        explain_unwritable(path, "Name another file with `output`."),
        staged_file(path) as staged,
        staged.open("w", encoding="utf-8", errors="surrogateescape") as file,
        redirect_stdout(file),
    ):
        yield
    emit(path)


def print_result(
    format: str, shown: Iterable[str | RenderableType], rows: Callable[[], pa.Table | Iterable[TableRow]]
) -> None:
    """Print a result: what people read in the formats ``table`` and ``text``, its rows in the others.

    Args:
        shown: lines, and tables for a terminal.
        rows: returns a table, or objects that are printed as JSON.
    """
    if format in ("table", "text"):
        for part in shown:
            if isinstance(part, str):
                emit(part)
            else:
                console().print(part)
        return
    result = rows()
    if isinstance(result, pa.Table):
        write_table(result, format, console())
    else:
        for row in result:
            emit_json(row)


def write_table(table: pa.Table, kind: str, console: Console, *, newest_first: bool = False) -> None:
    """Write a table to standard output: ``table``, ``csv``, ``json`` (an object a line), ``markdown``, ``parquet``.

    Of a long ``table``, a terminal shows the first and the last rows and how many are between them. Files, pipes and
    the other kinds have all rows; there, a row of a long ``table`` is one line.

    Args:
        newest_first: the first rows matter most, so a terminal shows no others.
    """
    table = table.rename_columns(_numbered(table.column_names))
    if kind == "table" and len(table) > MAX_FITTED and not console.is_terminal:
        _write_lines(table)
    elif kind == "table":
        _write_fitted(table, console, newest_first=newest_first)
    elif kind == "json":
        for row in _rows(table):
            emit_json(map_leaves(row, as_json))
    elif kind == "markdown":
        _write_markdown(table)
    elif kind == "csv":
        _write_csv(table)
    else:
        _write_parquet(table)


def _numbered(names: Sequence[str]) -> list[str]:
    """Return names with numbers after repeated ones, such as those of a join: ``model``, ``model_1``."""
    numbered: list[str] = []
    for name in names:
        new = name
        count = 0
        while new in numbered:
            count += 1
            new = f"{name}_{count}"
        numbered.append(new)
    return numbered


def _write_markdown(table: pa.Table) -> None:
    """Write a table in Markdown."""
    from avss_dist.reports.terminal.tables import describe_value

    lines = [
        _markdown_line(escape_markdown(name) for name in table.column_names),
        _markdown_line(["---"] * table.num_columns),
    ]
    for row in _rows(table):
        lines.append(_markdown_line(escape_markdown(describe_value(value)) for value in row.values()))
    emit("\n".join(lines))


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _write_csv(table: pa.Table) -> None:
    """Write a table as CSV, with `ROWS_AT_ONCE` rows in memory at a time."""
    import csv

    writer = csv.writer(SimpleNamespace(write=partial(emit, end="")), lineterminator="\n")
    writer.writerow([csv_cell(name) for name in table.column_names])
    for row in _rows(table):
        writer.writerow([csv_cell(value) for value in row.values()])


def _write_fitted(table: pa.Table, console: Console, *, newest_first: bool) -> None:
    """Write a table as wide as a terminal or a page."""
    from avss_dist.reports.terminal.tables import plain_table

    hidden = len(table) - MAX_ROWS if console.is_terminal else 0
    if hidden > 0:
        last = 0 if newest_first else MAX_ROWS // 2
        table = pa.concat_tables([table.slice(0, MAX_ROWS - last), table.slice(len(table) - last)])
    console.print(plain_table(table.column_names, list(_rows(table))))
    if hidden > 0:
        where = "older rows" if newest_first else f"rows between the first and the last {MAX_ROWS // 2}"
        emit(f"{hidden:,} {where} are not shown; a file or a pipe gets all: --format csv > FILE.csv.")


def _write_lines(table: pa.Table) -> None:
    """Write a long table with a line for each row, as wide as needed, with `ROWS_AT_ONCE` rows in memory at a time.

    The columns are as wide as the headings and the first of these rows need.
    """
    from avss_dist.reports.terminal.tables import describe_value

    numbers = [_is_number(kind) for kind in table.schema.types]
    widths: list[int] = []
    for batch in table.combine_chunks().to_batches(ROWS_AT_ONCE):
        lines = []
        for row in _rows(pa.Table.from_batches([batch])):
            lines.append([describe_value(value).replace("\n", " ") for value in row.values()])
        if not widths:
            widths = [_longest(texts) for texts in zip(table.column_names, *lines, strict=True)]
            rules = ["-" * width for width in widths]
            lines = [table.column_names, rules, *lines]
        for line in lines:
            emit(_aligned(line, widths, numbers))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _longest(texts: Sequence[str]) -> int:
    return max(len(text) for text in texts)


def _aligned(texts: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    """Return the texts of a row in columns of so many characters. Numbers are aligned to the right."""
    cells = []
    for text, width, number in zip(texts, widths, numbers, strict=True):
        cells.append(text.rjust(width) if number else text.ljust(width))
    return "  ".join(cells)


_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a formula begins with


def csv_cell(value: object) -> object:
    """Return a value as a cell of CSV. An apostrophe precedes text that a spreadsheet would take for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    is_formula = value.startswith(_FORMULA) or text.lstrip().startswith(_FORMULA)
    return f"'{text}" if is_formula else text


def map_leaves(value: Any, change: Callable[[object], object]) -> Any:
    """Return a copy of nested dicts and lists with ``change`` applied to every other value in them."""
    if isinstance(value, dict):
        return {key: map_leaves(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [map_leaves(part, change) for part in value]
    return change(value)


def as_json(value: object) -> object:
    """Return a value that JSON can hold: null for NaN and infinities, a number for a decimal of SQL."""
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _rows(table: pa.Table) -> Iterator[dict[str, object]]:
    """Yield the rows of a table as dicts of Python objects.

    Raises:
        QueryError: a time is outside of the years that Python supports.
    """
    for batch in table.to_batches(ROWS_AT_ONCE):
        try:
            rows = batch.to_pylist(maps_as_pydicts="lossy")
        except (OverflowError, ValueError) as error:
            raise QueryError(
                f"A date or time of the result is outside of the years 1 to 9999, or not finite: {error}.",
                "Write it as text: SELECT column::VARCHAR, or use `format` parquet.",
            ) from error
        yield from rows


def _write_parquet(table: pa.Table) -> None:
    import pyarrow.parquet as pq

    for column in table.schema:
        # Nothing is written where a type cannot be.
        try:
            pq.write_table(pa.schema([column]).empty_table(), io.BytesIO())
        except pa.ArrowNotImplementedError as error:
            raise QueryError(
                f"Parquet has no type for column '{column.name}' ({column.type}).",
                "Write it as text: SELECT column::VARCHAR.",
            ) from error
    pq.write_table(table, binary_output(), compression="zstd")
