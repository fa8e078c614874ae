"""Section of a run's continuations: for each prompt, what the whole model and the smaller ones wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avss_dist.report.section import Section, page_number
from avss_dist.report.table import ReportColumn, ReportTable

LONGEST = 240  # characters of a prompt in a title; a prompt of the user may be long
Row = Mapping[str, Any]  # of the table `continuations`


def continuations_section(label: str, rows: Sequence[Row]) -> Section:
    """Return the continuations of one run.

    Args:
        rows: rows of ``continuations``, the newest last.
    """
    tables = continuation_tables(rows, f"continuations-{page_number(label)}")
    return Section(label=label, tables=tables)


def continuation_tables(rows: Sequence[Row], name: str = "continuations") -> list[ReportTable]:
    """Return a table for each prompt, with a row for each model. The last of equally named models counts.

    Args:
        name: base name of the tables.
    """
    by_prompt: dict[str, dict[str, str]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {})[row["variant"]] = row["text"]
    return [
        ReportTable(
            name=f"{name}-{number}",
            title=f"Greedy continuation of: {_on_one_line(prompt, LONGEST)}",
            columns=[
                ReportColumn("model", list(texts), number=False, wraps=True, name="variant"),
                ReportColumn(
                    "continuation",
                    [_on_one_line(text) for text in texts.values()],
                    number=False,
                    wraps=True,
                    name="continuation",
                ),
            ],
        )
        for number, (prompt, texts) in enumerate(by_prompt.items(), 1)
    ]


def _on_one_line(text: str, longest: int | None = None) -> str:
    """Return a text with its whitespace reduced to single spaces, the end alone if it is longer."""
    line = " ".join(text.split())
    return line if longest is None or len(line) <= longest else f"... {line[-longest:]}"
