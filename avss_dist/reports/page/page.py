"""A warehouse as one page that needs no network: a summary, findings, runs, charts with controls, and a table."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from avss_dist import __version__
from avss_dist.analysis.chosen import run_labels
from avss_dist.analysis.comparison import differing, profiles, with_conditions
from avss_dist.analysis.contrast import contrast, contrast_section
from avss_dist.analysis.curves import AXES, Curve, curve_section, curves_of
from avss_dist.analysis.experiments import NewestExperiment, newest_experiments
from avss_dist.analysis.findings import findings
from avss_dist.analysis.scorecard import best_readings, describe_agreement, page_section, score_cards
from avss_dist.analysis.section import ReportColumn, ReportTable, Row, Section, page_number
from avss_dist.analysis.thresholds import at_reading
from avss_dist.analysis.verdict import (
    CLAIMED_KEPT,
    CLAIMED_SHARE,
    claim_in_short,
    describe_task,
    experiment_sections,
    without_layers,
)
from avss_dist.core.errors import DamagedFile, QueryError, named_fields, spell_fields
from avss_dist.core.registry import FROM_ACTIVATIONS, GROUND_TRUTH, RECIPES, SCORES
from avss_dist.core.settings import SITES
from avss_dist.core.text import basename, count_of, printable
from avss_dist.pruning.selection import PUBLISHED
from avss_dist.reports.chart import drawing_library
from avss_dist.reports.output import as_json, map_leaves
from avss_dist.reports.page.charts import page_charts, section_chart
from avss_dist.reports.page.data import MIN_RUNS, matrix_data, page_data
from avss_dist.stats.rankings import count_lowest
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse, grouped

MAX_LISTED = 6  # runs of the summary, and tasks of each
MAX_UNTRIED = 3  # runs without any evaluated removal
NOTHING = "Nothing was left out and evaluated yet: avss ablate --damage, avss plan, avss evaluate; or avss shrink."
HEADLESS = "Not known: the model predicts no next token, so nothing here evaluates it without layers."
MAX_SCORECARDS = 6  # runs
MIN_CURVE, MAX_CURVES = 3, 12  # points of a curve, and curves
CHAPTERS = {
    "curves": (
        "Along an axis",
        "Along training, size and settings",
        "How the ranks of layers by AVSS as published move along the steps of a training, the sizes of a family, or "
        "lengths: avss compare --along shows other scores.",
    ),
    "experiments": (
        "Experiments",
        "Experiments",
        "What models keep without the layers that each method chose: the metric over that of the whole model, or, of "
        "a perplexity, the whole model's over it. Dashed: what the paper claims; dotted: what a guess keeps.",
    ),
    "scorecard": (
        "Score card",
        "Score card",
        "How well each score orders the layers as what leaving them out does to the loss: Spearman's correlation, and "
        "its 95% interval as if other layers had been drawn (Bonett and Wright). Dashed: the ceiling.",
    ),
    "contrasts": (
        "Contrasts",
        "Hallucinated and truthful answers",
        "How layers differ between the two, and whether anything is left of it under the controls. Dots outside of "
        "the gray band differ more than random halves of the truthful answers do; what is the same after another "
        "prompt is about words, not about truth.",
    ),
}
"""Title in the list of contents, heading and lead of each chapter, by its anchor on the page."""
LINES = 40  # of a kind of finding; the others are counted
MAX_RUNS = 40  # runs that a page draws, the newest; all are in its overview
_NUMBER = "{:,.0f}".format
OVERVIEW: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", basename),
    "status": ("status", str),
    "error": ("error", str),
    "family": ("family", str),
    "dtype": ("dtype", str),
    "corpus": ("corpus", basename),
    "num_layers": ("layers", _NUMBER),
    "num_tokens": ("tokens", _NUMBER),
    "tokens_per_second": ("tokens/s", _NUMBER),
    "run_id": ("run", str),
    "revision": ("revision", str),
}
"""Columns of ``runs`` that the overview shows, with their titles and formats."""


def report_page(warehouse: Warehouse, run_ids: Collection[str] | None = None, own: Sequence[str] = ()) -> str:
    """Return an HTML page of the runs (all of them by default) that contains everything it needs.

    Names are text to it: the template escapes them, its data is base64 of compressed JSON, its script only sets
    texts. A policy in the page forbids every connection and every script but its own, by their hashes.
    """
    every = warehouse.runs().to_pylist(maps_as_pydicts="lossy")
    rows = sorted((row for row in every if run_ids is None or row["run_id"] in run_ids), key=_by_model)
    done = [row for row in rows if row["status"] == "done"]
    newest = sorted(done, key=lambda row: (str(row["created_at"]), row["run_id"]))[-MAX_RUNS:]
    drawn = [row for row in done if row in newest]
    without = without_layers(warehouse, drawn)
    data = page_data(warehouse, drawn, without)
    labels = [run["label"] for run in data["runs"]]
    of_run = {row["run_id"]: label for row, label in zip(drawn, labels, strict=True)}
    # This and what follows complete `damaged`.
    rows_of_findings = findings(warehouse, run_ids=list(of_run)).to_pylist()
    experiments = warehouse.table("experiments", run_ids=list(of_run)).to_pylist()
    chapters = {
        "curves": [curve_section(c, f"curve-{number}") for number, c in enumerate(_curves(warehouse, drawn), start=1)],
        "experiments": experiment_sections(experiments, of_run),
        "scorecard": list(_scorecards(warehouse, drawn, of_run, own)),
        "contrasts": list(_contrasts(warehouse, drawn, of_run)),
    }
    pictures = {
        chart.name: {
            "spec": section_chart(chart),
            "rows": map_leaves(
                list(chart.rows), lambda leaf: printable(leaf) if isinstance(leaf, str) else as_json(leaf)
            ),
            "label": section.label,
            "meaning": chart.meaning,
        }
        for sections in chapters.values()
        for section in sections
        for chart in section.charts
    }
    matrix = matrix_data(warehouse, done, run_labels(done)) if len(done) >= MIN_RUNS else None
    has_scores, has_charts = bool(data["choices"]), bool(data["choices"] or pictures or matrix)
    style, script = _part("page.css"), _part("matrix.js") + _part("page.js")
    library = Markup(drawing_library() if has_charts else "")
    damaged = {
        run_id: warehouse.damaged[run_id]
        for run_id in sorted(warehouse.damaged)
        if run_ids is None or run_id in run_ids
    }
    overview = [
        *(row for row in rows if row["run_id"] not in damaged),
        *(
            {**dict.fromkeys(OVERVIEW), "run_id": run_id, "status": "unreadable", "error": str(damage)}
            for run_id, damage in damaged.items()
        ),
    ]
    failed = len(rows) - len(done)
    page = templates().get_template("page.html")
    return page.render(
        policy=_policy(style, script, library),
        style=style,
        script=script,
        library=library,
        has_scores=has_scores,
        data=_packed({**data, "charts": page_charts(), "pictures": pictures, "matrix": matrix}) if has_charts else "",
        matrix=bool(matrix),
        has={name: any(run[name] for run in data["without"]) for name in ("blocks", "kept")},
        scores={name: SCORES[name] for name in FROM_ACTIVATIONS},
        version=__version__,
        warehouse=warehouse.root,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=count_of(len(done), "run") + (f" and {failed} that failed" if failed else ""),
        short=in_short(warehouse, drawn, of_run, rows_of_findings, without, newest_experiments(experiments)),
        findings=_findings(rows_of_findings, of_run),
        chapters=[(name, *CHAPTERS[name], sections) for name, sections in chapters.items() if sections],
        overview=_overview(overview, of_run),
        labels=labels,
        not_drawn=len(done) - len(drawn),
        differing=differing([with_conditions(run) for run in drawn]),
    )


def _by_model(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the sort key of a run: finished before failed, then family, model, and position in its training."""
    model, progress = str(run["series"] or run["model"]), (run["training_step"] or 0, run["training_tokens"] or 0)
    return (run["status"] != "done", str(run["family"]), model, *progress, str(run["created_at"]), run["run_id"])


