"""A warehouse as one page that needs no network: a summary, findings, runs, charts with controls, and a table."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from avss_dist import __version__
from avss_dist.analysis.changes import Reading, ShardScores
from avss_dist.analysis.chosen import run_labels
from avss_dist.analysis.compared import compared_sections
from avss_dist.analysis.comparison import differing, profiles, with_conditions
from avss_dist.analysis.contrast import contrast, contrast_section
from avss_dist.analysis.curves import (
    AXES,
    TRAINING,
    Curve,
    curve_section,
    curves_of,
    seed_maps_section,
    with_changes,
    with_differences,
)
from avss_dist.analysis.experiments import NewestExperiment, newest_experiments
from avss_dist.analysis.findings import findings
from avss_dist.analysis.scorecard import best_readings, describe_agreement, page_section, score_cards
from avss_dist.analysis.section import ReportColumn, ReportRow, ReportTable, Section, page_number
from avss_dist.analysis.seeds import join_seeds
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
from avss_dist.core.sites import SITES
from avss_dist.core.text import basename, count_of, printable
from avss_dist.core.values import NewObject, NewRow, TableRow
from avss_dist.plans.criteria import PUBLISHED
from avss_dist.reports.chart import drawing_library
from avss_dist.reports.output import as_json, map_leaves
from avss_dist.reports.page.charts import page_charts, section_chart
from avss_dist.reports.page.data import MIN_RUNS, matrix_data, page_data
from avss_dist.stats.catalog import FROM_ACTIVATIONS, GROUND_TRUTH, RECIPES, SCORES
from avss_dist.stats.rankings import count_lowest
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse, grouped

MAX_LISTED = 6  # runs of the summary, and tasks of each
MAX_UNTRIED = 3  # runs without any evaluated removal
NOTHING = "Nothing was left out and evaluated yet: avss ablate --damage, avss plan, avss evaluate; or avss shrink."
HEADLESS = "Not known: the model predicts no next token, so nothing here evaluates it without layers."
MAX_SCORECARDS = 6  # runs
MIN_CURVE = 3  # points of a curve
MAX_CURVES = 12


class Chapter(NamedTuple):
    """Texts of a chapter.

    Attributes:
        title: title in the list of contents.
        heading: heading on the page.
        lead: explanation below it.
    """

    title: str
    heading: str
    lead: str


CHAPTERS = {
    "curves": Chapter(
        title="Along an axis",
        heading="Along training, size and settings",
        lead=(
            "How the ranks of layers by AVSS as published move along the steps of a training, the sizes of a family, "
            "or lengths: avss compare --along shows other scores."
        ),
    ),
    "experiments": Chapter(
        title="Experiments",
        heading="Experiments",
        lead=(
            "What models keep without the layers that each method chose: the metric over that of the whole model, or, "
            "of a perplexity, the whole model's over it. Dashed: what the paper claims; dotted: what a guess keeps."
        ),
    ),
    "compared": Chapter(
        title="Models against each other",
        heading="Models against each other",
        lead=(
            "Models that were evaluated with the same samples, best first. Samples that are hard for one are hard for "
            "the other, too, so that their difference is known better than either value. If its interval contains 0, "
            "the order of the two may be chance."
        ),
    ),
    "scorecard": Chapter(
        title="Score card",
        heading="Score card",
        lead=(
            "How well each score orders the layers as what leaving them out does to the loss: Spearman's correlation, "
            "and its 95% interval as if other layers had been drawn (Bonett and Wright). Dashed: the ceiling."
        ),
    ),
    "contrasts": Chapter(
        title="Contrasts",
        heading="Hallucinated and truthful answers",
        lead=(
            "How layers differ between the two, and whether anything is left of it under the controls. Dots outside of "
            "the gray band differ more than random halves of the truthful answers do; what is the same after another "
            "prompt is about words, not about truth."
        ),
    ),
}
"""Chapters by their anchor on the page."""
LINES = 40  # of a kind of finding; the others are counted
MAX_RUNS = 40  # runs that a page draws, the newest; all are in its overview
_NUMBER = "{:,.0f}".format
OVERVIEW = (
    ReportColumn("model", "model", basename, number=False, name="model"),
    ReportColumn("status", "status", number=False, name="status"),
    ReportColumn("error", "error", number=False, name="error"),
    ReportColumn("family", "family", number=False, name="family"),
    ReportColumn("dtype", "dtype", number=False, name="dtype"),
    ReportColumn("corpus", "corpus", basename, number=False, name="corpus"),
    ReportColumn("layers", "num_layers", _NUMBER, name="num_layers"),
    ReportColumn("tokens", "num_tokens", _NUMBER, name="num_tokens"),
    ReportColumn("tokens/s", "tokens_per_second", _NUMBER, name="tokens_per_second"),
    ReportColumn("run", "run_id", number=False, name="run_id"),
    ReportColumn("revision", "revision", number=False, name="revision"),
)
"""Columns of ``runs`` that the overview shows, if a run has a value."""


def report_page(warehouse: Warehouse, run_ids: Collection[str] | None = None, own: Sequence[str] = ()) -> str:
    """Return an HTML page of the runs (all of them by default) that contains everything it needs.

    Names are text to it: the template escapes them, its data is base64 of compressed JSON, its script only sets
    texts. A policy in the page forbids every connection and every script but its own, by their hashes.
    """
    rows = _rows_of_runs(warehouse, run_ids)
    done = [row for row in rows if row["status"] == "done"]
    drawn = _newest(done)
    without = without_layers(warehouse, drawn)
    data = page_data(warehouse, drawn, without)
    labels = [run["label"] for run in data["runs"]]
    drawn_ids = [row["run_id"] for row in drawn]
    label_of_run = dict(zip(drawn_ids, labels, strict=True))
    # Each table that is read from here on may add to `warehouse.damaged`.
    rows_of_findings = findings(warehouse, run_ids=drawn_ids).to_pylist()
    experiments = warehouse.table("experiments", run_ids=drawn_ids).to_pylist()
    sections = {
        "curves": _curve_sections(warehouse, drawn),
        "experiments": experiment_sections(experiments, label_of_run),
        "compared": compared_sections(warehouse, None if run_ids is None else {row["revision"] for row in rows}),
        "scorecard": list(_scorecards(warehouse, drawn, label_of_run, own)),
        "contrasts": list(_contrasts(warehouse, drawn, label_of_run)),
    }
    short = in_short(warehouse, drawn, label_of_run, rows_of_findings, without, newest_experiments(experiments))
    matrix = None
    if len(done) >= MIN_RUNS:
        matrix = matrix_data(warehouse, done, run_labels(done))
    pictures = _pictures(sections)
    drawn_data: NewObject = {}
    if data["choices"] or pictures or matrix:
        drawn_data = {**data, "charts": page_charts(), "pictures": pictures, "matrix": matrix}
    about = {
        "version": __version__,
        "warehouse": warehouse.root,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "summary": _summary(len(done), len(rows) - len(done)),
    }
    conditions = [with_conditions(run) for run in drawn]
    all_rows = _with_damaged(rows, warehouse, run_ids)
    contents = {
        "has_scores": bool(data["choices"]),
        "matrix": bool(matrix),
        "has": _has_rows(data["without"]),
        "scores": {name: SCORES[name] for name in FROM_ACTIVATIONS},
        "short": short,
        "findings": _findings(rows_of_findings, label_of_run),
        "chapters": _chapters(sections),
        "overview": _overview(all_rows, label_of_run),
        "labels": labels,
        "not_drawn": len(done) - len(drawn),
        "differing": differing(conditions),
    }
    return templates().get_template("page.html").render(**_assets(drawn_data), **about, **contents)


def _rows_of_runs(warehouse: Warehouse, run_ids: Collection[str] | None) -> list[TableRow]:
    """Return the rows of ``runs`` that the page is about, in its order."""
    rows = []
    for row in warehouse.runs().to_pylist(maps_as_pydicts="lossy"):
        if run_ids is None or row["run_id"] in run_ids:
            rows.append(row)
    return sorted(rows, key=_by_model)


def _newest(runs: Sequence[TableRow]) -> list[TableRow]:
    """Return the newest runs, as many as the page draws, in the order given."""
    by_age = sorted(runs, key=lambda row: (str(row["created_at"]), row["run_id"]))
    newest = by_age[-MAX_RUNS:]
    return [row for row in runs if row in newest]


def _assets(drawn_data: NewObject) -> dict[str, str]:
    """Return the style, the scripts and the data of the page, and its policy.

    Args:
        drawn_data: what the scripts draw; empty if there is nothing to draw.
    """
    style = _part("page.css")
    script = _part("matrix.js") + _part("page.js")
    library = Markup("")
    packed = ""
    if drawn_data:
        library = Markup(drawing_library())
        packed = _packed(drawn_data)
    return {
        "policy": _policy(style, script, library),
        "style": style,
        "script": script,
        "library": library,
        "data": packed,
    }


def _has_rows(without: Sequence[TableRow]) -> dict[str, bool]:
    """Return whether there is anything to draw of blocks of layers, and of what is kept without layers.

    Args:
        without: by run, see `page_data`.
    """
    return {
        "blocks": any(run["blocks"] for run in without),
        "kept": any(run["kept"] for run in without),
    }


def _pictures(chapters: Mapping[str, Sequence[Section]]) -> NewObject:
    """Return the charts of all sections by name, ready for JSON."""
    pictures = {}
    for sections in chapters.values():
        for section in sections:
            for chart in section.charts:
                pictures[chart.name] = {
                    "spec": section_chart(chart),
                    "rows": map_leaves(list(chart.rows), _as_json_text),
                    "label": section.label,
                    "meaning": chart.meaning,
                }
    return pictures


def _as_json_text(leaf: object) -> object:
    """Return a value ready for JSON, and a text without characters that change the direction of others."""
    if isinstance(leaf, str):
        return printable(leaf)
    return as_json(leaf)


class PageChapter(NamedTuple):
    """A chapter with its sections, as the template shows it.

    Attributes:
        anchor: its anchor on the page.
        title, heading, lead: see `Chapter`.
        sections: its sections.
    """

    anchor: str
    title: str
    heading: str
    lead: str
    sections: Sequence[Section]


def _chapters(sections_by_anchor: Mapping[str, Sequence[Section]]) -> list[PageChapter]:
    """Return the chapters that have sections."""
    chapters = []
    for anchor, sections in sections_by_anchor.items():
        if sections:
            texts = CHAPTERS[anchor]
            chapters.append(PageChapter(anchor, texts.title, texts.heading, texts.lead, sections))
    return chapters


def _summary(num_done: int, num_failed: int) -> str:
    """Return how many runs the page is about."""
    runs = count_of(num_done, "run")
    if num_failed:
        return f"{runs} and {num_failed} that failed"
    return runs


def _with_damaged(rows: Sequence[TableRow], warehouse: Warehouse, run_ids: Collection[str] | None) -> list[TableRow]:
    """Return rows of ``runs``, with a row in place of each run that cannot be read, at the end."""
    damaged = []
    for run_id in sorted(warehouse.damaged):
        if run_ids is None or run_id in run_ids:
            damaged.append(run_id)
    overview = [row for row in rows if row["run_id"] not in damaged]
    for run_id in damaged:
        unreadable: NewRow = {column.key: None for column in OVERVIEW}
        unreadable["run_id"] = run_id
        unreadable["status"] = "unreadable"
        unreadable["error"] = str(warehouse.damaged[run_id])
        overview.append(unreadable)
    return overview


def _by_model(run: TableRow) -> tuple[bool, str, str, int, int, str, str]:
    """Return the sort key of a run: finished before failed, then family, model, and position in its training."""
    return (
        run["status"] != "done",
        str(run["family"]),
        str(run["series"] or run["model"]),
        run["training_step"] or 0,
        run["training_tokens"] or 0,
        str(run["created_at"]),
        run["run_id"],
    )


@cache
def templates() -> jinja2.Environment:
    """Return the templates of the page and of its tables. They escape all texts."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
    )


