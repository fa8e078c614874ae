"""`avss distill`: a smaller model, trained on the predictions of the whole one."""

from __future__ import annotations

from typing import Any

from avss_dist.cli.options import TEXT_FORMATS, TextFormatOption, takes
from avss_dist.requests import DistillRequest
from avss_dist.system.streams import console, emit, emit_json


@takes(DistillRequest)
def distill(format: TextFormatOption = TEXT_FORMATS[0], **values: Any) -> None:
    """Train a smaller model on the predictions of the whole one, and write it; resumes if stopped.

    The work so far is kept in OUTPUT.part until it ends.
    """
    from avss_dist.api.change import distill as run
    from avss_dist.report.terminal.progress import StepProgress
    from avss_dist.report.terminal.shrink import distilled_lines, distilled_table, distilled_values
    from avss_dist.report.terminal.tables import FittedTable

    with StepProgress() as progress:
        done = run(on_event=progress, **values)
    if format == "json":
        emit_json(distilled_values(done))
        return
    console().print(FittedTable(distilled_table(done)))
    for line in distilled_lines(done):
        emit(line)
