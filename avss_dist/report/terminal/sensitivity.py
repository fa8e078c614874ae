"""Tables of the sensitivity to rounding: by layer, and by linear map summed over layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from avss_dist.report.section import ReportColumn, ReportTable
from avss_dist.report.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.evaluation.sensitivity import Sensitivity

Row = Mapping[str, Any]  # of `Sensitivity.table`


def sensitivity_tables(rounded: Sensitivity | None) -> Iterator[FittedTable]:
    """Yield a table of the layers and one of the linear maps, with columns for each number format."""
    if rounded is None:
        return
    rows = rounded.table().to_pylist()
    formats = list(rounded.reliability)
    yield FittedTable(_layers(rounded, rows, formats))
    if any(row["map"] for row in rows):
        yield FittedTable(_maps(rows, formats))


def _layers(rounded: Sensitivity, rows: list[Row], formats: list[str]) -> ReportTable:
    columns = []
    for priority, name in enumerate(formats):
        by_layer = [row for row in rows if row["format"] == name and row["map"] is None]
        bits = sum(row["bits_per_weight"] * row["num_weights"] for row in by_layer)
        heading = f"{name}, {bits / sum(row['num_weights'] for row in by_layer):.3g} bits"
        measured = by_layer[0]["increase"] is not None
        if measured:
            columns.append(ReportColumn(f"{heading}: increase", by_layer, _increase, priority=priority))
        columns.append(
            ReportColumn("predicted" if measured else f"{heading}: predicted", by_layer, _predicted, priority=priority)
        )
    layers = [row["layer"] for row in rows if row["format"] == formats[0] and row["map"] is None]
    return ReportTable(
        columns=[ReportColumn("layer", layers), *columns],
        title=f"{rounded.model}  {rounded.corpus}: rounded weights",
        caption=_caption(rounded),
    )


def _maps(rows: list[Row], formats: list[str]) -> ReportTable:
    paths = list(dict.fromkeys(row["map"] for row in rows if row["map"]))
    columns = [ReportColumn("linear map", paths, number=False)]
    for priority, name in enumerate(formats):
        for heading, column in ((f"{name}: increase", "increase"), (f"{name}: predicted", "predicted")):
            by_path = [[row[column] for row in rows if row["map"] == path and row["format"] == name] for path in paths]
            if all(value is not None for values in by_path for value in values):
                sums = [sum(values) for values in by_path]
                columns.append(ReportColumn(heading, sums, lambda value: f"{value:z.4f}", priority=priority))
    caption = "Sums over all layers, in nats per token, of maps that are rounded one at a time."
    return ReportTable(columns=columns, title="By linear map", caption=caption)


def _increase(row: Row) -> str:
    return _with_error(row["increase"], row["increase_stderr"])


def _predicted(row: Row) -> str:
    return _with_error(row["predicted"], row["predicted_stderr"])


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:z.5f}" if stderr is None else f"{value:z.5f} +/- {stderr:.2g}"


def _caption(rounded: Sensitivity) -> str:
    text = "Nats per token. Predicted: first and second order from gradients, summed over the linear maps of the layer."
    known = {name: value for name, value in rounded.reliability.items() if math.isfinite(value)}
    if known:
        text += " Increase: measured, with the weights of that layer alone rounded. Other text of the same size would "
        agreements = ", ".join(f"{value:z.2f} ({name})" for name, value in known.items())
        text += f"order the layers as this one does to {agreements} (Spearman; split halves)."
    return text