@cache
def templates() -> jinja2.Environment:
    """Return the templates of the page and of its tables. They escape all texts."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
    )


def _plain(value: Any) -> Any:
    """Return a text as it is shown: no name changes the direction of the text after it, or is in backticks."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = printable(value)
    return spell_fields(text, {field: field for field in named_fields(text)})


@cache
def _part(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, *scripts: str) -> str:
    """Return a Content-Security-Policy that allows this style and these scripts, and nothing from outside."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, *scripts) if text]
    of_style, *of_scripts = (f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {' '.join(of_scripts)}; style-src {of_style}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _packed(data: Mapping[str, Any]) -> str:
    """Return data as compressed JSON in base64: forty runs at a hundred choices have a few hundred thousand numbers."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Level 9 takes three times as long and saves little.
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _overview(rows: Sequence[Row], labels: Mapping[str, str]) -> ReportTable:
    """Return the table of runs, without columns in which no run has a value."""
    return ReportTable(
        name="runs",
        title="Each run, failed ones too; its number is its name in the charts",
        columns=[
            ReportColumn("#", [page_number(labels.get(row["run_id"], "")) or None for row in rows]),
            *(
                ReportColumn(title, [row[name] for row in rows], format_, number=format_ is _NUMBER, name=name)
                for name, (title, format_) in OVERVIEW.items()
                if any(row[name] is not None for row in rows)
            ),
        ],
        marked=[row["status"] != "done" for row in rows],
        mark="failed",
    )


