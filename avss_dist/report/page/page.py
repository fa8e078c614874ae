"""A warehouse as one page that needs no network: findings, runs, charts with controls, and a table."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from avss_dist import __version__
from avss_dist.analysis.across import in_training
from avss_dist.analysis.compare import differing, with_conditions
from avss_dist.analysis.findings import findings
from avss_dist.analysis.labels import run_labels
from avss_dist.analysis.removal import without_layers
from avss_dist.analysis.verdict import describe_task
from avss_dist.core.registry import FROM_ACTIVATIONS, SCORES
from avss_dist.core.text import basename, printable
from avss_dist.report.chart import drawing_library
from avss_dist.report.output import map_leaves, write_file
from avss_dist.report.page.chapters import Chapter, chapters
from avss_dist.report.page.charts import page_charts, section_chart
from avss_dist.report.page.data import page_data
from avss_dist.report.page.matrix import MIN_RUNS, matrix_data
from avss_dist.report.page.summary import in_short, is_published
from avss_dist.report.section import page_number
from avss_dist.report.table import ReportColumn, ReportTable
from avss_dist.warehouse.reader import Warehouse

COMPRESSION = 6  # of gzip; 9 takes three times as long and saves little
LINES = 40  # of a kind of finding; the others are counted
MAX_RUNS = 40  # runs that a page draws, the newest; all are in its overview
OVERVIEW = {
    "model": "model",
    "status": "status",
    "error": "error",
    "family": "family",
    "dtype": "dtype",
    "corpus": "corpus",
    "num_layers": "layers",
    "num_tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "run_id": "run",
    "revision": "revision",
}
"""Columns of ``runs`` that the overview shows, and their titles."""
_NUMBERS = ("num_tokens", "num_layers", "tokens_per_second")
_FORMATS = {**dict.fromkeys(_NUMBERS, "{:,.0f}".format), "model": basename, "corpus": basename}


def save_report(warehouse: Warehouse, path: Path, run_ids: Collection[str] | None = None) -> None:
    """Write `report_page` to a file.

    Raises:
        AvssError: the file cannot be written.
        WarehouseError: as `Store.table`.
    """
    write_file(path, report_page(warehouse, run_ids).encode())


def report_page(warehouse: Warehouse, run_ids: Collection[str] | None = None) -> str:
    """Return an HTML page of the runs (all of them by default) that contains everything it needs.

    Names are text to it: the template escapes them, its data is base64 of compressed JSON, its script only sets
    texts. A policy in the page forbids every connection and every script but its own, by their hashes.
    """
    rows = warehouse.runs().to_pylist(maps_as_pydicts="lossy")
    rows = sorted((r for r in rows if run_ids is None or r["run_id"] in run_ids), key=_by_model)
    done = [row for row in rows if row["status"] == "done"]
    drawn = _newest(done)
    without = without_layers(warehouse, drawn)
    data = page_data(warehouse, drawn, without)
    labels = [run["label"] for run in data["runs"]]
    of_run = {row["run_id"]: label for row, label in zip(drawn, labels, strict=True)}
    # This and what follows complete `damaged`.
    rows_of_findings = findings(warehouse, run_ids=list(of_run)).to_pylist()
    experiments = warehouse.table("experiments", run_ids=list(of_run)).sort_by("created_at").to_pylist()
    named = [{**row, "task": describe_task(row["task"])} for row in reversed(experiments)]
    about_runs = chapters(warehouse, drawn, of_run, experiments)
    pictures = _pictures(about_runs)
    matrix = _matrix(warehouse, done)
    has_scores, has_charts = bool(data["choices"]), bool(data["choices"] or pictures or matrix)
    style, script = _part("page.css"), _part("matrix.js") + _part("page.js")
    library = Markup(drawing_library() if has_charts else "")
    return _template("page.html").render(
        html_table=html_table,
        policy=_policy(style, script, library),
        style=style,
        script=script,
        library=library,
        has_scores=has_scores,
        data=_packed({**data, "charts": page_charts(), "pictures": pictures, "matrix": matrix}) if has_charts else "",
        matrix=bool(matrix),
        has=_known_charts(data),
        scores={name: SCORES[name] for name in FROM_ACTIVATIONS},
        version=__version__,
        warehouse=warehouse.root,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=_summary(len(done), len(rows) - len(done)),
        short=in_short(drawn, of_run, rows_of_findings, without, named),
        findings=_findings(rows_of_findings, of_run),
        chapters=about_runs,
        overview=_overview(_with_unreadable(rows, warehouse.damaged, run_ids), of_run),
        labels=labels,
        not_drawn=len(done) - len(drawn),
        differing=differing([with_conditions(run) for run in drawn]),
    )


def _matrix(warehouse: Warehouse, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the data of the matrix of many runs; None for few."""
    return matrix_data(warehouse, done, run_labels(done)) if len(done) >= MIN_RUNS else None


