"""Base of results: a table for Arrow, pandas or Polars, a summary, and an HTML preview for notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from avss_dist.core.extras import require_package
from avss_dist.core.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS, SHOWN_COLUMNS = 12, 10  # in a notebook


class TabularResult:
    """A result that is available as a `table`."""

    _bars: tuple[str, ...] = ()  # columns that a notebook shows as bars; the first that exists is used

    def table(self) -> pa.Table:
        """Return the result as a pyarrow table."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """Return the table as a pandas data frame.

        Raises:
            ConfigError: pandas is not installed.
        """
        require_package("pandas", "`to_pandas`")
        return self.table().to_pandas()

    def to_polars(self) -> Any:
        """Return the table as a Polars data frame.

        Raises:
            ConfigError: polars is not installed.
        """
        require_package("polars", "`to_polars`")
        import polars

        return polars.from_arrow(self.table())

    def summary(self) -> str:
        """Return a description of the result, in a line."""
        return f"{self.table().num_rows:,} rows"

    def __repr__(self) -> str:
        return printable(f"<{type(self).__name__}: {self.summary()}>")

    def _repr_html_(self) -> str:
        """Return a few rows as HTML, for notebooks. All text is escaped."""
        table = self.table()
        names, rows = table.column_names[:SHOWN_COLUMNS], table.slice(0, SHOWN_ROWS).to_pylist()
        lines = [f"<p>{_text(repr(self))}</p>", *self._picture(table), "<table><thead><tr>"]
        lines += [*(f"<th>{_text(name)}</th>" for name in names), "</tr></thead><tbody>"]
        lines += [f"<tr>{''.join(f'<td>{_cell(row[name])}</td>' for name in names)}</tr>" for row in rows]
        more = table.num_rows - len(rows)
        return "".join([*lines, "</tbody></table>", f"<p>and {more:,} more rows</p>" if more > 0 else ""])

    def _picture(self, table: pa.Table) -> Iterator[str]:
        """Yield an SVG of a numeric column, with a bar for each row."""
        name = next((name for name in self._bars if name in table.column_names), None)
        values = [value if value and isfinite(value) else 0.0 for value in table[name].to_pylist()] if name else []
        if not values or max(values) <= 0:
            return
        width, height = 6, 60
        bars = (
            f'<rect x="{i * width}" y="{height - h:.1f}" width="{width - 1}" height="{h:.1f}" fill="#2a78d6"/>'
            for i, h in enumerate(max(0.0, value) / max(values) * height for value in values)
        )
        size = f'width="{len(values) * width}" height="{height}"'
        yield f'<svg {size} role="img"><title>{name}</title>{"".join(bars)}</svg>'


class Table(TabularResult):
    """A result that is a table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self) -> pa.Table:
        """Return the result as a pyarrow table."""
        return self._table

    def __len__(self) -> int:
        return int(self._table.num_rows)


def _text(value: str) -> str:
    return escape(printable(value))


def _cell(value: Any) -> str:
    return _text(f"{value:z.4g}" if isinstance(value, float) else "" if value is None else str(value))
