"""Layer scores along an axis, such as training steps or model size: how ranks move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avss_dist.analysis.changes import Reading, SeriesChanges, series_changes
from avss_dist.analysis.comparison import (
    CONDITIONS,
    Profile,
    condition,
    differing,
    own_profiles,
    profiles,
    runs_with_conditions,
)
from avss_dist.analysis.rank_map import RankMap, map_axis
from avss_dist.analysis.section import (
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    interval,
    known_interval,
)
from avss_dist.core.errors import QueryError, WarehouseError, require_known
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename, count_of, describe_count, printable
from avss_dist.core.values import NewRow, TableRow
from avss_dist.read_requests import AXES
from avss_dist.stats.catalog import FROM_ACTIVATIONS, is_own
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import MIN_VALUES, average_ranks, count_lowest, rank_lowest, spearman_rows
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

if TYPE_CHECKING:
    from altair.typing import ChartType

MIN_POINTS = 2  # of a curve
MAX_DRAWN = 12  # curves in a picture
MIN_TREND = 4  # points from which the correlation of a rank with the axis is told
MAX_SHARDS = 5_000  # shards that are read to test changes of one training; one takes about 15 ms of processor time
MAX_SHARDS_OF_SEVERAL = 500  # of several trainings together, so that a look at a whole warehouse stays fast
SETTLED = 0.95  # share of resamples from which on the lowest layers are said to be those of the last point
TRAINING = ("step", "tokens")
"""Axes whose curves are trainings."""

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
        ("change", pa.float64()),
        ("change_p", pa.float64()),
        ("is_changed", pa.bool_()),
        ("rank_moved", pa.bool_()),
        ("spearman", pa.float64()),
        ("spearman_low", pa.float64()),
        ("spearman_high", pa.float64()),
        ("lowest_as_last", pa.float64()),
        ("no_claim", pa.string()),
    ]
)
"""Columns of a layer at a point of a curve.

``value`` is the place on the axis. ``rank`` is 1 for the lowest score, and the mean rank of tied ones.
``is_lowest`` layers are among the lowest 25%.

The others are of trainings, where changes can be tested, and else null: see `SeriesChanges`. ``change`` and the three
columns after it compare the layer with the point before, ``spearman`` and its interval the point with the one before.
``lowest_as_last`` is of the point. ``no_claim`` says why nothing is claimed about changes.
"""


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
        changes: changes of a training that are beyond the choice of text; None if nothing is claimed about them.
        no_claim: the reason why nothing is claimed; empty if it is, or if nobody asked for it.
    """

    along: str
    name: str
    runs: Sequence[TableRow]
    layers: Sequence[int]
    depth: Float64
    values: Float64
    changes: SeriesChanges | None = None
    no_claim: str = ""

    @property
    def points(self) -> list[str]:
        """Name of each point, such as ``1,000``."""
        return [describe_count(run[AXES[self.along]]) for run in self.runs]

    @cached_property
    def ranks(self) -> Float64:
        """Ranks of the layers at each point, float64[points, layers]: 1 for the lowest, tied ones get their mean."""
        return average_ranks(self.values)

    @property
    def is_lowest(self) -> NDArray[np.bool_]:
        """Whether each layer is among the lowest 25% at each point, bool[points, layers]."""
        is_lowest: NDArray[np.bool_] = rank_lowest(self.values) <= count_lowest(len(self.depth))
        return is_lowest

    @property
    def has_trend(self) -> bool:
        """Whether there are enough points for a `trend`."""
        return len(self.runs) >= MIN_TREND

    @property
    def trend(self) -> Float64:
        """Spearman's rho of the rank of each layer with the axis, float64[layers].

        NaN for fewer than `MIN_TREND` points.
        """
        if not self.has_trend:
            return np.full(len(self.depth), np.nan)
        ranks_of_layers = self.ranks.T
        order = np.arange(float(len(self.runs)))
        return spearman_rows(ranks_of_layers, np.broadcast_to(order, ranks_of_layers.shape))

    def rows(self) -> Iterator[NewRow]:
        """Yield a row of `SCHEMA` for each point and layer."""
        depth = self.depth.tolist()
        values = self.values.tolist()
        ranks = self.ranks.tolist()
        is_lowest = self.is_lowest.tolist()
        for place, (run, point) in enumerate(zip(self.runs, self.points, strict=True)):
            value_on_axis = float(run[AXES[self.along]])
            of_changes = _change_columns(self.changes, place)
            for column, layer in enumerate(self.layers):
                yield {
                    "along": self.along,
                    "curve": self.name,
                    "point": point,
                    "value": value_on_axis,
                    "run_id": run["run_id"],
                    "layer": layer,
                    "depth": depth[column],
                    "score": values[place][column],
                    "rank": ranks[place][column],
                    "is_lowest": is_lowest[place][column],
                    "no_claim": self.no_claim or None,
                    **of_changes.get(layer, {}),
                }


