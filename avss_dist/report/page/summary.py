"""What the page says first of a run: can its scores be believed, how much can go, what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avss_dist.analysis.verdict import CLAIMED_KEPT, CLAIMED_SHARE, claim_in_short
from avss_dist.settings import RECIPES, SITES
from avss_dist.stats.rankings import count_lowest
from avss_dist.warehouse.checks import has_head

MOST = 6  # runs, and tasks of each
MOST_UNTRIED = 3  # runs of which nothing was left out yet
NOTHING = "Nothing was left out and evaluated yet: avss ablate --damage, avss plan, avss evaluate; or avss shrink."
HEADLESS = "Not known: the model predicts no next token, so nothing here evaluates it without layers."
Row = Mapping[str, Any]


def in_short(
    runs: Sequence[Row],
    labels: Mapping[str, str],
    found: Sequence[Row],
    without: Sequence[Row],
    tried: Sequence[Row],
) -> list[dict[str, Any]]:
    """For the template: an answer to each question of a few runs, those of which something was left out first.

    Args:
        runs: rows of ``runs``.
        labels: by run id.
        found: rows of `findings`.
        without: by run, as `without_layers` has it.
        tried: rows of ``experiments``, the newest first.
    """
    return [
        {
            "label": labels[run["run_id"]],
            "answers": [
                {"question": "Can AVSS be believed?", "lines": [_believed([r for r in found if _is_of(run, r)])]},
                {
                    "question": f"How many layers can go at {CLAIMED_KEPT:.0%} kept?",
                    "lines": _can_go(known["kept"]) or [NOTHING if has_head(run) else HEADLESS],
                },
                {
                    "question": f"What is kept without {CLAIMED_SHARE:.0%} of them?",
                    "lines": _is_kept(
                        known["kept"], count_lowest(run["num_layers"] or 0), [r for r in tried if _is_of(run, r)]
                    ),
                },
            ],
        }
        for run, known in _few(runs, without, tried)
    ]


def _few(runs: Sequence[Row], without: Sequence[Row], tried: Sequence[Row]) -> list[tuple[Row, Row]]:
    in_experiments = {row["run_id"] for row in tried}
    evaluated: list[tuple[Row, Row]] = []
    untried: list[tuple[Row, Row]] = []
    for run, known in zip(runs, without, strict=True):
        of = evaluated if known["kept"] or run["run_id"] in in_experiments else untried
        of.append((run, known))
    return [*evaluated, *untried[:MOST_UNTRIED]][:MOST]


def is_published(finding: Row) -> bool:
    """Whether it is of AVSS as published, or of the whole run."""
    return finding["site"] in (None, SITES[0]) and finding["recipe"] in (None, RECIPES[0])


def _is_of(run: Row, row: Row) -> bool:
    return bool(row["run_id"] == run["run_id"])


def _believed(found: Sequence[Row]) -> str:
    kinds = dict.fromkeys(row["kind"].replace("_", " ") for row in found if is_published(row))
    if not kinds:
        return "No finding warns of it."
    return f"{len(kinds)} finding{'' if len(kinds) == 1 else 's'} against it: {', '.join(kinds)}."


def _by_task(sets: Sequence[Row]) -> dict[str, list[Row]]:
    by_task: dict[str, list[Row]] = {}
    for one in sets:
        by_task.setdefault(one["series"], []).append(one)
    return dict(list(by_task.items())[:MOST])


def _can_go(sets: Sequence[Row]) -> list[str]:
    """Of each task, the largest set that keeps enough."""
    lines = []
    for task, of_task in _by_task(sets).items():
        if enough := [one for one in of_task if one["kept"] >= CLAIMED_KEPT]:
            most = max(enough, key=lambda one: one["size"])
            lines.append(f"{task}: {most['size']:g} layers ({most['dropped']}), {most['kept']:z.0%} kept.")
        else:
            best = max(of_task, key=lambda one: one["kept"])
            lines.append(f"{task}: no set that was evaluated; without {best['dropped']}, {best['kept']:z.0%} is kept.")
    return lines


def _is_kept(sets: Sequence[Row], size: int, tried: Sequence[Row]) -> list[str]:
    """Of each task, the best set of the share that the paper's claim is of; and what the claim itself comes to."""
    lines = []
    for task, of_task in _by_task(sets).items():
        of_size = (one for one in of_task if one["size"] == size)
        lines += [f"{task}: {one['kept']:z.0%} at best, without {one['dropped']}." for one in of_size]
    return [*lines, *claim_in_short(tried)] or ["No such set was evaluated yet."]
