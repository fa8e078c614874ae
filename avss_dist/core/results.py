"""Base of results: a table for Arrow, pandas or Polars, a summary, and an HTML preview for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from avss_dist.core.extras import require_package
from avss_dist.core.text import printable

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

# In a notebook
SHOWN_ROWS = 12
SHOWN_COLUMNS = 10
BAR_WIDTH = 6  # pixels, with the gap to the next bar
PICTURE_HEIGHT = 60  # pixels


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

    def to_polars(self) -> pl.DataFrame:
        """Return the table as a Polars data frame.

        Raises:
            ConfigError: polars is not installed.
        """
        require_package("polars", "`to_polars`")
        import polars

        frame = polars.from_arrow(self.table())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def summary(self) -> str:
        """Return a description of the result, in a line."""
        return f"{self.table().num_rows:,} rows"

    def __repr__(self) -> str:
        return printable(f"<{type(self).__name__}: {self.summary()}>")

    def _repr_html_(self) -> str:
        """Return a few rows as HTML, for notebooks. All text is escaped."""
        table = self.table()
        names = table.column_names[:SHOWN_COLUMNS]
        rows = table.slice(0, SHOWN_ROWS).to_pylist()
        html = f"<p>{_text(repr(self))}</p>{self._picture(table)}<table><thead><tr>"
        for name in names:
            html += f"<th>{_text(name)}</th>"
        html += "</tr></thead><tbody>"
        for row in rows:
            cells = [f"<td>{_cell(row[name])}</td>" for name in names]
            html += f"<tr>{''.join(cells)}</tr>"
        html += "</tbody></table>"
        more = table.num_rows - len(rows)
        if more > 0:
            html += f"<p>and {more:,} more rows</p>"
        return html

    def _picture(self, table: pa.Table) -> str:
        """Return an SVG of a numeric column, with a bar for each row. Empty if there is nothing to draw."""
        for name in self._bars:
            if name in table.column_names:
                return _bar_chart(name, table[name].to_pylist())
        return ""


class Table(TabularResult):
    """A result that is a table."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def table(self) -> pa.Table:
        """Return the result as a pyarrow table."""
        return self._table

    def __len__(self) -> int:
        return int(self._table.num_rows)


def _bar_chart(title: str, values: Sequence[float | None]) -> str:
    """Return an SVG with a bar for each value. Empty if no value is positive."""
    heights = []
    for value in values:
        if value and isfinite(value) and value > 0:
            heights.append(value)
        else:
            heights.append(0.0)
    largest = max(heights, default=0.0)
    if largest <= 0:
        return ""
    bars = ""
    for place, value in enumerate(heights):
        height = value / largest * PICTURE_HEIGHT
        left = place * BAR_WIDTH
        top = PICTURE_HEIGHT - height
        size = f'width="{BAR_WIDTH - 1}" height="{height:.1f}"'
        bars += f'<rect x="{left}" y="{top:.1f}" {size} fill="#2a78d6"/>'
    size = f'width="{len(heights) * BAR_WIDTH}" height="{PICTURE_HEIGHT}"'
    return f'<svg {size} role="img"><title>{title}</title>{bars}</svg>'


def _text(value: str) -> str:
    return escape(printable(value))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return _text(f"{value:z.4g}")
    return _text(str(value))
