"""The summary at the top of the page: reliability of the scores, layers that can go, and retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avss_dist.analysis.scorecard import describe_agreement
from avss_dist.analysis.thresholds import at_reading
from avss_dist.analysis.verdict import CLAIMED_KEPT, CLAIMED_SHARE, claim_in_short
from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import SITES
from avss_dist.pruning.selection import PUBLISHED
from avss_dist.reports.section import Row
from avss_dist.stats.rankings import count_lowest
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse

MAX_LISTED = 6  # runs, and tasks of each
MAX_UNTRIED = 3  # runs without any evaluated removal
NOTHING = "Nothing was left out and evaluated yet: avss ablate --damage, avss plan, avss evaluate; or avss shrink."
HEADLESS = "Not known: the model predicts no next token, so nothing here evaluates it without layers."


def in_short(
    warehouse: Warehouse,
    runs: Sequence[Row],
    labels: Mapping[str, str],
    findings: Sequence[Row],
    without: Sequence[Row],
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
    in_experiments = {row["run_id"] for row in experiments}
    evaluated: list[tuple[Row, Sequence[Row]]] = []
    untried: list[tuple[Row, Sequence[Row]]] = []
    for run, measured in zip(runs, without, strict=True):
        is_evaluated = measured["sets"] or run["run_id"] in in_experiments
        (evaluated if is_evaluated else untried).append((run, measured["sets"]))
    summaries = []
    for run, sets in [*evaluated, *untried[:MAX_UNTRIED]][:MAX_LISTED]:
        of_run = [row for row in findings if row["run_id"] == run["run_id"] and is_published(row)]
        kinds = dict.fromkeys(row["kind"].replace("_", " ") for row in of_run)
        against = f"{len(kinds)} finding{'' if len(kinds) == 1 else 's'} against it: {', '.join(kinds)}."
        by_task: dict[str, list[Row]] = {}
        for removed in sets:
            by_task.setdefault(removed["series"], []).append(removed)
        largest, of_claim, size = [], [], count_lowest(run["num_layers"] or 0)
        for task, of_task in list(by_task.items())[:MAX_LISTED]:
            if enough := [removed for removed in of_task if removed["kept"] >= CLAIMED_KEPT]:
                one = max(enough, key=lambda removed: removed["size"])
                largest.append(f"{task}: {one['size']:g} layers ({one['dropped']}), {one['kept']:z.0%} kept.")
            else:
                one = max(of_task, key=lambda removed: removed["kept"])
                largest.append(
                    f"{task}: no set that was evaluated; without {one['dropped']}, {one['kept']:z.0%} is kept."
                )
            for removed in (removed for removed in of_task if removed["size"] == size):
                of_claim.append(f"{task}: {removed['kept']:z.0%} at best, without {removed['dropped']}.")
        of_claim += claim_in_short([row for row in experiments if row["run_id"] == run["run_id"]])
        scored = warehouse.table("scores", run_ids=[run["run_id"]], where=at_reading(*PUBLISHED)).to_pylist()
        answers = {
            "Can AVSS be believed?": [
                against if kinds else "No finding warns of it.",
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
