"""Table of the speed and memory of a smaller model beside its whole one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avss_dist.analysis.section import ReportColumn, ReportRow, ReportTable
from avss_dist.core.text import basename, count_of, describe_bytes
from avss_dist.reports.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.evaluation.speed import Speed, SpeedMeasure, Spread


def speed_table(speed: Speed) -> FittedTable:
    """Return a table with a row for each measure: the ratio first, then the values of both models."""
    smaller = basename(speed.smaller)
    whole = basename(speed.whole)
    columns = [
        ReportColumn("", "measure", number=False),
        ReportColumn(f"{smaller} is", "ratio", number=False),
        ReportColumn("rounds", "rounds", missing="", priority=1),
        ReportColumn(smaller, "smaller"),
        ReportColumn(whole, "whole"),
    ]
    table = ReportTable(
        columns=columns,
        rows=[_row(measure) for measure in speed.measures],
        title=f"Speed of {smaller} beside {whole}",
        caption=_caption(speed),
    )
    return FittedTable(table)


def _row(measure: SpeedMeasure) -> ReportRow:
    """Return the row of a measure. Bytes are the same in all rounds, so that they have no spread."""
    rounds = None
    if not measure.is_size:
        rounds = f"{measure.ratio.low:.2f} to {measure.ratio.high:.2f}"
    return ReportRow(
        {
            "measure": measure.name,
            "ratio": measure.describe_ratio(),
            "rounds": rounds,
            "smaller": _describe(measure, measure.smaller),
            "whole": _describe(measure, measure.whole),
        }
    )


def _describe(measure: SpeedMeasure, spread: Spread) -> str:
    """Return the median of a measure for one model, and the values between which the rounds lie."""
    if measure.is_size:
        return describe_bytes(spread.median)
    return f"{spread.median:.3g} {measure.unit} ({spread.low:.3g} to {spread.high:.3g})"


def _caption(speed: Speed) -> str:
    """Return the conditions of the measurement."""
    dtype = speed.dtype
    if speed.whole_dtype != speed.dtype:
        dtype += f", the whole model {speed.whole_dtype}"
    sentences = [
        f"Medians of {count_of(speed.rounds, 'round')} in turn, and the lowest and highest; on {speed.device}, "
        f"{count_of(speed.threads, 'thread')}, {dtype}.",
        f"Prompt of {count_of(speed.prompt_tokens, 'token')}; the cache holds {speed.cache_tokens:,}.",
        *speed.notes,
    ]
    return " ".join(sentences)
