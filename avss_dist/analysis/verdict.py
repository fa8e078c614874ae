"""Evaluations of models without layers: verdicts on the published claim, and the best removed set of each size.

The claim (arXiv 2411.02117, abstract): without the lowest 25% of layers by AVSS, over 90% of the performance is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import exp, isfinite
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.experiments import NewestExperiment, newest_experiments
from avss_dist.analysis.section import (
    BLUE,
    GRAY,
    Chart,
    ReportColumn,
    ReportTable,
    Row,
    Section,
    interval,
    known_interval,
    page_number,
)
from avss_dist.core.intervention import count_removed, decode_removals, describe_removed, size_removed
from avss_dist.core.registry import (
    BLOCK_DISTANCE,
    CHANCE,
    LOSS,
    MEASURED,
    PERPLEXITY,
    READING,
    REPAIR,
    ROW_START,
    SCORES,
    SEARCH,
    SUBLAYER_LOSS,
)
from avss_dist.core.text import basename
from avss_dist.pruning.methods import ENDS_KEPT, LEAVE_ONE_OUT, REVERSED
from avss_dist.pruning.selection import LAST, PUBLISHED, RANDOM
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.metrics import NO_INTERVAL, retention_of
from avss_dist.warehouse.reader import Warehouse, grouped

CLAIMED_SHARE, CLAIMED_KEPT = 0.25, 0.9
LARGEST_SHOWN = 1.5  # retention that the chart has room for
MENTIONED = 0.01  # a guess that keeps less is not worth a word
PRIMARY = (LOSS, "mc2", "acc_norm", "acc", "exact_match", "f1")  # of a task's metrics, the first that it has
WHOLE = "whole model"
OF_EVERY_LAYER = tuple({*(SCORES[name].task for name in MEASURED), SUBLAYER_LOSS, SEARCH})
"""Tasks that measure single layers, or candidate sets of a search, rather than a pruned model."""


def primary_metric(rows: Sequence[Row]) -> str:
    """Return the primary metric of a task: the first of `PRIMARY` that it has, else its first metric."""
    names = list(dict.fromkeys(row["metric"] for row in rows))
    last = [name.rpartition("/")[2] for name in names]
    return next((names[last.index(metric)] for metric in PRIMARY if metric in last), names[0])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a paragraph for each task and repair of one experiment with a run on which the claim was tested."""
    return [f"{task}: {' '.join(_sentences(claim, same, guess))}" for task, claim, same, guess in _claims(rows)]


def claim_in_short(rows: Sequence[Row]) -> list[str]:
    """Return a line for each task of one experiment: the retention without the lowest AVSS, and the verdict."""
    return [
        f"{task}: {_percent(claim['retention'])} by the lowest AVSS: {judgement(claim, guess)}."
        for task, claim, _, guess in _claims(rows)
        if not claim.get("repair")
    ]


def _claims(rows: Sequence[Row]) -> Iterator[tuple[str, Row, Sequence[Row], float | None]]:
    """Yield task, row of the claim, all rows of its repair, and `kept_by_guess`, for each task and repair."""
    for task, of_task in grouped(rows, itemgetter("task")).items():
        metric = primary_metric(of_task)
        guess = kept_by_guess(of_task, metric)
        of_task = [
            row
            for row in of_task
            if row["metric"] == metric and row["share"] in (0.0, CLAIMED_SHARE) and not row.get("factor")
        ]
        for repair in dict.fromkeys(row.get("repair") for row in of_task if not _is_whole(row)):
            same_repair = [row for row in of_task if _is_whole(row) or row.get("repair") == repair]
            if claim := _published_row(same_repair, "avss"):
                yield task, claim, same_repair, guess


def kept_by_guess(rows: Sequence[Row], metric: str) -> float | None:
    """Return the retention of a model that guesses, or None if it is unknown or the metric is no accuracy or loss."""
    prefix, slash, name = metric.rpartition("/")
    of_whole = {row["metric"]: row["value"] for row in rows if _is_whole(row)}
    chance, whole = of_whole.get(f"{prefix}{slash}{CHANCE}"), of_whole.get(metric)
    if not chance or not whole:
        return None
    if name == LOSS:
        return exp(min(whole - chance, 700))
    return chance / whole if name.startswith("acc") or name == "mc2" else None


