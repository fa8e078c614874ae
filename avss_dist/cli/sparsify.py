"""`avss sparsify`: choice of the activations that become zero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from avss_dist.cli.choose import choose_run, newest_of, open_warehouse
from avss_dist.cli.options import output_option, takes
from avss_dist.cli.plan import evaluation_hint
from avss_dist.requests import SparsifyRequest
from avss_dist.system.streams import console, emit, say


@takes(SparsifyRequest)
def sparsify(
    output: Annotated[Path, output_option("The sparsity plan to write, SPARSE.yaml.")],
    **values: Any,
) -> None:
    """Choose the activations that become zero, and write a sparsity plan with the reason.

    The run must have measured the inputs of linear maps: avss score --site inputs.
    """
    from avss_dist.evaluation.sparsify import sparsify as choose
    from avss_dist.report.terminal.previews import thresholds_table
    from avss_dist.report.terminal.progress import CellProgress
    from avss_dist.report.terminal.tables import FittedTable

    request = SparsifyRequest(**values)
    opened = open_warehouse(str(request.warehouse))
    row = choose_run(opened, request.run)
    with CellProgress() as progress:
        plan = choose(request, row, progress)
    plan.write(output)
    console().print(FittedTable(thresholds_table(plan)))
    emit("\n  ".join([f"{output}:", *plan.describe(), *newest_of(opened, request.run)]))
    say(f"  {evaluation_hint(opened, row, output)}")
