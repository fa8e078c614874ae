"""Layer scores along an axis, such as training steps or model size: how ranks move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from avss_dist.analysis.changes import Reading, SeriesChanges, ShardScores, series_changes
from avss_dist.analysis.comparison import (
    CONDITIONS,
    Profile,
    condition,
    differing,
    own_profiles,
    profiles,
    runs_with_conditions,
)
from avss_dist.analysis.curve import AXIS_TITLES, SCHEMA, Curve
from avss_dist.analysis.rank_map import RankMap, map_axis
from avss_dist.analysis.section import (
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    interval,
    known_interval,
)
from avss_dist.analysis.seeds import SeedCurves, join_seeds, seed_differences
from avss_dist.core.errors import QueryError, WarehouseError, require_known
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename, count_of, describe_layers, printable
from avss_dist.core.values import NewRow, TableRow
from avss_dist.models.checkpoint.training import explain_no_step
from avss_dist.read_requests import AXES
from avss_dist.stats.catalog import FROM_ACTIVATIONS, is_own
from avss_dist.stats.changes import lowest_in_all, seed_pairs
from avss_dist.stats.rankings import MIN_VALUES, spearman_rows
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

if TYPE_CHECKING:
    from altair.typing import ChartType

MIN_POINTS = 2  # of a curve
MAX_DRAWN = 12  # curves in a picture
MIN_TREND = 4  # points from which the correlation of a rank with the axis is told
MAX_MEASUREMENTS = 150_000
"""Measurements of layers in shards that are read to test the changes of one training: 30 take about 15 ms of processor
time."""
MAX_MEASUREMENTS_OF_SEVERAL = 15_000  # of several trainings together, so that a look at a whole warehouse stays fast
SETTLED = 0.95  # share of resamples from which on the lowest layers are said to be those of the last point
TRAINING = ("step", "tokens")
"""Axes whose curves are trainings."""

SAME = {"step": ("series",), "tokens": ("series",), "size": ("family",), "sequence_length": ("model", "revision")}
"""Columns of ``runs`` in which the runs of a curve are equal by axis, besides the conditions of a comparison."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RankingCurves(TabularResult):
    """Curves of layer scores along an axis, and the runs that are on none.

    Attributes:
        curves: the curves, those with the most points first.
        left_out: the reason why a run is on no curve, by run id.
        seeds: groups of curves that differ in the seed alone.
        notes: sentences about curves that are in no such group, although their seeds are known.
    """

    curves: Sequence[Curve]
    left_out: Mapping[str, str]
    seeds: Sequence[SeedCurves] = ()
    notes: Sequence[str] = ()

    def table(self) -> pa.Table:
        """Return a table of `SCHEMA`, with a row for each point and layer of each curve."""
        of_seeds: dict[tuple[str, int], NewRow] = {}
        for group in self.seeds:
            of_seeds |= group.columns()
        rows: list[NewRow] = []
        for curve in self.curves:
            for row in curve.rows():
                rows.append(row | of_seeds.get((row["run_id"], row["layer"]), {}))
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
    beyond the choice of text, and of trainings that differ in the seed alone, which layers differ beyond it.

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
    if along not in TRAINING:
        return RankingCurves(curves=curves, left_out=left_out)
    reading = Reading(site=site, recipe=recipe, threshold=threshold, score=score)
    scores = ShardScores(warehouse, reading)
    tested = with_changes(scores, curves)
    groups, notes = join_seeds(tested, allow_mismatch=allow_mismatch)
    seeds = with_differences(scores, groups, tested)
    return RankingCurves(curves=tested, left_out=left_out, seeds=seeds, notes=notes)


def with_changes(scores: ShardScores, curves: Sequence[Curve]) -> list[Curve]:
    """Return curves, those of trainings with their changes, or the reason why nothing is claimed about them."""
    trainings = [curve for curve in curves if curve.along in TRAINING]
    limit = MAX_MEASUREMENTS if len(trainings) == 1 else MAX_MEASUREMENTS_OF_SEVERAL
    tested = []
    measurements = 0
    for curve in curves:
        if curve.along not in TRAINING:
            tested.append(curve)
            continue
        of_curve = _count_measurements(curve.runs)
        if measurements + of_curve > limit:
            tested.append(replace(curve, no_claim=_describe_limit(of_curve, limit, len(trainings))))
            continue
        try:
            tested.append(replace(curve, changes=series_changes(scores, curve.runs)))
            measurements += of_curve
        except (QueryError, WarehouseError) as error:
            tested.append(replace(curve, no_claim=_reason(error)))
    return tested


