"""How a search of layers went, as a table: a row for each round."""

from __future__ import annotations

from math import exp, isfinite
from typing import TYPE_CHECKING

from rich.text import Text

from avss_dist.intervention import describe_removed, size_removed
from avss_dist.report.terminal.tables import Column, FittedTable

if TYPE_CHECKING:
    from avss_dist.evaluation.search import Found


def search_table(found: Found) -> FittedTable:
    """The best set of each round, its loss and perplexity, and how many sets the search knew by then.

    Of rounds over sets of one size, as evolve has them, those that found no better set have no row.
    """
    rows = [("-", 0.0, found.whole, 0)]
    for step in found.steps:
        dropped = size_removed(step.best.removed)
        if dropped != rows[-1][1] or step.best.value < rows[-1][2].value:
            rows.append((describe_removed(step.best.removed), dropped, step.best, step.sets))
    losses = [loss for *_, loss, _ in rows]
    errors = [f"{loss.stderr:.2g}" if isfinite(loss.stderr) else "-" for loss in losses]
    return FittedTable(
        [
            Column(title="dropped", cells=[f"{dropped:g}" for _, dropped, _, _ in rows]),
            Column(title="layers", cells=[layers for layers, *_ in rows], number=False, wraps=True),
            Column(title="loss", cells=[f"{loss.value:.4f}" for loss in losses]),
            Column(title="+/-", cells=errors, priority=1),
            Column(title="perplexity", cells=[f"{exp(loss.value):,.4g}" for loss in losses]),
            Column(title="sets", cells=[f"{sets:,}" for *_, sets in rows], priority=2),
        ],
        title=f"{found.plan.model}  {found.corpus}",
        caption=Text(
            "The best set of each round, on the text of the search; sets: whose loss was known by then. "
            f"Of the plan: {found.chosen.value:.4f}."
        ),
    )
