"""Sections: one description, of which the terminal and the page show the same texts, and charts that can be drawn."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from rich.console import Console
from support.warehouses import unpack_released

from avss_dist.analysis.experts import LayerExperts
from avss_dist.report.experiments import experiment_sections
from avss_dist.report.experts import experts_section
from avss_dist.report.page.charts import section_chart
from avss_dist.report.page.page import html_table, report_page
from avss_dist.report.section import (
    BarColumn,
    ReportColumn,
    ReportTable,
    Section,
    decimals,
    interval,
    known_interval,
    p_value,
    percent,
)
from avss_dist.report.terminal.tables import FittedTable, rendered
from avss_dist.warehouse.reader import Warehouse

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m"


def row(method: str, share: float | None, value: float, **other: Any) -> dict[str, Any]:
    """A row of ``experiments`` on the loss of a text; the whole model's loss is 3."""
    columns = dict.fromkeys(("control", "repair", "patch", "factor", "site", "recipe", "threshold"))
    about = {"run_id": "a-1", "model": "org/a", "task": "perplexity:x/text.txt", "metric": "loss", "drop": []}
    retention = float(np.exp(3 - value))
    ends = {"retention_low": retention - 0.01, "retention_high": retention + 0.01}
    score = {"score": None if method == "whole model" else "avss", "method": method, "share": share, "value": value}
    return {**columns, "threshold_kind": None, **about, **score, "retention": retention, **ends, **other}


def experiment(method: str = "avss") -> list[dict[str, Any]]:
    return [
        row("whole model", 0.0, 3.0),
        row(method, 0.25, 3.2, drop=[1, 2, 10003]),
        row(method, 0.5, 4.0, drop=[0, 1, 2, 3], retention_low=None, retention_high=None),
    ]


def sections(name: str = "avss") -> list[Section]:
    """An experiment, and routed experts."""
    (experiments,) = experiment_sections(experiment(name), {"a-1": "1. a"})
    load = np.array([0.5, 0.5, 0.0])
    layers = [LayerExperts(1, load, load, load, load, 0.6, float("nan"), 1)]
    return [
        experiments,
        experts_section("1. a", {"num_tokens": 64, "corpus": name}, layers),
    ]


class Tables(HTMLParser):
    """The texts of every table of a page, by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("td", "th") or (self._cell and tag in ("span", "button"))

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def page_tables(tables: tuple[ReportTable, ...]) -> list[list[list[str]]]:
    return Tables("".join(html_table(table, "a run") for table in tables)).tables


def printed(renderable: Any, width: int = 400) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue()


def test_a_terminal_and_a_page_show_the_same_texts() -> None:
    tables = tuple(table for section in sections() for table in section.tables)
    assert len(tables) == 2
    for table, (headings, *rows) in zip(tables, page_tables(tables), strict=True):
        lines = [re.split(" *[│┃] *", line)[1:-1] for line in printed(FittedTable(table)).splitlines() if "│" in line]
        bars = [i for i, column in enumerate(table.columns) if isinstance(column, BarColumn)]
        texts = [[text.strip("- ") for i, text in enumerate(line) if i not in bars] for line in lines]
        assert texts == rows
        assert headings == [f"{c.group}: {c.heading}" if c.group else c.heading for c in table.values]


def test_a_table_of_an_experiment_names_sublayers_and_says_why_an_interval_is_missing() -> None:
    (table,) = sections()[0].tables
    (tables,) = page_tables((table,))
    assert tables[1:] == [
        ["whole model", "0%", "", "20.09", "", ""],
        ["avss", "25%", "1-2, attention.3", "24.53", "81.9%", "80.9% to 82.9%"],
        ["avss", "50%", "0-3", "54.6", "36.8%", ""],
    ]
    assert "No interval" in table.caption


def test_every_chart_of_a_section_can_be_drawn() -> None:
    charts = [chart for section in sections() for chart in section.charts]
    assert [chart.name for chart in charts] == [
        *("experiment-1-1", "experiment-1-2"),
    ]
    for chart in charts:
        json.dumps(list(chart.rows), allow_nan=False)
        spec = section_chart(chart) | {"datasets": {"rows": list(chart.rows)}, "width": 400}
        svg = vl_convert.vegalite_to_svg(spec)
        assert svg.count("<path") > len(chart.rows), chart.name


def test_no_name_of_a_section_is_markup_or_steers_a_terminal() -> None:
    text = printed(rendered(*sections(HOSTILE)))
    assert "\x1b" not in text and "\ufffd[31m" in text
    for section in sections(HOSTILE):
        page = "".join(html_table(table, section.label) for table in section.tables)
        assert "<img" not in page and "\x1b" not in page
    assert "<img" in unescape(page_tables(tuple(sections(HOSTILE)[0].tables))[0][2][0])


def test_the_page_has_every_chart_and_table_of_its_sections(tmp_path: Path) -> None:
    warehouse = Warehouse(unpack_released(tmp_path))
    page = report_page(warehouse)
    named = re.findall(r'data-chart="(experiment[^"]*)"', page)
    assert named and len(set(named)) == len(named)
    rows = warehouse.table("experiments").sort_by("created_at").to_pylist()
    (section,) = experiment_sections([one for one in rows if one["run_id"] == rows[0]["run_id"]])
    shown = next(table for table in Tables(page).tables if table[0][:1] == ["layers chosen by"])
    assert [line[0] for line in shown[1:]] == section.tables[0].values[0].values


def test_columns_format_missing_values_intervals_and_booleans() -> None:
    ends = ReportColumn("x", [known_interval(0.1, 0.2), known_interval(None, 1)], interval(percent(0)))
    assert (ends.text(0), ends.sort_key(0)) == ("10% to 20%", 0.1)
    assert (ends.text(1), ends.sort_key(1)) == ("", "")
    assert known_interval(0.0, float("nan")) is None
    numbers = ReportColumn("y", [-0.0001, float("nan"), None, True], decimals(3))
    assert [numbers.text(i) for i in range(3)] == ["0.000", "", ""] and numbers.sort_key(3) == 1
    assert [p_value(p) for p in (0.0123, 0.0001)] == ["0.012", "<0.001"]
    pair = ReportColumn("z", [(2, 0.5)], lambda value: f"{value[0]} ({value[1]:.0%})", number=False)
    assert pair.sort_key(0) == "2 (50%)"


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_terminal_leaves_out_what_matters_least(width: int) -> None:
    (table,) = sections()[0].tables
    lines = printed(FittedTable(table), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("81.9%" in line for line in lines)
    assert ("No room for: dropped, text.txt perplexity" in " ".join(lines)) == (width == 60)