def with_differences(scores: ShardScores, groups: Sequence[SeedCurves], curves: Sequence[Curve]) -> list[SeedCurves]:
    """Return groups of seeds with their differences, or the reason why nothing is claimed about them.

    Args:
        curves: all curves. The shards of those with changes have been read.
    """
    read: set[str] = set()
    measurements = 0
    for curve in curves:
        if curve.changes is not None:
            read.update(run["run_id"] for run in curve.runs)
            measurements += _count_measurements(curve.runs)
    tested = []
    for group in groups:
        unread = [run for run in group.runs() if run["run_id"] not in read]
        of_group = _count_measurements(unread)
        if measurements + of_group > MAX_MEASUREMENTS_OF_SEVERAL:
            in_all = _count_measurements(group.runs())
            reason = (
                f"The shards of its seeds hold {in_all:,} measurements of layers, and "
                f"{MAX_MEASUREMENTS_OF_SEVERAL:,} are read where several trainings are compared. Choose fewer seeds or "
                "steps with `run`."
            )
            tested.append(replace(group, no_claim=reason))
            continue
        try:
            tested.append(replace(group, differences=seed_differences(scores, group)))
            measurements += of_group
        except (QueryError, WarehouseError) as error:
            tested.append(replace(group, no_claim=_reason(error)))
    return tested


def _count_measurements(runs: Sequence[TableRow]) -> int:
    """Return the number of measurements of layers in the shards of runs."""
    return sum((run["num_shards"] or 0) * (run["num_layers"] or 1) for run in runs)


def _reason(error: QueryError | WarehouseError) -> str:
    """Return the reason why nothing is claimed, with what to do."""
    if error.hint:
        return f"{error.message} {error.hint}"
    return error.message


def _describe_limit(measurements: int, limit: int, trainings: int) -> str:
    """Return the reason why the changes of a training with many shards are not tested."""
    reason = f"Its shards hold {measurements:,} measurements of layers, and {limit:,} are read"
    if trainings == 1:
        return f"{reason}. Choose fewer runs with `run`."
    return f"{reason} where several trainings are compared. Compare it alone: choose its runs with `run`."


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
            reasons[run_id] = _why_no_place(run, along)
        elif run_id not in with_scores:
            reasons[run_id] = "it has no such scores"
        else:
            reasons[run_id] = f"no other run differs from it in {along} alone, or a newer one is at its place"
    return reasons


def _why_no_place(run: TableRow, along: str) -> str:
    """Return the reason why the place of a run on an axis is not known."""
    reason = f"its {along} is not known"
    if along in TRAINING:
        name = run["revision_name"] or basename(str(run["model"]))
        epoch = explain_no_step(name)
        if epoch:
            reason += f": {epoch}"
    return reason


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


_SEED_POINT_COLUMNS = (
    ReportColumn("mean Spearman of two seeds", "agreement", _COEFFICIENT),
    ReportColumn("differ", "differ", number=False, priority=1, wraps=True),
    ReportColumn("lowest 25% of all", "lowest", number=False, priority=1, wraps=True),
)
_SEED_LAYER_COLUMNS = (
    ReportColumn("layer", "layer"),
    ReportColumn("depth", "depth", "{:z.2f}".format, priority=4),
    ReportColumn("first", "first", "{:.1f}".format, group="mean rank"),
    ReportColumn("last", "last", "{:.1f}".format, group="mean rank"),
    ReportColumn("first", "first_spread", "{:.1f}".format, group="spread", priority=2),
    ReportColumn("last", "last_spread", "{:.1f}".format, group="spread"),
    ReportColumn("among the lowest", "share_lowest", "{:z.0%}".format, priority=1),
)


def seed_section(seeds: SeedCurves, name: str) -> Section:
    """Return the section of a group of seeds: what they share, a heat map of mean ranks, tables of points and layers.

    Args:
        name: base name of its files.
    """
    axis = AXIS_TITLES[seeds.along]
    charts = []
    if len(seeds.places) >= MIN_POINTS:
        charts.append(_mean_map(seeds).chart(name, f"Mean ranks along {axis}"))
    points = ReportTable(
        name=f"{name}-points",
        title="Points",
        columns=[ReportColumn(axis, "point"), *_SEED_POINT_COLUMNS],
        rows=_seed_point_rows(seeds),
        caption="Differ: layers in which two seeds differ beyond the choice of text.",
    )
    layers = ReportTable(
        name=name,
        title="Layers",
        columns=_SEED_LAYER_COLUMNS,
        rows=_seed_layer_rows(seeds),
        caption="Rank 1 is the lowest score. Spread: standard deviation of the rank over seeds. Among the lowest: the "
        "share of seeds in which the layer is in the lowest 25% at the last point.",
    )
    numbers = ", ".join(str(seed) for seed in seeds.seeds)
    return Section(
        label=f"{seeds.name} along {axis}, seeds {numbers}",
        sentences=seeds.sentences(),
        charts=charts,
        tables=[points, layers],
    )