def _change_columns(changes: SeriesChanges | None, place: int) -> dict[int, NewRow]:
    """Return the columns of `SCHEMA` about changes of each layer at a point. Empty if nothing is claimed."""
    if changes is None:
        return {}
    columns: dict[int, NewRow] = {}
    for column, layer in enumerate(changes.layers):
        columns[layer] = {"lowest_as_last": changes.lowest_as_last[place].item()}
        if place == 0:
            continue
        before = place - 1
        rho, low, high = changes.agreement[:, before].tolist()
        columns[layer] |= {
            "change": changes.change[before, column].item(),
            "change_p": changes.p[before, column].item(),
            "is_changed": bool(changes.is_changed[before, column]),
            "rank_moved": bool(changes.rank_moved[before, column]),
            "spearman": rho,
            "spearman_low": low,
            "spearman_high": high,
        }
    return columns


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
        rows: list[NewRow] = []
        for curve in self.curves:
            rows += curve.rows()
        return pa.Table.from_pylist(rows, SCHEMA)

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
    several runs at one place, the newest is taken. Of a training, the shards of its runs say which layers changed
    beyond the choice of text.

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
    left_out = _reasons_left_out(runs, scored, curves, along)
    if not curves:
        reasons = "; ".join(dict.fromkeys(left_out.values())) or "there are no runs"
        same = " and ".join(SAME[along])
        mismatch = ", or set `allow_mismatch` if it is their text or settings that differ"
        if allow_mismatch:
            mismatch = ""
        raise QueryError(
            f"No two runs are along {along}: {reasons}.",
            f"Score runs of the same {same} that differ in {along}{mismatch}. Axes: {', '.join(AXES)}.",
        )
    reading = Reading(site=site, recipe=recipe, threshold=threshold, score=score)
    return RankingCurves(curves=with_changes(warehouse, curves, reading), left_out=left_out)


def with_changes(warehouse: Warehouse, curves: Sequence[Curve], reading: Reading) -> list[Curve]:
    """Return curves, those of trainings with their changes, or the reason why nothing is claimed about them."""
    trainings = [curve for curve in curves if curve.along in TRAINING]
    limit = MAX_SHARDS if len(trainings) == 1 else MAX_SHARDS_OF_SEVERAL
    tested = []
    num_shards = 0
    for curve in curves:
        if curve.along not in TRAINING:
            tested.append(curve)
            continue
        of_curve = sum(run["num_shards"] or 0 for run in curve.runs)
        if num_shards + of_curve > limit:
            tested.append(replace(curve, no_claim=_describe_limit(of_curve, limit, len(trainings))))
            continue
        try:
            tested.append(replace(curve, changes=series_changes(warehouse, curve.runs, reading)))
            num_shards += of_curve
        except (QueryError, WarehouseError) as error:
            tested.append(replace(curve, no_claim=" ".join(filter(None, (error.message, error.hint)))))
    return tested