def _findings(rows: Sequence[Row], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return findings by kind, in order.

    A run shows its first finding of a kind, and the other readings with it.
    """
    described = []
    published_first = sorted(rows, key=lambda row: not is_published(row))
    for kind, of_kind in grouped(published_first, itemgetter("kind")).items():
        first, by_run = of_kind[0], grouped(of_kind, itemgetter("run_id"))
        ordered = sorted(by_run, key=list(labels).index)
        described.append(
            {
                "title": kind.replace("_", " ").capitalize(),
                "severity": first["severity"],
                "example": _line(labels[first["run_id"]], [first]),
                "runs": f"{len(by_run)} of {len(labels)} runs" if len(labels) > 1 else "",
                "lines": [_line(labels[run_id], by_run[run_id]) for run_id in ordered[:LINES]],
                "more": len(ordered[LINES:]),
            }
        )
    return described


def _line(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    readings = [" ".join(name for name in (row["site"], row["recipe"]) if name) for row in rows]
    return {
        "label": label,
        "reading": readings[0],
        "message": rows[0]["message"],
        "also": ", ".join(dict.fromkeys(readings[1:])),
    }


def _curves(warehouse: Warehouse, runs: Sequence[Row]) -> list[Curve]:
    """Return the longest curves of runs, each set of runs once."""
    site, recipe, value, kind = PUBLISHED
    scored = profiles(
        warehouse,
        list(map(with_conditions, runs)),
        site=site,
        recipe=recipe,
        threshold=Threshold(value=value, kind=kind),
    )
    curves = [curve for along in AXES for curve in curves_of(scored, along) if len(curve.runs) >= MIN_CURVE]
    by_runs = grouped(curves, lambda curve: tuple(run["run_id"] for run in curve.runs))
    return sorted((first for first, *_ in by_runs.values()), key=lambda curve: -len(curve.runs))[:MAX_CURVES]


def _scorecards(
    warehouse: Warehouse, runs: Sequence[Row], labels: Mapping[str, str], own: Sequence[str] = ()
) -> Iterator[Section]:
    """Yield the score cards of the first runs whose ground truth is known."""
    tasks = tuple(SCORES[name].task for name in GROUND_TRUTH)
    revisions = pa.array(sorted({run["revision"] for run in runs} - {None}), pa.string())
    rows = warehouse.table("evaluations", where=pc.field("revision").isin(revisions), columns=["revision", "task"])
    evaluated = {row["revision"] for row in rows.to_pylist() if row["task"].startswith(tasks)}
    measured = [run for run in runs if run["revision"] in evaluated][:MAX_SCORECARDS]
    cards = score_cards(warehouse, measured, own)
    cards = cards.filter(cards["format"].is_null())
    best = best_readings(cards)
    for run in measured:
        of_run = cards.filter(pc.equal(cards["run_id"], run["run_id"]))
        readings = of_run.filter(pc.equal(of_run["score"], "avss")).num_rows
        rows = best.filter(pc.equal(best["run_id"], run["run_id"])).to_pylist()
        if section := page_section(labels[run["run_id"]], rows, run["num_layers"], readings):
            yield section


def _contrasts(warehouse: Warehouse, runs: Sequence[Row], labels: Mapping[str, str]) -> Iterator[Section]:
    """Yield the contrast of each run on paired text, at the published reading."""
    strata = warehouse.table("stratum_stats", run_ids=[run["run_id"] for run in runs], columns=["run_id"])
    paired = {*strata["run_id"].to_pylist()}
    for run in (run for run in runs if run["run_id"] in paired):
        label = labels[run["run_id"]]
        try:
            result = contrast(warehouse, run, site=(run["sites"] or ["block"])[0])
        except (QueryError, DamagedFile) as error:
            yield Section(label=label, sentences=[f"{error.message} {error.hint or ''}"])
        else:
            yield contrast_section(label, result)


def in_short(
    warehouse: Warehouse,
    runs: Sequence[Row],
    labels: Mapping[str, str],
    findings: Sequence[Row],
    without: Sequence[Row],
    experiments: Mapping[str, NewestExperiment],
) -> list[dict[str, Any]]:
    """Return answers to the questions about a few runs, for the template. Runs with evaluated removals come first.

    Args:
        runs: rows of ``runs``.
        labels: labels by run id.
        findings: rows of `findings`.
        without: by run, see `without_layers`.
        experiments: newest experiments by run id.
    """
    with_sets = [(run, measured["sets"]) for run, measured in zip(runs, without, strict=True)]
    evaluated = [pair for pair in with_sets if pair[1] or pair[0]["run_id"] in experiments]
    untried = [pair for pair in with_sets if pair not in evaluated]
    summaries = []
    for run, sets in [*evaluated, *untried[:MAX_UNTRIED]][:MAX_LISTED]:
        kinds = dict.fromkeys(
            row["kind"].replace("_", " ") for row in findings if row["run_id"] == run["run_id"] and is_published(row)
        )
        largest, of_claim, size = [], [], count_lowest(run["num_layers"] or 0)
        for task, of_task in list(grouped(sets, itemgetter("series")).items())[:MAX_LISTED]:
            if enough := [removed for removed in of_task if removed["kept"] >= CLAIMED_KEPT]:
                chosen = max(enough, key=lambda removed: removed["size"])
                largest.append(f"{task}: {chosen['size']:g} layers ({chosen['dropped']}), {chosen['kept']:z.0%} kept.")
            else:
                chosen = max(of_task, key=lambda removed: removed["kept"])
                largest.append(
                    f"{task}: no set that was evaluated; without {chosen['dropped']}, {chosen['kept']:z.0%} is kept."
                )
            for removed in (removed for removed in of_task if removed["size"] == size):
                of_claim.append(f"{task}: {removed['kept']:z.0%} at best, without {removed['dropped']}.")
        if experiment := experiments.get(run["run_id"]):
            of_claim += claim_in_short([{**row, "task": describe_task(row["task"])} for row in experiment.rows])
        scored = warehouse.table("scores", run_ids=[run["run_id"]], where=at_reading(*PUBLISHED)).to_pylist()
        answers = {
            "Can AVSS be believed?": [
                f"{count_of(len(kinds), 'finding')} against it: {', '.join(kinds)}."
                if kinds
                else "No finding warns of it.",
                *describe_agreement(warehouse, run, scored),
            ],
            f"How many layers can go at {CLAIMED_KEPT:.0%} kept?": largest or [NOTHING if has_head(run) else HEADLESS],
            f"What is kept without {CLAIMED_SHARE:.0%} of them?": of_claim or ["No such set was evaluated yet."],
        }
        summaries.append({"label": labels[run["run_id"]], "answers": answers})
    return summaries


def is_published(finding: Row) -> bool:
    """Whether a finding concerns AVSS as published, or the whole run."""
    return finding["site"] in (None, SITES[0]) and finding["recipe"] in (None, RECIPES[0])
