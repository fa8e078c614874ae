"""The chapters of the page: curves, experiments, score cards, contrasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.compare import profiles, with_conditions
from avss_dist.analysis.contrast import contrast
from avss_dist.analysis.curves import AXES, Curve, curves_of
from avss_dist.analysis.experiments import experiment_results
from avss_dist.analysis.scorecard import best_readings, score_cards
from avss_dist.core.errors import QueryError
from avss_dist.core.registry import GROUND_TRUTH, SCORES
from avss_dist.pruning.selection import PUBLISHED
from avss_dist.report.contrasts import contrast_section
from avss_dist.report.curves import curve_section
from avss_dist.report.experiments import experiment_section
from avss_dist.report.scorecards import page_section
from avss_dist.report.section import Section
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

MAX_SCORECARDS = 6  # runs
MIN_CURVE, MAX_CURVES = 3, 12  # points of a curve, and curves
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A heading of the page with a section for each run, or curve of runs, that has results.

    Attributes:
        name: anchor on the page.
        title: title in the list of contents.
        heading: heading above the sections.
        lead: description of the sections.
    """

    name: str
    title: str
    heading: str
    lead: str
    sections: Sequence[Section]


def chapters(
    warehouse: Warehouse, runs: Sequence[Row], labels: Mapping[str, str], experiments: Sequence[Row]
) -> list[Chapter]:
    """Return the chapters that have results.

    Args:
        runs: rows of ``runs``.
        labels: the names of runs on the page, by id, in their order.
        experiments: rows of the table ``experiments``, the newest last.
    """
    by_run = {run_id: [row for row in experiments if row["run_id"] == run_id] for run_id in labels}
    every = [
        Chapter(
            name="curves",
            title="Along an axis",
            heading="Along training, size and settings",
            lead="How the ranks of layers by AVSS as published move along the steps of a training, the sizes of a "
            "family, or lengths: avss compare --along shows other scores.",
            sections=[
                curve_section(curve, f"curve-{number}")
                for number, curve in enumerate(_curves(warehouse, runs), start=1)
            ],
        ),
        Chapter(
            name="experiments",
            title="Experiments",
            heading="Experiments",
            lead="What models keep without the layers that each method chose: the metric over that of the whole "
            "model, or, of a perplexity, the whole model's over it. Dashed: what the paper claims; dotted: what a "
            "guess keeps.",
            sections=[
                experiment_section(label, results)
                for run_id, label in labels.items()
                if (results := experiment_results(by_run[run_id]))
            ],
        ),
        Chapter(
            name="scorecard",
            title="Score card",
            heading="Score card",
            lead="How well each score orders the layers as what leaving them out does to the loss: Spearman's "
            "correlation, and its 95% interval as if other layers had been drawn (Bonett and Wright). Dashed: the "
            "ceiling.",
            sections=list(_scorecards(warehouse, runs, labels)),
        ),
        Chapter(
            name="contrasts",
            title="Contrasts",
            heading="Hallucinated and truthful answers",
            lead="How layers differ between the two, and whether anything is left of it under the controls. Dots "
            "outside of the gray band differ more than random halves of the truthful answers do; what is the same "
            "after another prompt is about words, not about truth.",
            sections=list(_contrasts(warehouse, runs, labels)),
        ),
    ]
    return [chapter for chapter in every if chapter.sections]


def _curves(warehouse: Warehouse, runs: Sequence[Row]) -> list[Curve]:
    """Return the longest curves of runs, each set of runs once."""
    site, recipe, value, kind = PUBLISHED
    threshold = Threshold(value=value, kind=kind)
    scored = profiles(warehouse, list(map(with_conditions, runs)), site=site, recipe=recipe, threshold=threshold)
    by_runs: dict[tuple[str, ...], Curve] = {}
    for curve in (curve for along in AXES for curve in curves_of(scored, along)):
        if len(curve.runs) >= MIN_CURVE:
            by_runs.setdefault(tuple(run["run_id"] for run in curve.runs), curve)
    return sorted(by_runs.values(), key=lambda curve: -len(curve.runs))[:MAX_CURVES]


def _scorecards(warehouse: Warehouse, runs: Sequence[Row], labels: Mapping[str, str]) -> Iterator[Section]:
    """Yield the score cards of the first runs whose ground truth is known."""
    known = _evaluated(warehouse, runs, *(SCORES[name].task for name in GROUND_TRUTH))[:MAX_SCORECARDS]
    cards = score_cards(warehouse, known)
    every = cards.filter(pc.is_null(cards["format"]))
    best, all_rows = best_readings(every).to_pylist(), every.to_pylist()
    for run in known:
        cards = [row for row in best if row["run_id"] == run["run_id"]]
        readings = sum(row["run_id"] == run["run_id"] and row["score"] == "avss" for row in all_rows)
        if section := page_section(labels[run["run_id"]], cards, run["num_layers"], readings):
            yield section


def _evaluated(warehouse: Warehouse, runs: Sequence[Row], *tasks: str) -> list[Row]:
    """Return the runs whose checkpoint has an evaluation on a task with one of these prefixes."""
    revisions = pa.array(sorted({run["revision"] for run in runs} - {None}), pa.string())
    rows = warehouse.table("evaluations", where=pc.field("revision").isin(revisions), columns=["revision", "task"])
    known = {row["revision"] for row in rows.to_pylist() if row["task"].startswith(tasks)}
    return [run for run in runs if run["revision"] in known]


def _contrasts(warehouse: Warehouse, runs: Sequence[Row], labels: Mapping[str, str]) -> Iterator[Section]:
    """Yield the contrast of each run on paired text, at the published reading."""
    strata = warehouse.table("stratum_stats", run_ids=[run["run_id"] for run in runs], columns=["run_id"])
    paired = set(strata["run_id"].to_pylist())
    for run in (run for run in runs if run["run_id"] in paired):
        label = labels[run["run_id"]]
        try:
            result = contrast(warehouse, run, site=(run["sites"] or ["block"])[0])
        except QueryError as error:
            yield Section(label=label, sentences=[f"{error.message} {error.hint or ''}"])
        else:
            yield contrast_section(label, result)
