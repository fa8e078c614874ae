"""`avss contrast`: layers that separate hallucinated from truthful answers, with controls."""

from __future__ import annotations

from typing import Any

from avss_dist.cli.choose import choose_run, open_warehouse
from avss_dist.cli.options import FORMATS, takes
from avss_dist.core.text import parse_threshold
from avss_dist.read_requests import ContrastRequest
from avss_dist.system.streams import console, say


@takes(ContrastRequest, FORMATS)
def contrast(format: str, **values: Any) -> None:
    """Contrast hallucinated with truthful answers, layer by layer, with controls; for a run on paired text."""
    request = ContrastRequest(**values)
    value, kind = parse_threshold(request.threshold)

    from avss_dist.analysis.contrast import contrast as contrast_run
    from avss_dist.report.contrasts import contrast_section
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.tables import rendered

    opened = open_warehouse(str(request.warehouse))
    result = contrast_run(
        opened,
        choose_run(opened, request.run),
        site=request.site,
        recipe=request.recipe,
        threshold=value,
        threshold_kind=kind,
        hallucinated=request.hallucinated,
        truthful=request.truthful,
    )
    if format == "table":
        label = f"{result.reading['model']}  ({result.reading['run_id']})"
        console().print(rendered(contrast_section(label, result)))
        return
    write_table(result.predictions if request.predictions else result.layers, format, console())
    for line in result.findings:
        say(line)
