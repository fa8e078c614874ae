"""Layer scores along an axis, such as training steps or model size: how ranks move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.comparison import (
    CONDITIONS,
    Profile,
    condition,
    differing,
    own_profiles,
    profiles,
    runs_with_conditions,
)
from avss_dist.analysis.section import Chart, ReportColumn, ReportTable, Section
from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.registry import FROM_ACTIVATIONS, is_own
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename, count_of, describe_count, printable
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import MIN_VALUES, average_ranks, count_lowest, rank_lowest, spearman_rows
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

MIN_POINTS = 2  # of a curve
MAX_DRAWN = 12  # curves in a picture
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


AXES = {
    "step": "training_step",
    "tokens": "training_tokens",
    "size": "num_parameters",
    "sequence_length": "sequence_length",
}
"""Axes along which layer scores are followed, each with the column of ``runs`` that has the place on it, a number."""
AXIS_TITLES = {
    "step": "training step",
    "tokens": "tokens trained on",
    "size": "parameters",
    "sequence_length": "tokens in a row",
}
SAME = {"step": ("series",), "tokens": ("series",), "size": ("family",), "sequence_length": ("model", "revision")}
"""Columns of ``runs`` in which the runs of a curve are equal by axis, besides the conditions of a comparison."""


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
        return [describe_count(run[AXES[self.along]]) for run in self.runs]

    @cached_property
    def ranks(self) -> Float64:
        """Ranks of the layers at each point, float64[points, layers]: 1 for the lowest, tied ones get their mean."""
        return average_ranks(self.values)

    @property
    def is_lowest(self) -> Any:
        """Whether each layer is among the lowest 25% at each point, bool[points, layers]."""
        return rank_lowest(self.values) <= count_lowest(len(self.depth))

    @property
    def trend(self) -> Float64:
        """Spearman's rho of the rank of each layer with the axis, float64[layers].

        NaN for fewer than `MIN_TREND` points.
        """
        if len(self.runs) < MIN_TREND:
            return np.full(len(self.depth), np.nan)
        return spearman_rows(self.ranks.T, np.broadcast_to(np.arange(float(len(self.runs))), self.ranks.T.shape))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row of `SCHEMA` for each point and layer."""
        of_points = self.values.tolist(), self.ranks.tolist(), self.is_lowest.tolist()
        for run, point, scores, ranks, lowest in zip(self.runs, self.points, *of_points, strict=True):
            about = {
                "along": self.along,
                "curve": self.name,
                "point": point,
                "value": float(run[AXES[self.along]]),
                "run_id": run["run_id"],
            }
            for layer, depth, score, rank, is_lowest in zip(
                self.layers, self.depth.tolist(), scores, ranks, lowest, strict=True
            ):
                yield about | {"layer": layer, "depth": depth, "score": score, "rank": rank, "is_lowest": is_lowest}


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
        site, recipe, threshold, score: the score that ranks the layers. One of people's own (`own_scores.own_score`)
            has no site, recipe and threshold.
        allow_mismatch: also follow runs under conditions that differ in more than the axis.

    Raises:
        QueryError: an unknown axis, or no two runs are on one curve.
    """
    require_known("`along`", along, AXES, QueryError)
    runs = runs_with_conditions(warehouse, run_ids)
    if is_own(score):
        scored = own_profiles(warehouse, runs, score)
    else:
        require_known("score", score, FROM_ACTIVATIONS, QueryError)
        scored = profiles(warehouse, runs, site=site, recipe=recipe, threshold=threshold, score=score)
    curves = curves_of(scored, along, allow_mismatch=allow_mismatch)
    followed = {run["run_id"] for curve in curves for run in curve.runs}
    with_scores = {profile.run["run_id"] for profile in scored}
    alone = [run for run in runs if run["run_id"] not in followed]
    nowhere = f"no other run differs from it in {along} alone, or a newer one is at its place"
    left_out = {run["run_id"]: nowhere if run["run_id"] in with_scores else "it has no such scores" for run in alone}
    left_out |= {run["run_id"]: f"its {along} is not known" for run in alone if None in _place(run, along)}
    if not curves:
        why = "; ".join(dict.fromkeys(left_out.values())) or "there are no runs"
        mismatch = "" if allow_mismatch else ", or set `allow_mismatch` if it is their text or settings that differ"
        raise QueryError(
            f"No two runs are along {along}: {why}.",
            f"Score runs of the same {' and '.join(SAME[along])} that differ in {along}{mismatch}. "
            f"Axes: {', '.join(AXES)}.",
        )
    return RankingCurves(curves=curves, left_out=left_out)


def curves_of(scored: Sequence[Profile], along: str, *, allow_mismatch: bool = False) -> list[Curve]:
    """Return the curves of profiles along an axis as `ranking_curves` does, those with the most points first."""
    groups: dict[tuple[Any, ...], dict[Any, Profile]] = {}
    conditions = [name for name in CONDITIONS if name != AXES[along]]
    equal = () if allow_mismatch else conditions
    for profile in sorted(scored, key=lambda profile: str(profile.run["created_at"])):
        place, *same = _place(profile.run, along)
        if None not in (place, *same) and len(profile.depth) >= MIN_VALUES and np.isfinite(profile.values).all():
            groups.setdefault((*same, *(condition(profile.run, name) for name in equal)), {})[place] = profile
    members = [[group[place] for place in sorted(group)] for group in groups.values() if len(group) >= MIN_POINTS]
    oldest = [next(iter(group.values())).run for group in groups.values() if len(group) >= MIN_POINTS]
    telling, curves = differing(oldest, (*SAME[along][1:], *conditions)), []
    for first, group in zip(oldest, members, strict=True):
        details = [f"{name} {basename(str(first.get(f'{name}_name') or first[name]))}" for name in telling]
        shallowest = min(group, key=lambda profile: len(profile.depth))
        depth, number = shallowest.depth, shallowest.run["num_layers"] or len(shallowest.depth)
        curves.append(
            Curve(
                along=along,
                name=printable(", ".join([str(first[SAME[along][0]]), *details])),
                runs=[profile.run for profile in group],
                layers=np.rint(depth * number - 0.5).astype(int).tolist(),
                depth=depth,
                values=np.array([np.interp(depth, profile.depth, profile.values) for profile in group]),
            )
        )
    return sorted(curves, key=lambda curve: (-len(curve.runs), curve.name))


def _place(run: Mapping[str, Any], along: str) -> tuple[Any, ...]:
    """Return the place of a run on an axis and the values that its curve shares, with None for unknown ones."""
    return tuple(run[name] for name in (AXES[along], *SAME[along]))


def curve_section(curve: Curve, name: str) -> Section:
    """Return the section of a curve: where its lowest layers settle, a heat map, and tables of points and layers.

    Args:
        name: base name of its files.
    """
    axis, points, values, is_lowest = AXIS_TITLES[curve.along], curve.points, curve.values, curve.is_lowest
    lowest = [", ".join(str(curve.layers[place]) for place in np.flatnonzero(row).tolist()) for row in is_lowest]
    settled = max((index for index, layers in enumerate(lowest) if layers != lowest[-1]), default=-1) + 1
    with_previous = [np.nan, *spearman_rows(values[1:], values[:-1]).tolist()]
    with_last = spearman_rows(values, np.broadcast_to(values[-1], values.shape)).tolist()
    of_points = [
        ReportColumn(axis, points),
        ReportColumn("run", [run["run_id"] for run in curve.runs], number=False, priority=5),
        ReportColumn("with the one before", with_previous, "{:z.3f}".format, group="Spearman"),
        ReportColumn("with the last", with_last, "{:z.3f}".format, group="Spearman"),
        ReportColumn("lowest 25%", lowest, number=False, priority=2, wraps=True),
    ]
    ranks, trend = curve.ranks, curve.trend.tolist()
    of_layers = [
        ReportColumn("layer", curve.layers),
        ReportColumn("depth", curve.depth.tolist(), "{:z.2f}".format, priority=4),
        ReportColumn("first", ranks[0].tolist(), "{:g}".format, group="rank"),
        ReportColumn("last", ranks[-1].tolist(), "{:g}".format, group="rank"),
        ReportColumn("lowest", ranks.min(axis=0).tolist(), "{:g}".format, group="rank", priority=3),
        ReportColumn("highest", ranks.max(axis=0).tolist(), "{:g}".format, group="rank", priority=3),
        *([ReportColumn("trend", trend, "{:z.2f}".format, priority=1)] if len(curve.runs) >= MIN_TREND else []),
        ReportColumn("among the lowest", is_lowest.mean(axis=0).tolist(), "{:z.0%}".format, priority=1),
    ]
    number = len(curve.depth)
    distinct = [text if points.count(text) == 1 else f"{text} ({n})" for n, text in enumerate(points, start=1)]
    cells = [
        {
            "point": label,
            "layer": layer,
            "run": run["run_id"],
            "rank": float(rank),
            "share": round(float((rank - 1) / (number - 1)), 4),
        }
        for label, run, of_point in zip(distinct, curve.runs, ranks, strict=True)
        for layer, rank in zip(curve.layers, of_point, strict=True)
    ]
    return Section(
        label=f"{curve.name} along {axis}",
        sentences=[f"The lowest 25% are those of the last point from {points[settled]} on."],
        charts=[
            Chart(
                name=name,
                title=f"Ranks along {axis}",
                meaning="A column for each point, a cell for each layer; dark layers are the least important.",
                rows=cells,
                draw=partial(_drawing, curve.along, number),
            )
        ],
        tables=[
            ReportTable(name=f"{name}-points", title="Points", columns=of_points),
            ReportTable(
                name=name,
                title="Layers",
                columns=of_layers,
                caption="Rank 1 is the lowest score. Trend: Spearman's correlation of the rank with the axis. Among "
                "the lowest: the share of points at which the layer is in the lowest 25%.",
            ),
        ],
    )


def curves_chart(curves: Sequence[Curve]) -> Any:
    """Return the heat maps of up to `MAX_DRAWN` curves, one above the other."""
    import altair as alt

    charts = []
    for number, curve in enumerate(curves[:MAX_DRAWN], start=1):
        section = curve_section(curve, f"curve-{number}")
        (chart,) = section.charts
        title = alt.TitleParams(section.label, subtitle=list(section.sentences), anchor="start")
        charts.append(
            chart.draw().properties(width=560, title=title).properties(data=alt.InlineData(values=list(chart.rows)))
        )
    return alt.vconcat(*charts).properties(padding=12)


def _drawing(along: str, number: int) -> Any:
    """Return the heat map of ranks by point and layer.

    Args:
        number: number of layers.
    """
    import altair as alt

    legend = alt.Legend(title="rank: 0 least, 1 most important", orient="top", direction="horizontal", titleLimit=240)
    return (
        alt.Chart()
        .mark_rect()
        .properties(height=max(120, 11 * number))
        .encode(
            x=alt.X(
                "point:N",
                sort=None,
                title=AXIS_TITLES[along],
                axis=alt.Axis(labelAngle=-45, labelOverlap="greedy", labelLimit=120, grid=False),
            ),
            y=alt.Y("layer:O", sort="descending", title="layer").axis(labelOverlap="greedy"),
            color=alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend),
            tooltip=["point:N", "run:N", "layer:Q", alt.Tooltip("rank:Q", format=".1f")],
        )
    )
