"""Layer scores along an axis, such as training steps or model size: how ranks move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.compare import CONDITIONS, Profile, condition, differing, profiles, runs_with_conditions
from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.registry import FROM_ACTIVATIONS
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename, count_of, describe_count, printable
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import MIN_VALUES, average_ranks, count_lowest, rank_lowest, spearman_rows
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

MIN_POINTS = 2  # of a curve
MIN_TREND = 4  # points from which the correlation of a rank with the axis is told

SCHEMA = pa.schema(
    [
        ("along", pa.string()),
        ("curve", pa.string()),
        ("point", pa.string()),
        ("value", pa.float64()),
        ("run_id", pa.string()),
        ("layer", pa.int64()),
        ("depth", pa.float64()),
        ("score", pa.float64()),
        ("rank", pa.float64()),
        ("is_lowest", pa.bool_()),
    ]
)
"""Columns of a layer at a point of a curve.

``value`` is the place on the axis. ``rank`` is 1 for the lowest score, and the mean rank of tied ones.
``is_lowest`` layers are among the lowest 25%.
"""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A property of runs along which layer scores are followed.

    Attributes:
        column: column of ``runs`` with the place on the axis, a number.
        same: columns of ``runs`` in which the runs of a curve are equal, besides the conditions of a comparison.
    """

    column: str
    same: tuple[str, ...]


