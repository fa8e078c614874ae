"""What the report's page knows of runs beside each other: how far their rankings agree, and which are one training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from avss_dist.analysis.compare import CONDITIONS, condition, with_conditions
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import FEWEST, given_depth
from avss_dist.text import describe_count, printable

DIGITS = 3  # after the point, of correlations
SHORTEST = 3  # checkpoints of a series that is drawn
Row = Mapping[str, Any]  # of the table `runs`
Pair = list[Any]  # first run, second run, Spearman's coefficient, the same given depth


def correlations(profiles: Mapping[int, tuple[Float64, Float64]]) -> list[Pair]:
    """Of every two runs, Spearman's coefficient and what is left of it given depth; of every run, that with depth.

    As `agreement.correlate` has it, all pairs at once: at the depths of the shallower of two models.

    Args:
        profiles: by run, depth and score of its layers: float64[layers] each, ascending in depth.

    Returns:
        A row for each pair, and for each run with itself, whose second coefficient is None. So is one that nothing
        finite is known of.
    """
    from scipy.stats import rankdata  # a second to import

    runs = sorted(profiles)
    grid_of = {run: tuple(profiles[run][0]) for run in runs}
    found: list[Pair] = []
    for grid in dict.fromkeys(grid for grid in grid_of.values() if len(grid) >= FEWEST):
        deep = [run for run in runs if len(grid_of[run]) >= len(grid)]
        ranks = rankdata([grid, *(np.interp(grid, *profiles[run]) for run in deep)], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            matrix = np.corrcoef(ranks)
            of_depth, rho = matrix[0, 1:], matrix[1:, 1:]
        given = given_depth(rho, of_depth[:, None], of_depth)
        found += [[run, run, _short(of_depth[i]), None] for i, run in enumerate(deep) if grid_of[run] == grid]
        for i, j in combinations(range(len(deep)), 2):
            pair = deep[i], deep[j]
            if min((grid_of[run] for run in pair), key=len) == grid:
                found.append([*pair, _short(rho[i, j]), _short(given[i, j])])
    return found


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
    return round(float(value), DIGITS) if np.isfinite(value) else None