def _sentences(claim: Row, rows: Sequence[Row], guess: float | None) -> list[str]:
    repaired = f", repaired by {claim['repair']}" if claim.get("repair") else ""
    of_claim = repaired if not repaired or claim.get("patch") else f"{repaired} (nothing: no layer stands before them)"
    removed = count_removed(decode_removals(claim["drop"]))
    ends, whole = retention_interval(claim), next(filter(_is_whole, rows), None)
    span = f" ({_percent(ends[0])} to {_percent(ends[1])})" if ends else ""
    change = f" ({describe_metric(claim['metric'])} {shown_value(whole)}, then {shown_value(claim)})" if whole else ""
    chances = [row["retention"] for row in rows if row["score"] == RANDOM and not row["control"]]
    better, best = sum(chance >= claim["retention"] for chance in chances), max(chances, default=0.0)
    sentences = (
        (
            True,
            f"without the {removed} of the lowest AVSS ({CLAIMED_SHARE:.0%}){of_claim}, "
            f"{_percent(claim['retention'])}{span} is kept{change}: {judgement(claim, guess)}.",
        ),
        (MENTIONED <= (guess or 0.0) <= CLAIMED_KEPT, f"A guess keeps {_percent(guess or 0.0)}."),
        (
            len(chances) == 1,
            f"A random choice of as many layers{repaired}{',' * bool(repaired)} keeps {_percent(best)}.",
        ),
        (
            len(chances) > 1,
            f"Of {len(chances)} random choices of as many layers{repaired}, {better or 'none'} "
            f"keep{'s' if better == 1 else ''} as much or more (the best {_percent(best)}).",
        ),
    )
    controls = {
        "The reverse, the highest AVSS,": _published_row(rows, "avss", REVERSED),
        "AVSS with the ends kept": _published_row(rows, "avss", ENDS_KEPT),
        "Block influence": _published_row(rows, "block_influence"),
        "Leaving out by the loss without each layer": _published_row(rows, LEAVE_ONE_OUT),
        "Leaving out the last before the final one": _published_row(rows, LAST),
    }
    of_controls = (f"{name} keeps {_percent(row['retention'])}." for name, row in controls.items() if row)
    return [*(sentence for holds, sentence in sentences if holds), *of_controls]


def judgement(row: Row, guess: float | None = None) -> str:
    """Return the verdict of a row's interval on the claim that over 90% is kept.

    Args:
        guess: retention of a guess (`kept_by_guess`). If it exceeds the claim, the task is not conclusive.
    """
    if guess is not None and guess > CLAIMED_KEPT:
        return f"this task cannot tell, for a guess keeps {_percent(guess)}"
    if (ends := retention_interval(row)) is None:
        if row["retention"] == 0:
            return "the claim does not hold, for nothing is kept"
        return f"the claim is undecided, for there is no interval (fewer than {MINIMUM_UNITS} samples differ)"
    low, high = ends
    if low > CLAIMED_KEPT:
        return "the claim holds"
    return "the claim does not hold" if high < CLAIMED_KEPT else "the claim is undecided, for want of data"


def _published_row(rows: Sequence[Row], score: str, control: str | None = None) -> Row | None:
    """Return the row of a score in its published reading, with the given control, or None if there is none.

    Schema 2 has the reading of AVSS only in the label of the method.
    """
    for row in (row for row in rows if (row["score"], row["control"]) == (score, control)):
        reading = tuple(row.get(name) for name in READING)
        if reading == PUBLISHED or (None in reading and "(" not in row["method"]):
            return row
    return None


def _is_whole(row: Row) -> bool:
    return row["score"] is None


def retention_interval(row: Row) -> tuple[float, float] | None:
    """Return the lower and upper end of a row's retention interval, or None if it has no interval."""
    return known_interval(row.get("retention_low"), row.get("retention_high"))


def lacks_interval(rows: Sequence[Row]) -> bool:
    """Whether some row other than the whole model's has no retention interval."""
    return any(not _is_whole(row) and retention_interval(row) is None for row in rows)


def shown_method(row: Row) -> str:
    """Return the display name of a method: its choice of layers, and repair."""
    return f"{row['method']} + {row['repair']}" if row.get("repair") else str(row["method"])


def shown_value(row: Row) -> str:
    """Return a formatted result. A loss is shown as perplexity."""
    return metric_format(row["metric"])(readable_value(row["metric"], row["value"]))


