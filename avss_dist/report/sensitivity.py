"""Section on rounded weights: the predicted rise of the loss by layer, linear map and number format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from avss_dist.core.text import count_of
from avss_dist.pruning.ground_truth import MapRounding
from avss_dist.report.section import Chart, Section, maps_drawing, page_number
from avss_dist.report.table import ReportColumn, ReportTable, significant

NATS = "nats per token"


def sensitivity_section(label: str, measured: MapRounding) -> Section:
    """Return the section on a run: a heat map for each number format, and a table of all linear maps."""
    name = f"precision-{page_number(label)}"
    places = sorted(measured.damage, key=lambda place: (place.layer, place.path or ""))
    most = max(places, key=lambda place: measured.damage[place])
    sentence = (
        f"Of {count_of(len(places) // len(measured.formats), 'linear map')}, {most.path} of layer {most.layer} loses "
        f"the most: {measured.damage[most]:.3g} {NATS} in {most.format}."
    )
    paths = list(dict.fromkeys(place.path or "" for place in places))
    charts = []
    for number, format in enumerate(measured.formats, start=1):
        of_format = [place for place in places if place.format == format]
        largest = max(abs(measured.damage[place]) for place in of_format)
        charts.append(
            Chart(
                name=f"{name}-{number}",
                title=f"Rounded to {format}",
                meaning=f"The predicted rise of the loss with each linear map rounded to {format}, in {NATS}.",
                rows=[{"layer": one.layer, "map": one.path, "rise": measured.damage[one]} for one in of_format],
                draw=partial(_heat_map, paths, largest),
            )
        )
    return Section(label=label, sentences=[sentence], charts=charts, tables=[_table(name, measured)])


def _table(name: str, measured: MapRounding) -> ReportTable:
    maps = sorted({(place.layer, place.path or "") for place in measured.damage})
    by_map = {(place.layer, place.path, place.format): value for place, value in measured.damage.items()}
    return ReportTable(
        name=f"{name}-maps",
        title=f"Predicted rise of the loss, {NATS}",
        columns=[
            ReportColumn("layer", [layer for layer, _ in maps]),
            ReportColumn("linear map", [path for _, path in maps], number=False),
            *(
                ReportColumn(format, [by_map.get((layer, path, format)) for layer, path in maps], significant(3))
                for format in measured.formats
            ),
        ],
        caption="Predicted by avss ablate --quantize: first and second order, of maps that are rounded one at a time.",
    )


def _heat_map(order: Sequence[str], largest: float) -> Any:
    """Return the chart of rises by layer and map, in colors that are as dark for a fall as for a rise of that size."""
    import altair as alt

    legend = alt.Legend(orient="top", direction="horizontal", title=NATS)
    scale = alt.Scale(scheme="redblue", reverse=True, domain=[-largest, largest])
    return maps_drawing(order, alt.Color("rise:Q", legend=legend, scale=scale), alt.Tooltip("rise:Q", format=".3g"))
