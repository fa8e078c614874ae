"""`avss shrink`: a smaller checkpoint of a model, in one command."""

from __future__ import annotations

from typing import Any

from avss_dist.cli.options import TEXT_FORMATS, TextFormatOption, takes
from avss_dist.requests import ShrinkRequest
from avss_dist.system.streams import console, emit, emit_json


@takes(ShrinkRequest)
def shrink(format: TextFormatOption = TEXT_FORMATS[0], **values: Any) -> None:
    """Score a model, drop layers, repair the rest, evaluate both, and write the checkpoint; resumes if stopped."""
    from avss_dist.evaluation.shrink import shrink as run
    from avss_dist.report.terminal.progress import StepProgress
    from avss_dist.report.terminal.shrink import shrunk_lines, shrunk_tables, shrunk_values

    request = ShrinkRequest(**values)
    with StepProgress() as progress:
        done = run(request, progress)
    if format == "json":
        emit_json(shrunk_values(done))
        return
    console().print(shrunk_tables(done))
    for line in shrunk_lines(done):
        emit(line)
