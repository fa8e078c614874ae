"""`avss run`: the runs of a job file, its experiment included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.base import spelled
from avss_dist.cli.options import FORMATS, takes
from avss_dist.core.text import count_of
from avss_dist.requests import JobRequest, RunJobRequest
from avss_dist.system.streams import complain, console, emit, emit_json, say

if TYPE_CHECKING:
    from avss_dist.runs.api import Run
    from avss_dist.runs.job_file import JobFile


def _print_schema(wanted: bool) -> None:
    if wanted:
        from avss_dist.runs.job_file import job_schema

        emit_json(job_schema(), indent=2)
        raise typer.Exit


@takes(RunJobRequest, FORMATS)
def run(
    format: str,
    _schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of job files, for editors."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    **values: Any,
) -> int:
    """Run a job file, its experiment included: finished runs are skipped, interrupted ones resumed."""
    from avss_dist.runs.job_file import read_job

    request = RunJobRequest(**values)
    job_file = read_job(request.job)
    if dry_run:
        return _preview(job_file, format, request.given)
    allowed: dict[str, Any] = {"allow_overlap": request.allow_overlap, "allow_many": request.allow_many}
    job_file.refuse_unused(**allowed)
    if job_file.experiment:
        return _experiment(job_file, JobRequest(job_file, **allowed, **request.given), format)
    return _run(job_file, format, request.given)


def _preview(job: JobFile, format: str, options: dict[str, Any]) -> int:
    from avss_dist.estimation.preview import preview_job
    from avss_dist.report.terminal.previews import plan_table

    previews = preview_job(job, lambda event: say(f"Planning {event.name} ..."), **options)
    if format == FORMATS[0]:
        console().print(plan_table(previews, job.warehouse))
        if job.experiment:
            from avss_dist.evaluation.experiment import describe_size

            emit(f"{describe_size(job)}.")
    else:
        _write_rows([asdict(preview) for preview in previews], format)
    return 1 if any(preview.status == "refused" for preview in previews) else 0


def _run(job: JobFile, format: str, options: dict[str, Any]) -> int:
    from avss_dist.report.terminal.progress import run_progress
    from avss_dist.runs.api import run_job

    with run_progress(len(job.specs)) as progress:
        runs = run_job(job, progress, **options)
    failed = [run for run in runs if run.status == "failed"]
    if format == FORMATS[0]:
        for run in failed:
            emit(f"{run.run_id}: failed. {spelled(str(run.error))}")
        emit(_summary(runs))
    else:
        _write_rows([asdict(run) for run in runs], format)
    return 1 if failed else 0


def _experiment(job: JobFile, request: JobRequest, format: str) -> int:
    from avss_dist.evaluation.experiment import run_experiment
    from avss_dist.report.experiments import experiment_sections
    from avss_dist.report.terminal.progress import CellProgress, run_progress
    from avss_dist.report.terminal.tables import rendered
    from avss_dist.runs.events import both

    with run_progress(len(job.specs)) as progress:
        runs, rows = run_experiment(job, request, both(progress, CellProgress()))
    if format == FORMATS[0]:
        console().print(rendered(*experiment_sections(rows)))
    else:
        _write_rows(rows, format)
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        complain(f"{run.run_id}: failed. {spelled(str(run.error))}")
    return 1 if failed else 0


def _write_rows(rows: list[dict[str, Any]], format: str) -> None:
    import pyarrow as pa

    from avss_dist.report.output import write_table

    write_table(pa.Table.from_pylist(rows), format, console())


def _summary(runs: Sequence[Run]) -> str:
    count = {status: sum(run.status == status for run in runs) for status in ("done", "skipped", "failed")}
    counts = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    return f"{count_of(len(runs), 'run')}: {counts}. Look at the results: avss ls -w {runs[0].warehouse}"