def _describe_limit(shards: int, limit: int, trainings: int) -> str:
    """Return the reason why the changes of a training with many shards are not tested."""
    if trainings == 1:
        return f"Its runs have {shards:,} shards, and {limit:,} are read. Choose fewer runs with `run`."
    return (
        f"Its runs have {shards:,} shards, and {limit:,} are read where several trainings are compared. Compare it "
        "alone: choose its runs with `run`."
    )


def _reasons_left_out(
    runs: Sequence[TableRow], scored: Sequence[Profile], curves: Sequence[Curve], along: str
) -> dict[str, str]:
    """Return the reason why a run is on no curve, by run id."""
    followed: set[str] = set()
    for curve in curves:
        followed.update(run["run_id"] for run in curve.runs)
    with_scores = {profile.run["run_id"] for profile in scored}
    reasons: dict[str, str] = {}
    for run in runs:
        run_id = run["run_id"]
        if run_id in followed:
            continue
        if not _has_place(run, along):
            reasons[run_id] = f"its {along} is not known"
        elif run_id not in with_scores:
            reasons[run_id] = "it has no such scores"
        else:
            reasons[run_id] = f"no other run differs from it in {along} alone, or a newer one is at its place"
    return reasons


def curves_of(scored: Sequence[Profile], along: str, *, allow_mismatch: bool = False) -> list[Curve]:
    """Return the curves of profiles along an axis as `ranking_curves` does, those with the most points first."""
    conditions = [name for name in CONDITIONS if name != AXES[along]]
    groups: dict[tuple[object, ...], dict[float, Profile]] = {}
    # From the oldest to the newest, so that the newest at a place replaces the others.
    for profile in sorted(scored, key=lambda profile: str(profile.run["created_at"])):
        if not _has_place(profile.run, along) or not _is_comparable(profile):
            continue
        key = [profile.run[name] for name in SAME[along]]
        if not allow_mismatch:
            key += [condition(profile.run, name) for name in conditions]
        groups.setdefault(tuple(key), {})[profile.run[AXES[along]]] = profile
    groups_of_curves = [group for group in groups.values() if len(group) >= MIN_POINTS]
    oldest = [next(iter(group.values())).run for group in groups_of_curves]
    telling = differing(oldest, (*SAME[along][1:], *conditions))
    curves = []
    for run, group in zip(oldest, groups_of_curves, strict=True):
        members = [group[place] for place in sorted(group)]
        curves.append(_curve(along, _curve_name(run, along, telling), members))
    return sorted(curves, key=lambda curve: (-len(curve.runs), curve.name))


def _is_comparable(profile: Profile) -> bool:
    """Whether a profile has enough layers to be ranked, all of them with a finite score."""
    return len(profile.depth) >= MIN_VALUES and bool(np.isfinite(profile.values).all())


def _curve_name(run: TableRow, along: str, telling: Sequence[str]) -> str:
    """Return the name of a curve: what its runs have in common.

    Args:
        run: one of its runs.
        telling: names of the conditions in which curves differ.
    """
    parts = [str(run[SAME[along][0]])]
    for name in telling:
        value = run.get(f"{name}_name") or run[name]
        parts.append(f"{name} {basename(str(value))}")
    return printable(", ".join(parts))


def _curve(along: str, name: str, members: Sequence[Profile]) -> Curve:
    """Return the curve of profiles, in the order of the axis, at the depths of the one with the fewest layers."""
    shallowest = min(members, key=lambda profile: len(profile.depth))
    depth = shallowest.depth
    num_layers = shallowest.run["num_layers"] or len(depth)
    # Layer i of n has the depth (i + 0.5) / n.
    layers = np.rint(depth * num_layers - 0.5).astype(int)
    values = [np.interp(depth, profile.depth, profile.values) for profile in members]
    return Curve(
        along=along,
        name=name,
        runs=[profile.run for profile in members],
        layers=layers.tolist(),
        depth=depth,
        values=np.array(values),
    )


def _has_place(run: TableRow, along: str) -> bool:
    """Whether the place of a run on an axis, and the values that its curve shares, are known."""
    if run[AXES[along]] is None:
        return False
    return all(run[name] is not None for name in SAME[along])


