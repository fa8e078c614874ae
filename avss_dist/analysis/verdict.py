"""What an experiment says, in words: does the claim hold, against chance, against the reverse, against rivals?

The claim (arXiv 2411.02117, abstract): without the lowest 25% of layers by AVSS, over 90% of the performance is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, isfinite
from typing import Any

from avss_dist.core.intervention import count_removed, decode_removals
from avss_dist.core.names import CHANCE, LOSS
from avss_dist.core.text import basename
from avss_dist.pruning.methods import ENDS_KEPT, LEAVE_ONE_OUT, REVERSED
from avss_dist.pruning.selection import LAST, PUBLISHED, RANDOM
from avss_dist.stats.intervals import MINIMUM_UNITS

CLAIMED_SHARE, CLAIMED_KEPT = 0.25, 0.9
MENTIONED = 0.01  # a guess that keeps less is not worth a word
PRIMARY = (LOSS, "mc2", "acc_norm", "acc", "exact_match", "f1")  # of a task's metrics, the first that it has
WHOLE = "whole model"

Row = Mapping[str, Any]  # of the table `experiments`


def primary_metric(rows: Sequence[Row]) -> str:
    """The metric that speaks for a task."""
    names = list(dict.fromkeys(row["metric"] for row in rows))
    last = [name.rpartition("/")[2] for name in names]
    return next((names[last.index(metric)] for metric in PRIMARY if metric in last), names[0])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A paragraph for each task and each repair, of the rows of one run; none where the claim was not tried."""
    paragraphs = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        metric = primary_metric(of_task)
        guess = kept_by_guess(of_task, metric)
        of_task = [row for row in of_task if row["metric"] == metric and _is_of_claim(row)]
        for repair in dict.fromkeys(row.get("repair") for row in of_task if not _is_whole(row)):
            alike = [row for row in of_task if _is_whole(row) or row.get("repair") == repair]
            claim = _one(alike, "avss")
            if claim is not None:
                paragraphs.append(f"{task}: {' '.join(_sentences(claim, alike, guess))}")
    return paragraphs


def claim_in_short(rows: Sequence[Row]) -> list[str]:
    """Of each task, what is kept without the layers of the lowest AVSS, and what that says of the claim."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        metric = primary_metric(of_task)
        of_claim = [row for row in of_task if row["metric"] == metric and _is_of_claim(row) and not row.get("repair")]
        if claim := _one(of_claim, "avss"):
            said = judgement(claim, kept_by_guess(of_task, metric))
            lines.append(f"{task}: {_percent(claim['retention'])} by the lowest AVSS: {said}.")
    return lines


def _is_of_claim(row: Row) -> bool:
    """Whether the claimed share of layers is left out, or none."""
    return row["share"] in (0.0, CLAIMED_SHARE) and not row.get("factor")


def kept_by_guess(rows: Sequence[Row], metric: str) -> float | None:
    """The retention of one who guesses; None where a guess has no accuracy and no loss, or nothing is known of it."""
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
    sentences = [
        f"without the {removed} of the lowest AVSS ({CLAIMED_SHARE:.0%}){of_claim}, "
        f"{_kept(claim)}{_before_and_after(claim, rows)}: {judgement(claim, guess)}."
    ]
    if guess is not None and MENTIONED <= guess <= CLAIMED_KEPT:
        sentences.append(f"A guess keeps {_percent(guess)}.")
    chances = [row["retention"] for row in rows if row["score"] == RANDOM and not row["control"]]
    if chances:
        sentences.append(_beside_chance(claim["retention"], chances, repaired))
    others = {
        "The reverse, the highest AVSS,": _one(rows, "avss", REVERSED),
        "AVSS with the ends kept": _one(rows, "avss", ENDS_KEPT),
        "Block influence": _one(rows, "block_influence"),
        "Leaving out by the loss without each layer": _one(rows, LEAVE_ONE_OUT),
        "Leaving out the last before the final one": _one(rows, LAST),
    }
    sentences += [f"{name} keeps {_percent(row['retention'])}." for name, row in others.items() if row is not None]
    return sentences


def _beside_chance(kept: float, chances: Sequence[float], repaired: str) -> str:
    """What random choices keep, beside the choice of the claim."""
    if len(chances) == 1:
        return f"A random choice of as many layers{repaired}{',' * bool(repaired)} keeps {_percent(chances[0])}."
    better = sum(chance >= kept for chance in chances)
    return (
        f"Of {len(chances)} random choices of as many layers{repaired}, {better or 'none'} "
        f"keep{'s' if better == 1 else ''} as much or more (the best {_percent(max(chances))})."
    )


def judgement(row: Row, guess: float | None = None) -> str:
    """What an interval says of the claim that over 90% are kept, where a guess keeps less (`kept_by_guess`)."""
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


def _one(rows: Sequence[Row], score: str, control: str | None = None) -> Row | None:
    """The row of a score as it is published, with a control or without."""
    wanted = (row for row in rows if (row["score"], row["control"]) == (score, control) and _is_published(row))
    return next(wanted, None)


def _is_published(row: Row) -> bool:
    """Whether a row is of AVSS as published, or of another score; schema 2 has the reading in the label alone."""
    reading = tuple(row.get(name) for name in ("site", "recipe", "threshold", "threshold_kind"))
    return "(" not in row["method"] if None in reading else reading == PUBLISHED


def _is_whole(row: Row) -> bool:
    return row["score"] is None


def _kept(row: Row) -> str:
    ends = retention_interval(row)
    interval = f" ({_percent(ends[0])} to {_percent(ends[1])})" if ends else ""
    return f"{_percent(row['retention'])}{interval} is kept"


def retention_interval(row: Row) -> tuple[float, float] | None:
    """Return the ends of a row's interval of retention; None if it has none."""
    low, high = row.get("retention_low"), row.get("retention_high")
    return (low, high) if low is not None and high is not None and isfinite(low) and isfinite(high) else None


def lacks_interval(rows: Sequence[Row]) -> bool:
    """Whether the retention of some row beside the whole model's has no interval."""
    return any(not _is_whole(row) and retention_interval(row) is None for row in rows)


def _before_and_after(row: Row, rows: Sequence[Row]) -> str:
    whole = next(filter(_is_whole, rows), None)
    if whole is None:
        return ""
    return f" ({describe_metric(row['metric'])} {shown_value(whole)}, then {shown_value(row)})"


def shown_method(row: Row) -> str:
    """Return the name of a method: how layers were chosen, their residual scale, and the repair."""
    scaled = f" x {row['factor']:g}" if row.get("factor") else ""
    return f"{row['method']}{scaled} + {row['repair']}" if row.get("repair") else f"{row['method']}{scaled}"


def shown_value(row: Row) -> str:
    """Return a result as people read it: of a loss, the perplexity."""
    return metric_format(row["metric"])(readable_value(row["metric"], row["value"]))


def readable_value(metric: str, value: float) -> float:
    """Return a result in the unit that people read: of a loss, the perplexity."""
    return exp(min(value, 700)) if metric == LOSS else value


def metric_format(metric: str) -> Callable[[float], str]:
    """Return the format of a `readable_value`."""
    return (lambda value: f"{value:,.4g}") if metric == LOSS else (lambda value: f"{value:z.3f}")


def describe_metric(metric: str) -> str:
    """Return the name of the metric that people read: of a loss, the perplexity."""
    return "perplexity" if metric == LOSS else metric


def describe_task(task: str) -> str:
    """Return the name of a task without the folders of its text."""
    name, colon, rest = task.partition(":")
    return f"{name}: {basename(rest)}" if colon else basename(task)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"
