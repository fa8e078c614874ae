"""The summary at the top of the page: reliability of the scores, layers that can go, and retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avss_dist.analysis.removal import RemovedSet, WithoutLayers
from avss_dist.analysis.verdict import CLAIMED_KEPT, CLAIMED_SHARE, claim_in_short
from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import SITES
from avss_dist.stats.rankings import count_lowest
from avss_dist.warehouse.checks import has_head

MAX_LISTED = 6  # runs, and tasks of each
MAX_UNTRIED = 3  # runs without any evaluated removal
NOTHING = "Nothing was left out and evaluated yet: avss ablate --damage, avss plan, avss evaluate; or avss shrink."
HEADLESS = "Not known: the model predicts no next token, so nothing here evaluates it without layers."
Row = Mapping[str, Any]


def in_short(
    runs: Sequence[Row],
    labels: Mapping[str, str],
    findings: Sequence[Row],
    without: Sequence[WithoutLayers],
    experiments: Sequence[Row],
) -> list[dict[str, Any]]:
    """Return answers to the questions about a few runs, for the template. Runs with evaluated removals come first.

    Args:
        runs: rows of ``runs``.
        labels: labels by run id.
        findings: rows of `findings`.
        without: by run, see `without_layers`.
        experiments: rows of ``experiments``, the newest first.
    """
    return [
        {
            "label": labels[run["run_id"]],
            "answers": [
                {
                    "question": "Can AVSS be believed?",
                    "lines": [_findings_against([r for r in findings if _is_of(run, r)])],
                },
                {
                    "question": f"How many layers can go at {CLAIMED_KEPT:.0%} kept?",
                    "lines": _largest_sets(known.sets) or [NOTHING if has_head(run) else HEADLESS],
                },
                {
                    "question": f"What is kept without {CLAIMED_SHARE:.0%} of them?",
                    "lines": _outcome_of_claim(
                        known.sets, count_lowest(run["num_layers"] or 0), [r for r in experiments if _is_of(run, r)]
                    ),
                },
            ],
        }
        for run, known in _selected_runs(runs, without, experiments)
    ]


def _selected_runs(
    runs: Sequence[Row], without: Sequence[WithoutLayers], experiments: Sequence[Row]
) -> list[tuple[Row, WithoutLayers]]:
    in_experiments = {row["run_id"] for row in experiments}
    evaluated: list[tuple[Row, WithoutLayers]] = []
    untried: list[tuple[Row, WithoutLayers]] = []
    for run, known in zip(runs, without, strict=True):
        (evaluated if known.sets or run["run_id"] in in_experiments else untried).append((run, known))
    return [*evaluated, *untried[:MAX_UNTRIED]][:MAX_LISTED]


def is_published(finding: Row) -> bool:
    """Whether a finding concerns AVSS as published, or the whole run."""
    return finding["site"] in (None, SITES[0]) and finding["recipe"] in (None, RECIPES[0])


def _is_of(run: Row, row: Row) -> bool:
    return bool(row["run_id"] == run["run_id"])


def _findings_against(findings: Sequence[Row]) -> str:
    kinds = dict.fromkeys(row["kind"].replace("_", " ") for row in findings if is_published(row))
    if not kinds:
        return "No finding warns of it."
    return f"{len(kinds)} finding{'' if len(kinds) == 1 else 's'} against it: {', '.join(kinds)}."


def _by_task(sets: Sequence[RemovedSet]) -> dict[str, list[RemovedSet]]:
    by_task: dict[str, list[RemovedSet]] = {}
    for removed in sets:
        by_task.setdefault(removed.series, []).append(removed)
    return dict(list(by_task.items())[:MAX_LISTED])


def _largest_sets(sets: Sequence[RemovedSet]) -> list[str]:
    """Return a line for each task with the largest set that keeps enough."""
    lines = []
    for task, of_task in _by_task(sets).items():
        if enough := [removed for removed in of_task if removed.retention >= CLAIMED_KEPT]:
            largest = max(enough, key=lambda removed: removed.size)
            lines.append(f"{task}: {largest.size:g} layers ({largest.dropped}), {largest.retention:z.0%} kept.")
        else:
            best = max(of_task, key=lambda removed: removed.retention)
            lines.append(f"{task}: no set that was evaluated; without {best.dropped}, {best.retention:z.0%} is kept.")
    return lines


def _outcome_of_claim(sets: Sequence[RemovedSet], size: int, experiments: Sequence[Row]) -> list[str]:
    """Return lines with the best set of the claimed size for each task, and with the outcome of the claim."""
    lines = []
    for task, of_task in _by_task(sets).items():
        of_size = (removed for removed in of_task if removed.size == size)
        lines += [f"{task}: {removed.retention:z.0%} at best, without {removed.dropped}." for removed in of_size]
    return [*lines, *claim_in_short(experiments)] or ["No such set was evaluated yet."]
