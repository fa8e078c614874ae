"""The table of a search of layers: a row for each round."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from avss_dist.analysis.verdict import metric_format, readable_value
from avss_dist.core.intervention import describe_removed
from avss_dist.core.names import LOSS
from avss_dist.core.text import describe_count
from avss_dist.report.section import ReportColumn, ReportTable, decimals, significant
from avss_dist.report.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.evaluation.search import SearchResult


def search_table(result: SearchResult) -> FittedTable:
    """Return a table of the best set of each round: its loss and perplexity, and the number of sets known by then."""
    rows = [("-", 0, result.whole, 0)]
    rows += [(describe_removed(x.best.removed), len(x.best.removed), x.best, x.sets) for x in result.steps]
    losses = [loss for *_, loss, _ in rows]
    errors = [loss.stderr if isfinite(loss.stderr) else None for loss in losses]
    return FittedTable(
        ReportTable(
            columns=[
                ReportColumn("dropped", [dropped for _, dropped, _, _ in rows]),
                ReportColumn("layers", [layers for layers, *_ in rows], number=False, wraps=True),
                ReportColumn("loss", [loss.value for loss in losses], decimals(4)),
                ReportColumn("+/-", errors, significant(2), priority=1),
                ReportColumn("perplexity", [readable_value(LOSS, loss.value) for loss in losses], metric_format(LOSS)),
                ReportColumn("sets", [sets for *_, sets in rows], describe_count, priority=2),
            ],
            title=f"{result.plan.model}  {result.corpus}",
            caption="The best set of each round, on the text of the search; sets: whose loss was known by then. "
            f"Of the plan: {result.chosen.value:.4f}.",
        )
    )