_COEFFICIENT = "{:z.3f}".format
_RANK = "{:g}".format
_POINT_COLUMNS = (
    ReportColumn("run", "run", number=False, priority=5),
    ReportColumn("with the one before", "with_previous", _COEFFICIENT, group="Spearman"),
    ReportColumn("with the last", "with_last", _COEFFICIENT, group="Spearman"),
)
_INTERVAL_COLUMN = ReportColumn("95%", "interval", interval(_COEFFICIENT), priority=1, group="Spearman")
_CHANGE_COLUMNS = (
    ReportColumn("changed", "changed", number=False, priority=1, wraps=True),
    ReportColumn("by rank", "moved", number=False, priority=1, wraps=True),
    ReportColumn("as the last", "lowest_as_last", "{:z.0%}".format, priority=1),
)
_LOWEST_COLUMN = ReportColumn("lowest 25%", "lowest", number=False, priority=2, wraps=True)
_LAYER_COLUMNS = (
    ReportColumn("layer", "layer"),
    ReportColumn("depth", "depth", "{:z.2f}".format, priority=4),
    ReportColumn("first", "first", _RANK, group="rank"),
    ReportColumn("last", "last", _RANK, group="rank"),
    ReportColumn("lowest", "lowest", _RANK, group="rank", priority=3),
    ReportColumn("highest", "highest", _RANK, group="rank", priority=3),
)
_TREND_COLUMN = ReportColumn("trend", "trend", "{:z.2f}".format, priority=1)
_AMONG_LOWEST_COLUMN = ReportColumn("among the lowest", "among_lowest", "{:z.0%}".format, priority=1)


def curve_section(curve: Curve, name: str) -> Section:
    """Return the section of a curve: where its lowest layers settle, a heat map, and tables of points and layers.

    Args:
        name: base name of its files.
    """
    axis = AXIS_TITLES[curve.along]
    lowest = _lowest_layers(curve)
    chart = _rank_map(curve).chart(name, f"Ranks along {axis}")
    layer_columns = list(_LAYER_COLUMNS)
    if curve.has_trend:
        layer_columns.append(_TREND_COLUMN)
    layer_columns.append(_AMONG_LOWEST_COLUMN)
    points = ReportTable(
        name=f"{name}-points",
        title="Points",
        columns=_point_columns(curve),
        rows=_point_rows(curve, lowest),
    )
    layers_table = ReportTable(
        name=name,
        title="Layers",
        columns=layer_columns,
        rows=_layer_rows(curve),
        caption="Rank 1 is the lowest score. Trend: Spearman's correlation of the rank with the axis. Among "
        "the lowest: the share of points at which the layer is in the lowest 25%.",
    )
    return Section(
        label=f"{curve.name} along {axis}",
        sentences=_sentences(curve, lowest),
        charts=[chart],
        tables=[points, layers_table],
    )


def _sentences(curve: Curve, lowest: Sequence[str]) -> list[str]:
    """Return from where on the lowest layers are those of the last point, and which changes are real, in sentences.

    Args:
        lowest: as returned by `_lowest_layers`.
    """
    settled = 0
    for place, layers in enumerate(lowest):
        if layers != lowest[-1]:
            settled = place + 1
    points = curve.points
    sentence = f"The lowest 25% are those of the last point from {points[settled]} on"
    if curve.changes is None:
        sentences = [f"{sentence}."]
        if curve.no_claim:
            sentences.append(f"Nothing is claimed about changes. {curve.no_claim}")
        return sentences
    shares = curve.changes.lowest_as_last
    sentence += f", so in {shares[settled]:.0%} of the joint resamples of the text"
    surely_settled = int(np.argmax(shares >= SETTLED))
    if surely_settled > settled:
        sentence += f"; in {SETTLED:.0%} of them from {points[surely_settled]} on"
    return [f"{sentence}.", *curve.changes.sentences(points)]


