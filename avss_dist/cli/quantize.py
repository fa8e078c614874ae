"""`avss quantize`: choice of the number format of each linear map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from avss_dist.cli.choose import choose_run, newest_of, open_warehouse
from avss_dist.cli.options import named_format, output_option, takes
from avss_dist.cli.plan import evaluation_hint
from avss_dist.core.errors import require_known
from avss_dist.requests import PrecisionRequest
from avss_dist.system.streams import emit, say

FORMATS = ("plan", "llama-cpp", "llm-compressor")


@takes(PrecisionRequest)
def quantize(
    output: Annotated[Path, output_option("The precision plan to write, BITS.yaml, or the file of another program.")],
    format: Annotated[str, named_format(FORMATS, "Format of the file.")] = FORMATS[0],
    **values: Any,
) -> None:
    """Choose the number format of each linear map, and write a precision plan with the reason.

    avss ablate --quantize FORMAT... must have predicted the losses.
    """
    from avss_dist.map_plans.exports import EXPORTS
    from avss_dist.map_plans.quantize import plan_precision
    from avss_dist.pruning.plan import write_text

    require_known("`format`", format, FORMATS)
    request = PrecisionRequest(**values)
    opened = open_warehouse(str(request.warehouse))
    row = choose_run(opened, request.run, measured=True)
    plan = plan_precision(request, opened, row)
    if format == FORMATS[0]:
        plan.write(output)
    else:
        write_text(output, EXPORTS[format](plan))
    emit("\n  ".join([f"{output}:", *plan.describe(), *newest_of(opened, request.run)]))
    if format == FORMATS[0]:
        say(f"  {evaluation_hint(opened, row, output)}")
