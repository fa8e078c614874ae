"""`avss ablate`: effect of each layer on the loss."""

from __future__ import annotations

from typing import Annotated, Any

from avss_dist.cli.options import format_option, takes
from avss_dist.requests import AblateRequest
from avss_dist.system.streams import console


@takes(AblateRequest)
def ablate(format: Annotated[str, format_option("table", "json", "csv")] = "table", **values: Any) -> None:
    """Leave layers out, or round their weights, and measure the loss: the ground truth for scores.

    With --quantize, csv and json have a row for each number format, layer and linear map.
    """
    from avss_dist.evaluation.ablate import ablate as measure
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.evaluation import ablation_table, sensitivity_tables
    from avss_dist.report.terminal.progress import CellProgress

    request = AblateRequest(**values)
    with CellProgress() as progress:
        ablation = measure(request, progress)
    rounded = ablation.sensitivity
    if format != "table":
        write_table((rounded or ablation).table(), format, console())
        return
    for table in [*([ablation_table(ablation)] if ablation.layers else []), *sensitivity_tables(rounded)]:
        console().print(table)
