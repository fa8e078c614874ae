"""The page's section on routed experts: how often each of them was chosen, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from avss_dist.analysis.experts import LayerExperts, layer_experts
from avss_dist.report.page.experiments import GRAY, as_image

if TYPE_CHECKING:
    from avss_dist.warehouse.reader import Warehouse

WIDTH, ROW = 640, 14  # pixels
MOST = 4.0  # times an even share, where the color ends


def expert_charts(warehouse: Warehouse, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """For the template: one entry for each run whose experts were measured, in the order of ``labels`` (by run id)."""
    found = {run_id: layer_experts(warehouse, run_id) for run_id in labels}
    return [
        {"label": labels[run_id], "image": _image(layers), "summary": _summary(layers)}
        for run_id, layers in found.items()
        if layers
    ]


def _summary(layers: Sequence[LayerExperts]) -> str:
    idle, number = sum(len(one.idle) for one in layers), sum(len(one.load) for one in layers)
    least = min(layers, key=lambda one: one.balance)
    return (
        f"{idle} of {number} experts got no token. The spread is least even in layer {least.layer}: "
        f"balance {least.balance:.3f}, where 1 is even; its busiest expert got {least.load.max():.0%} of the tokens."
    )


def _image(layers: Sequence[LayerExperts]) -> str:
    """A row for each layer, a cell for each expert, colored by its share of the tokens over an even one."""
    cells = [
        {"layer": one.layer, "expert": expert, "times": min(float(share * len(one.load)), MOST)}
        for one in layers
        for expert, share in enumerate(one.load)
    ]
    legend = alt.Legend(title="share of tokens / even share", orient="top", direction="horizontal", titleLimit=240)
    scale = alt.Scale(domain=[0, MOST], scheme="viridis")
    chart: Any = (
        alt.Chart(alt.InlineData(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("expert:O", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("layer:O", sort="descending"),
            color=alt.Color("times:Q", scale=scale, legend=legend),
        )
        .properties(width=WIDTH, height=alt.Step(ROW))
        .configure(background="transparent")
        .configure_axis(labelColor=GRAY, titleColor=GRAY, domainColor=GRAY, tickColor=GRAY)
        .configure_legend(labelColor=GRAY, titleColor=GRAY)
        .configure_view(stroke=None)
    )
    return as_image(chart)