AXES: Mapping[str, Axis] = {
    "step": Axis(column="training_step", same=("series",)),
    "tokens": Axis(column="training_tokens", same=("series",)),
    "size": Axis(column="num_parameters", same=("family",)),
    "sequence_length": Axis(column="sequence_length", same=("model", "revision")),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Scores of layers at the points of an axis, under conditions that are the same but for the axis.

    Models of different depth are compared at the relative depths of the one with the fewest layers.

    Attributes:
        along: name of the axis, of `AXES`.
        name: what the runs have in common, such as the name of a training.
        runs: row of ``runs`` of each point, in the order of the axis.
        layers: numbers of the layers, of the model with the fewest.
        depth: their relative depth, float64[layers].
        values: the score, float64[points, layers].
    """

    along: str
    name: str
    runs: Sequence[Mapping[str, Any]]
    layers: Sequence[int]
    depth: Float64
    values: Float64

    @property
    def points(self) -> list[str]:
        """Name of each point, such as ``1,000``."""
        return [describe_count(run[AXES[self.along].column]) for run in self.runs]

    @cached_property
    def ranks(self) -> Float64:
        """Ranks of the layers at each point, float64[points, layers]: 1 for the lowest, tied ones get their mean."""
        return average_ranks(self.values)

    @property
    def is_lowest(self) -> Any:
        """Whether each layer is among the lowest 25% at each point, bool[points, layers]."""
        return rank_lowest(self.values) <= count_lowest(len(self.depth))

    @property
    def with_last(self) -> Float64:
        """Spearman's rho of the ranking of each point with that of the last, float64[points]."""
        return spearman_rows(self.values, np.broadcast_to(self.values[-1], self.values.shape))

    @property
    def with_previous(self) -> Float64:
        """Spearman's rho of the ranking of each point with that of the one before it; NaN for the first."""
        return np.concatenate([[np.nan], spearman_rows(self.values[1:], self.values[:-1])])

    @property
    def trend(self) -> Float64:
        """Spearman's rho of the rank of each layer with the axis, float64[layers].

        NaN for fewer than `MIN_TREND` points.
        """
        if len(self.runs) < MIN_TREND:
            return np.full(len(self.depth), np.nan)
        order = np.arange(len(self.runs), dtype=np.float64)
        return spearman_rows(self.ranks.T, np.broadcast_to(order, self.ranks.T.shape))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row of `SCHEMA` for each point and layer."""
        column, lowest = AXES[self.along].column, self.is_lowest
        for point, (run, text) in enumerate(zip(self.runs, self.points, strict=True)):
            for place, (layer, depth) in enumerate(zip(self.layers, self.depth.tolist(), strict=True)):
                yield {
                    "along": self.along,
                    "curve": self.name,
                    "point": text,
                    "value": float(run[column]),
                    "run_id": run["run_id"],
                    "layer": layer,
                    "depth": depth,
                    "score": self.values[point, place],
                    "rank": self.ranks[point, place],
                    "is_lowest": bool(lowest[point, place]),
                }


@dataclass(frozen=True, kw_only=True, repr=False)
class RankingCurves(TabularResult):
    """Curves of layer scores along an axis, and the runs that are on none.

    Attributes:
        curves: the curves, those with the most points first.
        left_out: the reason why a run is on no curve, by run id.
    """

    curves: Sequence[Curve]
    left_out: Mapping[str, str]

    def table(self) -> pa.Table:
        """Return a table of `SCHEMA`, with a row for each point and layer of each curve."""
        return pa.Table.from_pylist([row for curve in self.curves for row in curve.rows()], SCHEMA)

    def summary(self) -> str:
        """Return the numbers of curves and of points, in words."""
        points = sum(len(curve.runs) for curve in self.curves)
        return f"{count_of(len(self.curves), 'curve')} of {count_of(points, 'point')}"


def ranking_curves(
    warehouse: Warehouse,
    run_ids: Sequence[str],
    *,
    along: str,
    site: str = "block",
    recipe: str = "pooled",
    threshold: Threshold,
    score: str = "avss",
    allow_mismatch: bool = False,
) -> RankingCurves:
    """Follow the layer scores of runs along an axis.

    A curve consists of runs of one training (``step``, ``tokens``), of one family (``size``), or of one checkpoint. Of
    several runs at one place, the newest is taken.

    Args:
        warehouse: warehouse of the runs.
        run_ids: ids of finished runs.
        along: the axis, of `AXES`.
        site, recipe, threshold, score: the score that ranks the layers.
        allow_mismatch: also follow runs under conditions that differ in more than the axis.

    Raises:
        QueryError: an unknown axis, or no two runs are on one curve.
    """
    require_known("`along`", along, AXES, QueryError)
    require_known("score", score, FROM_ACTIVATIONS, QueryError)
    runs = runs_with_conditions(warehouse, run_ids)
    scored = profiles(warehouse, runs, site=site, recipe=recipe, threshold=threshold, score=score)
    curves = curves_of(scored, along, allow_mismatch=allow_mismatch)
    followed = {run["run_id"] for curve in curves for run in curve.runs}
    with_scores = {profile.run["run_id"] for profile in scored}
    left_out = {run["run_id"]: _reason(run, along, with_scores) for run in runs if run["run_id"] not in followed}
    if not curves:
        why = "; ".join(dict.fromkeys(left_out.values())) or "there are no runs"
        raise QueryError(f"No two runs are along {along}: {why}.", _advice(along, allow_mismatch))
    return RankingCurves(curves=curves, left_out=left_out)


def curves_of(scored: Sequence[Profile], along: str, *, allow_mismatch: bool = False) -> list[Curve]:
    """Return the curves of profiles along an axis, those with the most points first; see `ranking_curves`."""
    groups: dict[tuple[Any, ...], dict[Any, Profile]] = {}
    equal = () if allow_mismatch else _conditions(along)
    for profile in sorted(scored, key=lambda profile: str(profile.run["created_at"])):
        if _is_placed(profile.run, along) and len(profile.depth) >= MIN_VALUES and np.isfinite(profile.values).all():
            key = (*_same(profile.run, along), *(condition(profile.run, name) for name in equal))
            groups.setdefault(key, {})[profile.run[AXES[along].column]] = profile
    members = [list(group.values()) for group in groups.values() if len(group) >= MIN_POINTS]
    names = _names(along, [group[0].run for group in members])
    curves = [_curve(along, name, group) for name, group in zip(names, members, strict=True)]
    return sorted(curves, key=lambda curve: (-len(curve.runs), curve.name))


def _is_placed(run: Mapping[str, Any], along: str) -> bool:
    """Whether it is known where a run is on an axis, and on which curve."""
    return run[AXES[along].column] is not None and None not in _same(run, along)


def _reason(run: Mapping[str, Any], along: str, with_scores: Set[str]) -> str:
    """Return why a run is on no curve."""
    if not _is_placed(run, along):
        return f"its {along} is not known"
    if run["run_id"] not in with_scores:
        return "it has no such scores"
    return f"no other run differs from it in {along} alone, or a newer one is at its place"


def _advice(along: str, allow_mismatch: bool) -> str:
    """Return what a user can do if there is no curve along an axis."""
    same = " and ".join(AXES[along].same)
    mismatch = "" if allow_mismatch else ", or set `allow_mismatch` if it is their text or settings that differ"
    return f"Score runs of the same {same} that differ in {along}{mismatch}. Axes: {', '.join(AXES)}."


def _same(run: Mapping[str, Any], along: str) -> tuple[Any, ...]:
    return tuple(run[name] for name in AXES[along].same)


def _conditions(along: str) -> tuple[str, ...]:
    """Return the conditions of a comparison that are equal along a curve."""
    return tuple(name for name in CONDITIONS if name != AXES[along].column)


def _names(along: str, firsts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each curve, given its first run: the model or training, and what tells curves apart."""
    subject, *others = AXES[along].same
    telling = differing(firsts, (*others, *_conditions(along)))

    def described(run: Mapping[str, Any]) -> str:
        details = [f"{name} {basename(str(run.get(f'{name}_name') or run[name]))}" for name in telling]
        return printable(", ".join([str(run[subject]), *details]))

    return [described(run) for run in firsts]


def _curve(along: str, name: str, group: Sequence[Profile]) -> Curve:
    """Return the curve of the profiles at different places of an axis."""
    ordered = sorted(group, key=lambda profile: profile.run[AXES[along].column])
    shallowest = min(ordered, key=lambda profile: len(profile.depth))
    depth, number = shallowest.depth, shallowest.run["num_layers"] or len(shallowest.depth)
    values = np.array([np.interp(depth, profile.depth, profile.values) for profile in ordered])
    return Curve(
        along=along,
        name=name,
        runs=[profile.run for profile in ordered],
        layers=np.rint(depth * number - 0.5).astype(int).tolist(),
        depth=depth,
        values=values,
    )
