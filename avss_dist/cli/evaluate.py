"""`avss evaluate`: tasks of a model, whole and without layers."""

from __future__ import annotations

from typing import Annotated, Any

from avss_dist.cli.options import format_option, takes
from avss_dist.requests import EvaluateRequest
from avss_dist.system.streams import console


@takes(EvaluateRequest)
def evaluate(format: Annotated[str, format_option("table", "json", "csv")] = "table", **values: Any) -> None:
    """Evaluate models and plans; a plan skips its layers in place and is compared with the whole model."""
    from avss_dist.evaluation.evaluate import evaluate as measure
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.evaluation import evaluation_table
    from avss_dist.report.terminal.progress import CellProgress

    request = EvaluateRequest(**values)
    with CellProgress() as progress:
        evaluations = measure(request, progress)
    if format == "table":
        console().print(evaluation_table(evaluations))
    else:
        write_table(evaluations.table(), format, console())