def readable_value(metric: str, value: float) -> float:
    """Return a result in its display unit. A loss becomes a perplexity."""
    return exp(min(value, 700)) if metric == LOSS else value


def metric_format(metric: str) -> Callable[[float], str]:
    """Return the function that formats the `readable_value` of a metric."""
    return (lambda value: f"{value:,.4g}") if metric == LOSS else (lambda value: f"{value:z.3f}")


def describe_metric(metric: str) -> str:
    """Return the display name of a metric. A loss is shown as perplexity."""
    return "perplexity" if metric == LOSS else metric


def describe_task(task: str) -> str:
    """Return the display name of a task, without the folders of its text."""
    name, colon, text = task.partition(":")
    return f"{name}: {basename(text)}" if colon else basename(task)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"


def without_layers(warehouse: Warehouse, runs: Sequence[Row]) -> list[dict[str, list[dict[str, Any]]]]:
    """Return the measurements of each run's checkpoint without some of its layers.

    Args:
        runs: rows of ``runs``.

    Returns:
        By run, ``blocks``: ``start``, ``length`` and ``distance`` of each block of consecutive layers, the mean angle
        between the hidden states before and after it, in units of pi radians. And ``sets``: the best removed set of
        each size, for every task and repair: ``series`` names both, ``dropped`` is the set in words, ``size`` the
        number of layers, of which a sublayer is a half, and ``kept`` the retention of the task's primary metric.
    """
    revisions = {run["revision"] for run in runs} - {None}
    where = pc.field("revision").isin(pa.array(sorted(revisions), pa.string()))
    rows = warehouse.table("evaluations", where=where).to_pylist() if revisions else []
    measured = {
        revision: {"blocks": _blocks(of_revision), "sets": list(_best_sets(of_revision))}
        for revision, of_revision in grouped(rows, itemgetter("revision")).items()
    }
    return [measured.get(run["revision"], {"blocks": [], "sets": []}) for run in runs]


def _blocks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the distances of blocks that the newest run measured, ordered by first layer and length."""
    measured = [row for row in rows if row["metric"] == BLOCK_DISTANCE and isfinite(row["value"])]
    newest = max(((row["created_at"], row["run_id"]) for row in measured), default=None)
    by_block = {(row["drop"][0], len(row["drop"])): row for row in measured if newest and row["run_id"] == newest[1]}
    return [
        {"start": start, "length": length, "distance": row["value"]}
        for (start, length), row in sorted(by_block.items())
    ]


def _best_sets(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield the best removed set of each size, for every task and repair."""
    repairs = {
        row["patch"]: row["task"].split(":")[1] for row in rows if row["patch"] and row["task"].startswith(REPAIR)
    }
    evaluated = [
        row
        for row in rows
        if not (row["factor"] or any(row[name] is not None for name in ("layer", "sparsity_plan", "rounding")))
        and not row["task"].startswith((*OF_EVERY_LAYER, REPAIR, ROW_START))
    ]
    for task, of_task in grouped(evaluated, itemgetter("task")).items():
        of_task = max(grouped(of_task, itemgetter("run_id")).values(), key=lambda results: len(results))
        metric = primary_metric(of_task)
        sets: list[dict[str, Any]] = []
        results = [row for row in of_task if row["metric"] == metric]
        for whole, row in product((r["value"] for r in results if not r["drop"]), (r for r in results if r["drop"])):
            repair = f", repaired by {repairs.get(row['patch'], 'a patch')}" if row["patch"] else ""
            removed = decode_removals(row["drop"])
            sets.append(
                {
                    "series": f"{describe_task(task)}{repair}",
                    "dropped": describe_removed(removed),
                    "size": size_removed(removed),
                    "kept": float(retention_of(metric, np.array(whole), np.array(row["value"]))),
                }
            )
        sets = sorted((row for row in sets if isfinite(row["kept"])), key=lambda row: row["kept"])
        best = {(row["series"], row["size"]): row for row in sets}
        yield from (best[key] for key in sorted(best))


