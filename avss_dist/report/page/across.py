"""What the report's page knows of runs beside each other: how far their rankings agree, and which are one training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avss_dist.analysis.agreement import Scores, rank_correlations, summarize
from avss_dist.analysis.compare import CONDITIONS, condition, with_conditions
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import FEWEST, depth_correlation
from avss_dist.text import count_of, describe_count, printable

DIGITS = 3  # after the point, of correlations
SHORTEST = 3  # checkpoints of a series that is drawn
Row = Mapping[str, Any]  # of the table `runs`


def correlations(profiles: Mapping[int, Scores]) -> dict[str, Any]:
    """Return the rank correlations of every two runs, and what they say: ``pairs`` and ``summary``.

    They are those of `analysis.agreement.rank_correlations`, which `avss compare` shows too.

    Args:
        profiles: by run, depth and score of its layers: float64[layers] each, ascending in depth.

    Returns:
        ``pairs``: a row for each pair, and for each run with itself: its correlation with depth, and None. None
        stands for a correlation that is not defined. ``summary``: a sentence, empty where there is no pair.
    """
    runs = [run for run in sorted(profiles) if len(profiles[run][0]) >= FEWEST]
    with_depth = [[run, run, _short(depth_correlation(profiles[run][1].tolist())), None] for run in runs]
    pairs = np.array([*combinations(range(len(runs)), 2)], np.int64).reshape(-1, 2)
    rho, partial = rank_correlations([profiles[run] for run in runs], *pairs.T)
    between = [
        [runs[i], runs[j], _short(whole), _short(given)]
        for (i, j), whole, given in zip(pairs, rho, partial, strict=True)
    ]
    return {"pairs": with_depth + between, "summary": _summary(np.array(runs)[pairs], rho, partial)}


def _summary(pairs: NDArray[np.int64], rho: Float64, partial: Float64) -> str:
    """Say how far runs agree, and which two agree least. Runs are numbered from 1, as their labels are."""
    whole, given = summarize(rho), summarize(partial)
    if not whole.count:
        return ""
    median = f"The median of {count_of(whole.count, 'pair')} is {whole.median:z.3f}"
    beside_depth = f", and {given.median:z.3f} given depth" if given.count else ""
    first, second = pairs[np.nanargmin(rho)] + 1
    return f"{median}{beside_depth}; least alike are runs {first} and {second} ({whole.lowest:z.3f})."


def training_series(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """Checkpoints of one training, scored alike: ``name``; in the order of training, positions of its ``runs``, and
    when each was ``saved``.

    Args:
        runs: rows of ``runs``.
    """
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for position, run in sorted(enumerate(runs), key=lambda item: in_training(item[1])):
        if run["series"] is not None and run["revision"] is not None:
            conditions = with_conditions(run)
            alike = (condition(conditions, name) for name in CONDITIONS)
            found.setdefault((run["series"], *alike), {})[run["revision"]] = position
    return [
        {
            "name": printable(key[0]),
            "runs": [*by_revision.values()],
            "saved": [_saved(runs[i]) for i in by_revision.values()],
        }
        for key, by_revision in found.items()
        if len(by_revision) >= SHORTEST
    ]


def _saved(run: Row) -> str:
    step, tokens = run["training_step"], run["training_tokens"]
    if step is not None:
        return f"step {step:,}"
    return (
        f"{describe_count(tokens)} tokens" if tokens is not None else printable(run["revision_name"] or run["revision"])
    )


def in_training(run: Row) -> tuple[Any, ...]:
    """A sort key: when in its training a checkpoint was saved; then when it was scored."""
    return (run["training_step"] or 0, run["training_tokens"] or 0, str(run["created_at"]), run["run_id"])


def differing(runs: Sequence[Row]) -> list[str]:
    """Those of `compare.CONDITIONS` in which runs differ."""
    rows = [with_conditions(run) for run in runs]
    return [name for name in CONDITIONS if len({str(condition(row, name)) for row in rows}) > 1]


def _short(value: float) -> float | None:
    return round(float(value), DIGITS) + 0.0 if np.isfinite(value) else None  # + 0.0: no negative zero
