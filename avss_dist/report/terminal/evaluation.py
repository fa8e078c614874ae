"""What models can do, whole and without layers, as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.intervention import count_removed
from avss_dist.stats.retention import NO_INTERVAL
from avss_dist.text import printable

if TYPE_CHECKING:
    from avss_dist.evaluation.outcomes import Evaluations


def evaluation_table(found: Evaluations) -> RenderableType:
    """A row for each subject and task, and the findings below. Of a loss the perplexity is shown."""
    caption = (
        "Retention: the metric without the layers over that with them (of a perplexity: with over without), "
        "and its 95% interval over the same samples."
    )
    if not all(one.retained.has_interval for one in found if one.retained):
        caption = f"{caption} {NO_INTERVAL}"
    table = Table(caption=caption, caption_justify="left")
    for name in ("", "dropped", "task", "metric"):
        table.add_column(name)
    for name in ("value", "+/-", "whole model", "retention", "95% interval"):
        table.add_column(name, justify="right")
    for one in found:
        kept = one.retained
        *_, (metric, value, stderr) = one.metrics()
        table.add_row(
            Text(one.subject.label),
            count_removed(removed) if (removed := one.subject.intervention.removed) else "-",
            Text(one.task),
            Text(metric),
            f"{value:z.4g}",
            f"{stderr:.2g}" if math.isfinite(stderr) else "-",
            f"{one.whole_metrics()[-1]:z.4g}" if one.whole else "-",
            f"{kept.value:z.1%}" if kept else "-",
            f"{kept.low:z.1%} .. {kept.high:z.1%}" if kept and kept.has_interval else "-",
        )
    return Group(table, *(Text(printable(line)) for line in found.findings))
