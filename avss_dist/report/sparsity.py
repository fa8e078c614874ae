"""Table of a sparsity plan: the sparsity of each linear map."""

from __future__ import annotations

from typing import Any

from avss_dist.map_plans.plans import SparsityPlan
from avss_dist.report.section import ReportColumn, ReportTable


def thresholds_table(plan: SparsityPlan) -> ReportTable:
    """Return a table of a plan: threshold or share and expected sparsity by layer and linear map, in shades."""
    maps = list(dict.fromkeys(one.map for one in plan.projections))
    by_place = {(one.layer, one.map): one for one in plan.projections}
    layers = sorted({one.layer for one in plan.projections})
    return ReportTable(
        title=f"What becomes zero in {plan.model}: by {plan.projections[0].by}, and the sparsity that is expected",
        columns=[
            ReportColumn("layer", layers),
            *(
                ReportColumn(
                    name.rpartition(".")[2],
                    [by_place.get((layer, name)) for layer in layers],
                    lambda one: f"{one.value:z.3g} {one.sparsity:4.0%}",
                    style=_shade,
                    priority=number,
                )
                for number, name in enumerate(maps)
            ),
        ],
    )


def _shade(point: Any) -> str:
    if point is None:
        return ""
    shade = round(255 * min(point.sparsity, 1.0))
    return f"rgb({shade},{128},{255 - shade})"