def _known_charts(data: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether there is data for each chart that few warehouses have."""
    return {name: any(run[name] for run in data["without"]) for name in ("blocks", "kept")}


def _pictures(about_runs: Sequence[Chapter]) -> dict[str, Any]:
    """Return the specification, the data and the run of each chart of a section, by the chart's name."""
    return {
        chart.name: {
            "spec": section_chart(chart),
            "rows": map_leaves(list(chart.rows), _finite),
            "label": section.label,
            "meaning": chart.meaning,
        }
        for chapter in about_runs
        for section in chapter.sections
        for chart in section.charts
    }


def _finite(value: Any) -> Any:
    """Return a value for JSON: printable text, and None for NaN and infinity."""
    if isinstance(value, str):
        return printable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_unreadable(
    rows: Sequence[Mapping[str, Any]], damaged: Mapping[str, str], run_ids: Collection[str] | None
) -> list[Mapping[str, Any]]:
    """Return the rows of the overview, followed by rows for the runs that cannot be read."""
    reasons = {run_id: damaged[run_id] for run_id in sorted(damaged) if run_ids is None or run_id in run_ids}
    empty = dict.fromkeys(OVERVIEW)
    return [
        *(row for row in rows if row["run_id"] not in reasons),
        *({**empty, "run_id": run_id, "status": "unreadable", "error": why} for run_id, why in reasons.items()),
    ]


def _newest(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the newest `MAX_RUNS` runs, in the given order."""
    newest = sorted((str(row["created_at"]), row["run_id"]) for row in runs)[-MAX_RUNS:]
    return [row for row in runs if (str(row["created_at"]), row["run_id"]) in newest]


def _by_model(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the sort key of a run: finished before failed, then family, model, and position in its training."""
    return (run["status"] != "done", str(run["family"]), str(run["series"] or run["model"]), *in_training(run))


def _summary(done: int, failed: int) -> str:
    runs = f"{done} run{'' if done == 1 else 's'}"
    return f"{runs} and {failed} that failed" if failed else runs


def html_table(table: ReportTable, label: str) -> Markup:
    """Return a table as HTML, with buttons in its head that sort it and a button that saves it.

    Args:
        label: subject of the table, such as the run, for screen readers.
    """
    return Markup(_template("table.html").render(table=table, label=label))


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable)
    return environment.from_string(_part(name))


def _printable(value: Any) -> Any:
    """Return a text in printable form, so that no name changes the direction of the text after it."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


@cache
def _part(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, *scripts: str) -> str:
    """Return a Content-Security-Policy that allows this style and these scripts, and nothing from outside."""
    allowed = " ".join(_hash(script) for script in scripts if script)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _packed(data: Mapping[str, Any]) -> str:
    """Return data as compressed JSON in base64: forty runs at a hundred choices have a few hundred thousand numbers."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), COMPRESSION, mtime=0)).decode()


def _overview(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> ReportTable:
    """Return the table of runs, without columns in which no run has a value."""
    known = [name for name in OVERVIEW if any(row[name] is not None for row in rows)]
    numbers = [page_number(labels.get(row["run_id"], "")) or None for row in rows]
    return ReportTable(
        name="runs",
        title="Each run, failed ones too; its number is its name in the charts",
        columns=[
            ReportColumn("#", numbers),
            *(
                ReportColumn(
                    OVERVIEW[name],
                    [row[name] for row in rows],
                    _FORMATS.get(name, str),
                    number=name in _NUMBERS,
                    name=name,
                )
                for name in known
            ),
        ],
        marked=[row["status"] != "done" for row in rows],
        mark="failed",
    )


def _findings(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return findings by kind, in order; a run shows its first finding of a kind, and the other readings with it."""
    kinds: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: not is_published(row)):
        kinds.setdefault(row["kind"], {}).setdefault(row["run_id"], []).append(row)
    return [_finding(kind, by_run, labels) for kind, by_run in kinds.items()]


def _finding(kind: str, by_run: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, str]) -> dict[str, Any]:
    first = next(iter(by_run.values()))[0]
    ordered = sorted(by_run, key=list(labels).index)
    return {
        "title": kind.replace("_", " ").capitalize(),
        "severity": first["severity"],
        "example": _line(labels[first["run_id"]], [first]),
        "runs": f"{len(by_run)} of {len(labels)} runs" if len(labels) > 1 else "",
        "lines": [_line(labels[run_id], by_run[run_id]) for run_id in ordered[:LINES]],
        "more": len(ordered[LINES:]),
    }


def _line(label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    readings = [" ".join(name for name in (row["site"], row["recipe"]) if name) for row in rows]
    return {
        "label": label,
        "reading": readings[0],
        "message": rows[0]["message"],
        "also": ", ".join(dict.fromkeys(readings[1:])),
    }
