"""Sparsities for the terminal: what each method keeps at each, and the thresholds of a plan by layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.sparsity_curves import Curve, Point
from avss_dist.analysis.verdict import lacks_interval, shown_interval, shown_value
from avss_dist.names import LOSS
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.retention import NO_INTERVAL
from avss_dist.text import printable

BAR = 20  # cells of a bar that keeps all


def curves_table(curves: Sequence[Curve]) -> RenderableType:
    """A line for each method and sparsity of each task; below, the most that keeps enough."""
    parts: list[RenderableType] = []
    for task in dict.fromkeys(curve.task for curve in curves):
        mine = [curve for curve in curves if curve.task == task]
        if points := [point for curve in mine for point in curve.points]:
            parts.append(_table(task, points))
        parts += [Text(printable(curve.sentence)) for curve in mine]
    return Group(*parts)


def _table(task: str, points: Sequence[Point]) -> FittedTable:
    metric = points[0].row["metric"]
    return FittedTable(
        [
            Column(title="sparsity by", cells=[point.row["method"] for point in points], number=False),
            Column(title="planned", cells=[f"{point.target:.0%}" for point in points]),
            Column(title="measured", cells=[_share(point.measured) for point in points], priority=1),
            Column(title="maps within 1 point", cells=[_near(point) for point in points], priority=3),
            Column(
                title="perplexity" if metric == LOSS else metric, cells=[shown_value(point.row) for point in points]
            ),
            Column(title="kept", cells=[_kept(point) for point in points]),
            Column(title="", cells=[_bar(point.kept) for point in points], number=False, priority=2),
        ],
        title=f"{task}: {points[0].row['model']} with sparse activations",
        caption=Text(
            "Retention over that of the dense model (of a perplexity: under it), and its 95% interval. Thresholds are "
            "of the text that was counted, and of the dense model unless corrected: so maps differ from the plan."
            + (f" {NO_INTERVAL}" if lacks_interval([point.row for point in points]) else "")
        ),
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:z.1%}"


def _near(point: Point) -> str:
    """The share of the linear maps that are within a point of their sparsity, and how far the farthest is off."""
    if point.within is None or point.farthest is None:
        return "-"
    return f"{point.within:.0%}, farthest {100 * point.farthest:.1f}"


def _bar(kept: float) -> str:
    return "█" * round(BAR * min(max(kept, 0.0), 1.0))


def _kept(point: Point) -> str:
    return f"{point.kept:.1%}{shown_interval(point.row)}"


def thresholds_table(plan: SparsityPlan) -> RenderableType:
    """A line for each layer and a column for each linear map: its threshold or share, and its sparsity in shades."""
    maps = list(dict.fromkeys(one.map for one in plan.projections))
    of = {(one.layer, one.map): one for one in plan.projections}
    layers = sorted({one.layer for one in plan.projections})

    def cell(layer: int, name: str) -> RenderableType:
        one = of.get((layer, name))
        if one is None:
            return Text("-")
        shade = round(255 * min(one.sparsity, 1.0))
        return Text(f"{one.value:z.3g} {one.sparsity:4.0%}", style=f"rgb({shade},{128},{255 - shade})")

    return FittedTable(
        [
            Column(title="layer", cells=[str(layer) for layer in layers]),
            *(
                Column(title=name.rpartition(".")[2], cells=[cell(layer, name) for layer in layers], priority=number)
                for number, name in enumerate(maps)
            ),
        ],
        title=f"What becomes zero in {plan.model}: by {plan.projections[0].by}, and the sparsity that is expected",
    )