def seed_maps_section(seeds: SeedCurves, name: str) -> Section:
    """Return the section of a group of seeds with a map and the tables of each seed beside those of all.

    Args:
        name: base name of its files.
    """
    section = seed_section(seeds, name)
    sentences = list(section.sentences)
    charts = list(section.charts)
    tables = list(section.tables)
    for curve in seeds.curves:
        label = f"seed {curve.seed}"
        of_seed = curve_section(curve, f"{name}-{curve.seed}")
        # The maps have the changes, of which there are as many sentences for each seed.
        told = of_seed.sentences[:1] if curve.changes is not None else of_seed.sentences
        sentences.append(f"{label.capitalize()}: {' '.join(told)}")
        for chart in of_seed.charts:
            charts.append(replace(chart, title=f"{chart.title}, {label}"))
        for table in of_seed.tables:
            tables.append(replace(table, title=f"{table.title}, {label}"))
    return replace(section, sentences=sentences, charts=charts, tables=tables)


def _seed_point_rows(seeds: SeedCurves) -> list[ReportRow]:
    """Return the rows of the table of points of a group of seeds."""
    first, second = seed_pairs(len(seeds.curves))
    in_all = lowest_in_all(seeds.values)
    rows = []
    for place, point in enumerate(seeds.points):
        at_point = seeds.values[:, place]
        row: NewRow = {
            "point": point,
            "agreement": float(spearman_rows(at_point[first], at_point[second]).mean()),
            "differ": None,
            "lowest": describe_layers([seeds.layers[column] for column in np.flatnonzero(in_all[place]).tolist()]),
        }
        if seeds.differences is not None:
            differs = np.flatnonzero(seeds.differences.differs[:, place].any(axis=0)).tolist()
            row["differ"] = describe_layers([seeds.differences.layers[column] for column in differs])
        rows.append(ReportRow(row))
    return rows


def _seed_layer_rows(seeds: SeedCurves) -> list[ReportRow]:
    """Return the rows of the table of layers of a group of seeds."""
    mean_rank = seeds.mean_rank
    spread = seeds.rank_spread
    share_lowest = seeds.share_lowest
    rows = []
    for column, layer in enumerate(seeds.layers):
        row = {
            "layer": layer,
            "depth": seeds.curves[0].depth[column].item(),
            "first": mean_rank[0, column].item(),
            "last": mean_rank[-1, column].item(),
            "first_spread": spread[0, column].item(),
            "last_spread": spread[-1, column].item(),
            "share_lowest": share_lowest[-1, column].item(),
        }
        rows.append(ReportRow(row))
    return rows


def _mean_map(seeds: SeedCurves) -> RankMap:
    """Return the map of the mean ranks of a group of seeds."""
    return RankMap(
        axis=map_axis(AXIS_TITLES[seeds.along], [float(place) for place in seeds.places]),
        points=seeds.points,
        run_ids=[f"mean of {len(seeds.curves)} seeds"] * len(seeds.places),
        layers=seeds.layers,
        ranks=seeds.mean_rank,
        changes=None,
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
    return RankMap(
        axis=map_axis(AXIS_TITLES[curve.along], [float(place) for place in curve.places]),
        points=curve.points,
        run_ids=[run["run_id"] for run in curve.runs],
        layers=curve.layers,
        ranks=curve.ranks,
        changes=curve.changes,
    )


def curves_chart(curves: RankingCurves) -> ChartType:
    """Return up to `MAX_DRAWN` heat maps, one above the other: of means over seeds, then of curves."""
    import altair as alt

    sections = [seed_section(seeds, f"seeds-{number}") for number, seeds in enumerate(curves.seeds, start=1)]
    sections += [curve_section(curve, f"curve-{number}") for number, curve in enumerate(curves.curves, start=1)]
    charts = []
    for section in sections[:MAX_DRAWN]:
        for chart in section.charts:
            title = alt.TitleParams(section.label, subtitle=list(section.sentences), anchor="start")
            data = alt.InlineData(values=list(chart.rows))
            charts.append(chart.draw().properties(width=560, title=title, data=data))
    return alt.vconcat(*charts).properties(padding=12)
