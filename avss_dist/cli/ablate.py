"""`avss ablate`: effect of each layer on the loss."""

from __future__ import annotations

from typing import Annotated, Any

from avss_dist.cli.options import format_option, takes
from avss_dist.requests import AblateRequest
from avss_dist.system.streams import console


@takes(AblateRequest)
def ablate(format: Annotated[str, format_option("table", "json", "csv")] = "table", **values: Any) -> None:
    """Leave layers out and measure the loss: the ground truth for scores."""
    from avss_dist.evaluation.ablate import ablate as measure
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.ablation import ablation_table
    from avss_dist.report.terminal.progress import CellProgress

    request = AblateRequest(**values)
    with CellProgress() as progress:
        ablation = measure(request, progress)
    if format == "table":
        console().print(ablation_table(ablation))
    else:
        write_table(ablation.table(), format, console())