def _point_columns(curve: Curve) -> list[ReportColumn]:
    """Return the columns of the table of points."""
    run, with_previous, with_last = _POINT_COLUMNS
    columns = [ReportColumn(AXIS_TITLES[curve.along], "point"), run, with_previous]
    if curve.changes is None:
        return [*columns, with_last, _LOWEST_COLUMN]
    return [*columns, _INTERVAL_COLUMN, with_last, *_CHANGE_COLUMNS, _LOWEST_COLUMN]


def _lowest_layers(curve: Curve) -> list[str]:
    """Return the lowest 25% of the layers at each point, in words."""
    lowest = []
    for is_lowest in curve.is_lowest:
        places = np.flatnonzero(is_lowest).tolist()
        lowest.append(", ".join(str(curve.layers[place]) for place in places))
    return lowest


def _point_rows(curve: Curve, lowest: Sequence[str]) -> list[ReportRow]:
    """Return the rows of the table of points.

    Args:
        lowest: as returned by `_lowest_layers`.
    """
    values = curve.values
    with_previous = [np.nan, *spearman_rows(values[1:], values[:-1]).tolist()]
    with_last = spearman_rows(values, np.broadcast_to(values[-1], values.shape)).tolist()
    rows = []
    for place, (run, point) in enumerate(zip(curve.runs, curve.points, strict=True)):
        row = {
            "point": point,
            "run": run["run_id"],
            "with_previous": with_previous[place],
            "with_last": with_last[place],
            "lowest": lowest[place],
        }
        if curve.changes is not None:
            row |= _change_cells(curve.changes, place)
        rows.append(ReportRow(row))
    return rows


def _change_cells(changes: SeriesChanges, place: int) -> NewRow:
    """Return the cells of a point about its changes from the point before. The first point has none."""
    cells: NewRow = {"lowest_as_last": changes.lowest_as_last[place].item()}
    if place > 0:
        _, low, high = changes.agreement[:, place - 1].tolist()
        cells["interval"] = known_interval(low, high)
        cells["changed"] = changes.changed_layers(place - 1)
        cells["moved"] = changes.moved_layers(place - 1)
    else:
        cells |= {"interval": None, "changed": None, "moved": None}
    return cells


def _layer_rows(curve: Curve) -> list[ReportRow]:
    """Return the rows of the table of layers."""
    shares_among_lowest = curve.is_lowest.mean(axis=0).tolist()
    rows = []
    for place, layer in enumerate(curve.layers):
        ranks = curve.ranks[:, place]
        row = {
            "layer": layer,
            "depth": curve.depth[place].item(),
            "first": ranks[0].item(),
            "last": ranks[-1].item(),
            "lowest": ranks.min().item(),
            "highest": ranks.max().item(),
            "among_lowest": shares_among_lowest[place],
        }
        if curve.has_trend:
            row["trend"] = curve.trend[place].item()
        rows.append(ReportRow(row))
    return rows


def _rank_map(curve: Curve) -> RankMap:
    """Return the map of the ranks of a curve."""
    axis = AXES[curve.along]
    return RankMap(
        axis=map_axis(AXIS_TITLES[curve.along], [float(run[axis]) for run in curve.runs]),
        points=curve.points,
        run_ids=[run["run_id"] for run in curve.runs],
        layers=curve.layers,
        ranks=curve.ranks,
        changes=curve.changes,
    )


def curves_chart(curves: Sequence[Curve]) -> ChartType:
    """Return the heat maps of up to `MAX_DRAWN` curves, one above the other."""
    import altair as alt

    charts = []
    for number, curve in enumerate(curves[:MAX_DRAWN], start=1):
        section = curve_section(curve, f"curve-{number}")
        (chart,) = section.charts
        title = alt.TitleParams(section.label, subtitle=list(section.sentences), anchor="start")
        data = alt.InlineData(values=list(chart.rows))
        charts.append(chart.draw().properties(width=560, title=title, data=data))
    return alt.vconcat(*charts).properties(padding=12)
