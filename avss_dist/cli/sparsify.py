"""`avss sparsify`: choice of the activations that become zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from avss_dist.cli.choose import choose_run, newest_of, open_warehouse
from avss_dist.cli.options import named_format, output_option, takes
from avss_dist.cli.plan import evaluation_hint
from avss_dist.core.errors import require_known
from avss_dist.requests import SparsifyRequest
from avss_dist.system.streams import console, emit

if TYPE_CHECKING:
    from avss_dist.sparsity.plan import SparsityPlan

FORMATS = ("plan", "thresholds", "teal")


@takes(SparsifyRequest)
def sparsify(
    output: Annotated[Path, output_option("The sparsity plan to write, SPARSE.yaml.")],
    format: Annotated[str, named_format(FORMATS, "Format of the file.")] = FORMATS[0],
    **values: Any,
) -> None:
    """Choose the activations that become zero, and write a sparsity plan with the reason.

    The run must have measured the inputs of linear maps: avss score --site inputs.
    """
    from avss_dist.evaluation.sparsify import sparsify as choose
    from avss_dist.report.sparsity import thresholds_table
    from avss_dist.report.terminal.progress import CellProgress
    from avss_dist.report.terminal.tables import FittedTable

    require_known("`format`", format, FORMATS)
    request = SparsifyRequest(**values)
    opened = open_warehouse(str(request.warehouse))
    row = choose_run(opened, request.run)
    with CellProgress() as progress:
        plan = choose(request, row, progress)
    _write(plan, output, format)
    console().print(FittedTable(thresholds_table(plan)))
    emit("\n  ".join([f"{output}:", *plan.describe(), *newest_of(opened, request.run)]))
    if format == FORMATS[0]:
        emit(f"  {evaluation_hint(opened, row, output)}")


def _write(plan: SparsityPlan, output: Path, format: str) -> None:
    from avss_dist.pruning.plan import write_text
    from avss_dist.sparsity.files import thresholds_json, write_teal

    if format == "thresholds":
        write_text(output, thresholds_json(plan))
    elif format == "teal":
        write_teal(plan, output)
    else:
        plan.write(output)
