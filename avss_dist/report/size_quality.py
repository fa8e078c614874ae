"""Section on quality by size: what plans of dropped layers, sparse activations and rounded weights keep of a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from avss_dist.analysis.size_quality import SizeQuality
from avss_dist.analysis.verdict import describe_task
from avss_dist.core.text import count_of
from avss_dist.report.section import GRAY, Chart, Section, page_number
from avss_dist.report.table import ReportColumn, ReportTable, decimals, percent

LINEAR_MAPS = "Linear maps: the bits of their weights that a token meets, as a share of the whole model's in 16 bits. "
LAYERS = "Layers: the share that remains. How many parameters they have is not known here. "
CAPTION = (
    "Kept: the whole model's perplexity over that of the plan, without its interval, which avss evaluate prints. Best: "
    "no other of these plans keeps more at the same size or a smaller one."
)


def _measure(result: SizeQuality) -> str:
    """Return what the size of the plans is a share of."""
    return "linear maps" if result.has_sizes else "layers"


def size_quality_section(label: str, results: Sequence[SizeQuality]) -> Section:
    """Return the section on the evaluated plans of a checkpoint, with a chart and a table for each text."""
    name = f"size-quality-{page_number(label)}"
    return Section(
        label=label,
        sentences=[_sentence(result) for result in results],
        charts=[_chart(f"{name}-{number}", result) for number, result in enumerate(results, start=1)],
        tables=[_table(f"{name}-{number}", result) for number, result in enumerate(results, start=1)],
    )


def _sentence(result: SizeQuality) -> str:
    best = [plan for plan in result.plans if plan.is_best]
    named = "; ".join(
        f"{plan.retention:.1%} at {plan.size:.1%} of the {_measure(result)} by {plan.description}" for plan in best
    )
    return f"{describe_task(result.task)}: of {count_of(len(result.plans), 'plan')}, the best keep {named}."


def _table(name: str, result: SizeQuality) -> ReportTable:
    plans = result.plans
    of_model = [plan.share_of_model for plan in plans]
    shares = [ReportColumn("all parameters", of_model, percent(1), priority=3)] if any(of_model) else []
    return ReportTable(
        name=name,
        title=f"Each plan, {describe_task(result.task)}",
        columns=[
            ReportColumn("changes", [plan.kind for plan in plans], number=False, priority=1),
            ReportColumn("plan", [plan.description for plan in plans], number=False, wraps=True),
            ReportColumn(_measure(result), [plan.size for plan in plans], percent(1)),
            *shares,
            ReportColumn("perplexity", [plan.perplexity for plan in plans], decimals(2), priority=2),
            ReportColumn("kept", [plan.retention for plan in plans], percent(1)),
            ReportColumn("best", ["best" if plan.is_best else None for plan in plans], number=False),
        ],
        caption=(LINEAR_MAPS if result.has_sizes else LAYERS) + CAPTION,
    )


def _chart(name: str, result: SizeQuality) -> Chart:
    rows = [
        {
            "changes": plan.kind,
            "plan": plan.description,
            "size": plan.size,
            "kept": plan.retention,
            "best": plan.is_best,
        }
        for plan in result.plans
    ]
    return Chart(
        name=name,
        title=describe_task(result.task),
        meaning=f"What each plan keeps of the perplexity, by its share of the {_measure(result)}. The line: the best.",
        rows=rows,
        draw=partial(_drawing, _measure(result), max([1.0, *(plan.retention for plan in result.plans)])),
    )


def _drawing(measure: str, largest: float) -> Any:
    """Return the chart of retention by size: a dot for each plan, and a line through the best.

    Args:
        measure: what the size is a share of.
        largest: upper end of the axis of retentions.
    """
    import altair as alt

    x = alt.X("size:Q", title=measure, scale=alt.Scale(domain=[0, 1])).axis(format="%", grid=False, tickCount=5)
    y = alt.Y("kept:Q", title="retention", scale=alt.Scale(domain=[0, largest])).axis(format="%")
    color = alt.Color("changes:N", title=None, scale=alt.Scale(scheme="tableau10"))
    legend = color.legend(orient="bottom", columns=2, symbolOpacity=1)
    tooltip = ["plan:N", alt.Tooltip("size:Q", format=".1%"), alt.Tooltip("kept:Q", format=".1%")]
    best = alt.Chart().transform_filter("datum.best").mark_line(color=GRAY, interpolate="step-after").encode(x, y)
    return alt.layer(
        best, alt.Chart().mark_point(filled=True, opacity=1, size=50).encode(x, y, legend, tooltip=tooltip)
    ).properties(height=240)
