"""The table of an ablation: the effect of each layer on the loss, with bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from avss_dist.core.registry import metrics_of
from avss_dist.core.text import count_of
from avss_dist.report.section import BarColumn, ReportColumn, ReportTable
from avss_dist.report.terminal.tables import FittedTable
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.rankings import count_lowest

if TYPE_CHECKING:
    from avss_dist.evaluation.ablate import Ablation

(PROPAGATED,), (PREDICTED,) = metrics_of("propagated"), metrics_of("predicted")
_FORMATS: Sequence[tuple[str, str, int, Callable[[dict[str, Any]], str]]] = (
    ("loss without", "loss", 4, lambda row: f"{row['loss']:z.4f}"),
    ("increase", "increase", 0, lambda row: _with_error(row["increase"], row["increase_stderr"])),
    ("attention alone", "attention", 1, lambda row: _with_error(row["attention"], row["attention_stderr"])),
    ("MLP alone", "mlp", 1, lambda row: _with_error(row["mlp"], row["mlp_stderr"])),
    ("Shapley", "shapley", 1, lambda row: f"{row['shapley']:z.4f}"),
    ("95% interval", "shapley_low", 3, lambda row: f"{row['shapley_low']:z.4f} .. {row['shapley_high']:z.4f}"),
    ("damage", "damage", 1, lambda row: f"{row['damage']:z.1f}"),
    (
        "predicted",
        PREDICTED,
        2,
        lambda row: _with_error(row[PREDICTED], row["predicted_stderr"]),
    ),
    ("propagated", PROPAGATED, 2, lambda row: f"{row[PROPAGATED]:.4g}"),
    ("Taylor", "taylor", 2, lambda row: f"{row['taylor']:z.4g}"),
    ("gradient L1", "gradient_l1", 6, lambda row: f"{row['gradient_l1']:z.4g}"),
    ("gradient L2", "gradient_l2", 7, lambda row: f"{row['gradient_l2']:z.4g}"),
    ("weight norm", "weight_frobenius", 8, lambda row: f"{row['weight_frobenius']:z.4g}"),
)
"""Heading, column of `Ablation.table`, priority and format of each column."""


def ablation_table(ablation: Ablation) -> FittedTable:
    """Return a table of the layers, with a bar of the first available measure. The least important are marked."""
    rows = ablation.table().to_pylist()
    drawn = ("increase", "shapley", "attention", "damage", "taylor")
    first = next(name for name in drawn if rows[0][name] is not None)
    lowest = sorted(rows, key=lambda row: row[first])[: count_lowest(len(rows))]
    marked = [row in lowest for row in rows]
    columns: list[ReportColumn | BarColumn] = [
        ReportColumn("layer", [row["layer"] for row in rows]),
        BarColumn(values=[row[first] for row in rows], marked=marked),
        *(
            ReportColumn(heading, rows, format_, priority=0 if name == first else priority)
            for heading, name, priority, format_ in _FORMATS
            if rows[0][name] is not None
        ),
    ]
    title, caption = f"{ablation.model}  {ablation.corpus}", _caption(ablation, first)
    return FittedTable(ReportTable(columns=columns, title=title, caption=caption, marked=marked))


def _caption(ablation: Ablation, first: str) -> str:
    number = count_lowest(len(ablation.layers))
    text = f"* the {'layer' if number == 1 else f'{number} layers'} with the lowest {first}. Losses, their increases "
    text += "and what is predicted of them are in nats per token."
    if ablation.layers[0].sublayers:
        text += " Alone: the increase without that sublayer of the layer."
    if ablation.layers[0].damage is not None:
        text += " Damage is the mean of the ranks by predicted and propagated."
    truncated, permutations = ablation.permutations
    if truncated:
        text += f" {truncated} of {permutations} permutations were truncated where the model only guessed: their "
        text += "remaining layers share the rest of the loss alike. Truncation can be turned off."
    if ablation.whole is not None:
        text += (
            f" Loss of the whole model: {_with_error(ablation.whole.value, ablation.whole.stderr)}; the error of an "
        )
        text += "increase is of the same sequences with and without the layer."
    shapley = ablation.layers[0].shapley
    if shapley is not None and len(shapley.samples) < MINIMUM_UNITS:
        text += f" No interval of Shapley values: {count_of(len(shapley.samples), 'permutation')}, {MINIMUM_UNITS} are "
        text += "needed (--shapley)."
    if math.isfinite(ablation.reliability):
        text += f" Other text of the same size would order the layers as this one does to {ablation.reliability:z.2f} "
        text += "(Spearman; split halves)."
    return text


def _with_error(value: float, stderr: float) -> str:
    return f"{value:z.4f} +/- {stderr:.2g}" if math.isfinite(stderr) else f"{value:z.4f}"