def _plain(value: object) -> object:
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
    script_hashes = " ".join(_hash_source(script) for script in scripts if script)
    return (
        f"default-src 'none'; script-src {script_hashes}; style-src {_hash_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash_source(text: str) -> str:
    """Return the source expression by which a policy allows a style or a script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _packed(data: TableRow) -> str:
    """Return data as compressed JSON in base64: forty runs at a hundred choices have a few hundred thousand numbers."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Level 9 takes three times as long and saves little.
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _overview(rows: Sequence[TableRow], labels: Mapping[str, str]) -> ReportTable:
    """Return the table of runs, without columns in which no run has a value."""
    columns = [ReportColumn("#", "number")]
    for column in OVERVIEW:
        if any(row[column.key] is not None for row in rows):
            columns.append(column)
    overview = []
    for row in rows:
        number = page_number(labels.get(row["run_id"], "")) or None
        overview.append(ReportRow({**row, "number": number}, is_marked=row["status"] != "done"))
    return ReportTable(
        name="runs",
        title="Each run, failed ones too; its number is its name in the charts",
        columns=columns,
        rows=overview,
        mark="failed",
    )


def _findings(rows: Sequence[TableRow], labels: Mapping[str, str]) -> list[NewObject]:
    """Return findings by kind, in order.

    A run shows its first finding of a kind, and the other readings with it.
    """
    described = []
    published_first = sorted(rows, key=lambda row: not is_published(row))
    for kind, of_kind in grouped(published_first, itemgetter("kind")).items():
        described.append(_findings_of_kind(kind, of_kind, labels))
    return described


def _findings_of_kind(kind: str, rows: Sequence[TableRow], labels: Mapping[str, str]) -> NewObject:
    """Return the findings of a kind: an example, and a line for each run."""
    first = rows[0]
    by_run = grouped(rows, itemgetter("run_id"))
    run_ids = [run_id for run_id in labels if run_id in by_run]
    lines = [_line(labels[run_id], by_run[run_id]) for run_id in run_ids]
    runs = ""
    if len(labels) > 1:
        runs = f"{len(by_run)} of {len(labels)} runs"
    return {
        "title": kind.replace("_", " ").capitalize(),
        "severity": first["severity"],
        "example": _line(labels[first["run_id"]], [first]),
        "runs": runs,
        "lines": lines[:LINES],
        "more": len(lines[LINES:]),
    }


def _line(label: str, rows: Sequence[TableRow]) -> NewObject:
    """Return the first of a run's findings of one kind, with the readings of the others."""
    first, *others = [_reading(row) for row in rows]
    return {
        "label": label,
        "reading": first,
        "message": rows[0]["message"],
        "also": ", ".join(dict.fromkeys(others)),
    }


def _reading(finding: TableRow) -> str:
    """Return the site and the recipe of a finding, as far as it has them."""
    return " ".join(name for name in (finding["site"], finding["recipe"]) if name)


def _curve_sections(warehouse: Warehouse, runs: Sequence[TableRow]) -> list[Section]:
    """Return a section for each group of trainings that differ in the seed alone, and each other curve of runs."""
    site, recipe, value, kind = PUBLISHED
    threshold = Threshold(value=value, kind=kind)
    scores = ShardScores(warehouse, Reading(site=site, recipe=recipe, threshold=threshold, score=FROM_ACTIVATIONS[0]))
    curves = with_changes(scores, _curves(warehouse, runs))
    trainings = [curve for curve in curves if curve.along in TRAINING]
    groups, _ = join_seeds(trainings, allow_mismatch=False)
    sections = []
    in_groups: list[Curve] = []
    for number, seeds in enumerate(with_differences(scores, groups, curves), start=1):
        sections.append(seed_maps_section(seeds, f"seeds-{number}"))
        in_groups += seeds.curves
    for number, curve in enumerate(curves, start=1):
        if curve not in in_groups:
            sections.append(curve_section(curve, f"curve-{number}"))
    return sections


def _curves(warehouse: Warehouse, runs: Sequence[TableRow]) -> list[Curve]:
    """Return the longest curves of runs, each set of runs once."""
    site, recipe, value, kind = PUBLISHED
    threshold = Threshold(value=value, kind=kind)
    conditions = [with_conditions(run) for run in runs]
    scored = profiles(warehouse, conditions, site=site, recipe=recipe, threshold=threshold)
    by_runs: dict[tuple[str, ...], Curve] = {}
    for along in AXES:
        for curve in curves_of(scored, along):
            run_ids = tuple(run["run_id"] for run in curve.runs)
            if len(run_ids) >= MIN_CURVE:
                by_runs.setdefault(run_ids, curve)
    longest_first = sorted(by_runs.values(), key=lambda curve: -len(curve.runs))
    return longest_first[:MAX_CURVES]


def _scorecards(
    warehouse: Warehouse, runs: Sequence[TableRow], labels: Mapping[str, str], own: Sequence[str] = ()
) -> Iterator[Section]:
    """Yield the score cards of the first runs whose ground truth is known."""
    with_truth = _revisions_with_ground_truth(warehouse, {run["revision"] for run in runs} - {None})
    measured = [run for run in runs if run["revision"] in with_truth][:MAX_SCORECARDS]
    cards = score_cards(warehouse, measured, own)
    cards = cards.filter(cards["format"].is_null())
    best = best_readings(cards)
    for run in measured:
        of_run = cards.filter(pc.equal(cards["run_id"], run["run_id"]))
        readings = of_run.filter(pc.equal(of_run["score"], "avss")).num_rows
        rows = best.filter(pc.equal(best["run_id"], run["run_id"])).to_pylist()
        section = page_section(labels[run["run_id"]], rows, run["num_layers"], readings)
        if section is not None:
            yield section


def _revisions_with_ground_truth(warehouse: Warehouse, revisions: Collection[str]) -> set[str]:
    """Return the revisions of models whose loss without layers was evaluated."""
    tasks = tuple(SCORES[name].task for name in GROUND_TRUTH)
    is_of_revision = pc.field("revision").isin(pa.array(sorted(revisions), pa.string()))
    rows = warehouse.table("evaluations", where=is_of_revision, columns=["revision", "task"]).to_pylist()
    return {row["revision"] for row in rows if row["task"].startswith(tasks)}


def _contrasts(warehouse: Warehouse, runs: Sequence[TableRow], labels: Mapping[str, str]) -> Iterator[Section]:
    """Yield the contrast of each run on paired text, at the published reading."""
    strata = warehouse.table("stratum_stats", run_ids=[run["run_id"] for run in runs], columns=["run_id"])
    paired = {*strata["run_id"].to_pylist()}
    for run in runs:
        if run["run_id"] not in paired:
            continue
        label = labels[run["run_id"]]
        first_site = run["sites"][0] if run["sites"] else "block"
        try:
            result = contrast(warehouse, run, site=first_site)
        except (QueryError, DamagedFile) as error:
            yield Section(label=label, sentences=[f"{error.message} {error.hint or ''}"])
        else:
            yield contrast_section(label, result)


def in_short(
    warehouse: Warehouse,
    runs: Sequence[TableRow],
    labels: Mapping[str, str],
    findings: Sequence[TableRow],
    without: Sequence[TableRow],
    experiments: Mapping[str, NewestExperiment],
) -> list[NewObject]:
    """Return answers to the questions about a few runs, for the template. Runs with evaluated removals come first.

    Args:
        runs: rows of ``runs``.
        labels: labels by run id.
        findings: rows of `findings`.
        without: by run, see `without_layers`.
        experiments: newest experiments by run id.
    """
    evaluated = []
    untried = []
    for run, measured in zip(runs, without, strict=True):
        if measured["sets"] or run["run_id"] in experiments:
            evaluated.append((run, measured["sets"]))
        else:
            untried.append((run, measured["sets"]))
    listed = [*evaluated, *untried[:MAX_UNTRIED]]
    summaries = []
    for run, sets in listed[:MAX_LISTED]:
        by_task = list(grouped(sets, itemgetter("series")).items())
        sets_by_task = dict(by_task[:MAX_LISTED])
        experiment = experiments.get(run["run_id"])
        answers = {
            "Can AVSS be believed?": _about_belief(warehouse, run, findings),
            f"How many layers can go at {CLAIMED_KEPT:.0%} kept?": _about_size(run, sets_by_task),
            f"What is kept without {CLAIMED_SHARE:.0%} of them?": _about_claim(run, sets_by_task, experiment),
        }
        summaries.append({"label": labels[run["run_id"]], "answers": answers})
    return summaries


def _about_belief(warehouse: Warehouse, run: TableRow, findings: Sequence[TableRow]) -> list[str]:
    """Return sentences on what speaks against AVSS of a run, and on its agreement with the measured loss."""
    kinds: dict[str, None] = {}
    for row in findings:
        if row["run_id"] == run["run_id"] and is_published(row):
            kinds[row["kind"].replace("_", " ")] = None
    sentence = "No finding warns of it."
    if kinds:
        sentence = f"{count_of(len(kinds), 'finding')} against it: {', '.join(kinds)}."
    scored = warehouse.table("scores", run_ids=[run["run_id"]], where=at_reading(*PUBLISHED)).to_pylist()
    return [sentence, *describe_agreement(warehouse, run, scored)]


def _about_size(run: TableRow, sets_by_task: Mapping[str, Sequence[TableRow]]) -> list[str]:
    """Return a sentence for each task on the largest set of layers without which enough is kept."""
    sentences = []
    for task, sets in sets_by_task.items():
        enough = [removed for removed in sets if removed["kept"] >= CLAIMED_KEPT]
        if enough:
            largest = max(enough, key=itemgetter("size"))
            layers = f"{largest['size']:g} layers ({largest['dropped']})"
            sentences.append(f"{task}: {layers}, {largest['kept']:z.0%} kept.")
        else:
            best = max(sets, key=itemgetter("kept"))
            kept = f"without {best['dropped']}, {best['kept']:z.0%} is kept"
            sentences.append(f"{task}: no set that was evaluated; {kept}.")
    if sentences:
        return sentences
    return [NOTHING if has_head(run) else HEADLESS]


def _about_claim(
    run: TableRow, sets_by_task: Mapping[str, Sequence[TableRow]], experiment: NewestExperiment | None
) -> list[str]:
    """Return sentences on sets of as many layers as the paper claims can go, and on the newest experiment."""
    size = count_lowest(run["num_layers"] or 0)
    sentences = []
    for task, sets in sets_by_task.items():
        for removed in sets:
            if removed["size"] == size:
                sentences.append(f"{task}: {removed['kept']:z.0%} at best, without {removed['dropped']}.")
    if experiment:
        rows = [{**row, "task": describe_task(row["task"])} for row in experiment.rows]
        sentences += claim_in_short(rows)
    return sentences or ["No such set was evaluated yet."]


def is_published(finding: TableRow) -> bool:
    """Whether a finding concerns AVSS as published, or the whole run."""
    is_of_site = finding["site"] in (None, SITES[0])
    is_of_recipe = finding["recipe"] in (None, RECIPES[0])
    return is_of_site and is_of_recipe