def experiment_sections(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[Section]:
    """Return the results of the newest experiment with each run.

    Args:
        rows: rows of the table ``experiments``.
        labels: labels of runs by id, in their order; by default the model and the id.
    """
    newest, sections = newest_experiments(rows), []
    for run_id in labels or newest:
        if experiment := newest.get(run_id):
            label = labels[run_id] if labels else f"{experiment.rows[0]['model']}  ({run_id})"
            sections.append(_section(label, experiment))
    return sections


def _section(label: str, experiment: NewestExperiment) -> Section:
    """Return the section on the results of one experiment with a run."""
    rows = experiment.rows
    by_task = grouped(rows, itemgetter("task"))
    metrics = {task: primary_metric(of_task) for task, of_task in by_task.items()}
    primary = sorted(
        (row for row in rows if row["metric"] == metrics[row["task"]]), key=lambda row: float(row["share"])
    )
    methods = {
        method: {row["task"]: row for row in of_method}
        for method, of_method in grouped(primary, lambda row: (row["share"], shown_method(row))).items()
    }
    removed = [decode_removals(next(iter(of_method.values()))["drop"]) for of_method in methods.values()]
    columns = [
        ReportColumn("layers chosen by", [method for _, method in methods], number=False),
        ReportColumn("share", [share for share, _ in methods], "{:z.0%}".format),
        ReportColumn(
            "dropped", [describe_removed(layers) or None for layers in removed], number=False, wraps=True, priority=3
        ),
    ]
    name = f"experiment-{page_number(label)}"
    charts: list[Chart] = []
    for task, metric in metrics.items():
        group, results = basename(task.removeprefix(PERPLEXITY)), [results.get(task) for results in methods.values()]
        compared = [row if row and row["score"] is not None else None for row in results]
        values, format_ = [row and readable_value(metric, row["value"]) for row in results], metric_format(metric)
        columns += [
            ReportColumn(describe_metric(metric), values, format_, group=group, priority=2),
            ReportColumn("kept", [row and row["retention"] for row in compared], "{:z.1%}".format, group=group),
            ReportColumn(
                "95% interval",
                [row and retention_interval(row) for row in compared],
                interval("{:z.1%}".format),
                group=group,
                priority=1,
            ),
        ]
    for share in dict.fromkeys(share for share, method in methods if method != WHOLE):
        for task, metric in metrics.items():
            guess = kept_by_guess(by_task[task], metric)
            drawn = [
                {
                    "method": method,
                    "kept": min(result["retention"], LARGEST_SHOWN),
                    "guess": guess,
                    **dict(zip(("low", "high"), retention_interval(result) or (None, None), strict=True)),
                }
                for (at, method), of_method in methods.items()
                if at == share and method != WHOLE and (result := of_method.get(task))
            ]
            if drawn:
                charts.append(
                    Chart(
                        name=f"{name}-{len(charts) + 1}",
                        title=f"{describe_task(task)}, {share:.0%} dropped",
                        meaning="What each method keeps, with its 95% interval.",
                        rows=drawn,
                        draw=partial(_drawing, max([1.1, *(row["kept"] for row in drawn)]), len(drawn)),
                    )
                )
    caption = "Kept: the metric over that of the whole model (of a perplexity: under it), and its 95% interval."
    return Section(
        label=label,
        about=experiment.describe(),
        sentences=verdicts([{**row, "task": describe_task(row["task"])} for row in rows])
        or ["No share of 25% by AVSS was tried."],
        charts=charts,
        tables=[
            ReportTable(
                name=name,
                title="Each method at each share",
                columns=columns,
                caption=f"{caption} {NO_INTERVAL}" if lacks_interval(primary) else caption,
            )
        ],
    )


def _drawing(largest: float, number: int) -> Any:
    """Return the chart of retention by method, with lines at the claim of the paper (dashed) and a guess (dotted)."""
    import altair as alt

    base = alt.Chart().encode(alt.Y("method:N", sort=None, title=None).axis(labelLimit=alt.ExprRef("room")))
    retention = alt.X(
        "kept:Q",
        scale=alt.Scale(domain=[0, largest], clamp=True),
        title="retention",
        axis=alt.Axis(format="%", grid=False, tickCount=5),
    )
    return alt.layer(
        alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(x=alt.datum(CLAIMED_KEPT)),
        alt.Chart().mark_rule(color=GRAY, strokeDash=[1, 3]).encode(alt.X("guess:Q", aggregate="max")),
        base.mark_rule(color=BLUE, clip=True).encode(alt.X("low:Q"), alt.X2("high:Q")),
        base.mark_point(filled=True, color=BLUE, size=45, opacity=1).encode(
            retention, tooltip=["method:N", alt.Tooltip("kept:Q", format=".1%")]
        ),
    ).properties(height=17 * number)
