"""`avss score`, `ablate`, `evaluate`, `shrink`, `run` and `estimate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from inspect import unwrap
from itertools import chain
from typing import Any

import pyarrow as pa

from avss_dist.analysis.verdict import experiment_sections
from avss_dist.cli.program import spelled
from avss_dist.commands import Runs
from avss_dist.commands import run as run_job
from avss_dist.core.sites import SITES
from avss_dist.core.streams import complain, console, emit_json, say
from avss_dist.core.suggestions import command_line, option_words
from avss_dist.core.text import count_of
from avss_dist.estimation import estimate as estimate_memory
from avss_dist.estimation import preview_job
from avss_dist.reports.output import print_result
from avss_dist.reports.terminal.evaluation import (
    ablation_table,
    estimate_table,
    evaluation_table,
    plan_table,
    sensitivity_tables,
)
from avss_dist.reports.terminal.progress import CellProgress, StepProgress, run_progress
from avss_dist.reports.terminal.shrink import shrunk_lines, shrunk_tables, shrunk_values
from avss_dist.reports.terminal.tables import rendered
from avss_dist.requests import (
    AblateRequest,
    EstimateRequest,
    EvaluateRequest,
    RunCommandRequest,
    ScoreAllRequest,
    ShrinkRequest,
)
from avss_dist.runs.events import both, describe_repeated
from avss_dist.runs.job_file import JobFile, job_schema, read_job
from avss_dist.runs.scoring import Run, score_models
from avss_dist.studies.ablate import ablate as measure_ablation
from avss_dist.studies.evaluate import evaluate as measure_tasks
from avss_dist.studies.experiment import describe_size
from avss_dist.studies.shrink import shrink as write_smaller


def score(request: ScoreAllRequest, format: str) -> int:
    """Score models, and print a line for each. A single model that fails ends the command with its error."""
    with run_progress(len(request.models), ends=False) as progress:
        runs = score_models(replace(request, on_event=progress), request.models, alone=len(request.models) == 1)
    print_result(format, _outcomes(runs), lambda: map(asdict, runs))
    done = [run for run in runs if run.status != "failed"]
    if done and format != "json":
        site = {} if SITES[0] in request.sites else {"site": request.sites[0]}
        newest = done[-1]
        options = option_words({"run": newest.run_id, **site})
        say(f"Look at it: {command_line('show', '-w', newest.warehouse, *options)}")
        if len(done) > 1:
            say(f"Compare them: {command_line('compare', '-w', newest.warehouse, *option_words(site))}")
    return 0 if len(done) == len(runs) else 1


def _outcomes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a line for each run. One that repeats a run that was measured by this very command is told so."""
    first_runs: dict[str, Run] = {}
    for run in runs:
        first = first_runs.setdefault(run.run_id, run)
        if run.status == "skipped" and first.status == "done":
            yield f"{run.run_id}: {describe_repeated(first.model)}"
        else:
            yield _outcome(run)


def _outcome(run: Run) -> str:
    if run.status == "failed":
        return f"{run.run_id}: failed. {spelled(str(run.error))}"
    if run.status == "skipped":
        return f"{run.run_id}: done before, nothing to do (--fresh measures again)."
    resumed = f", {run.resumed_shards} of {run.num_shards} shards from before" if run.resumed_shards else ""
    return f"{run.run_id}: {run.num_tokens:,} tokens in {run.seconds:.1f} s{resumed}."


def ablate(request: AblateRequest, format: str) -> None:
    """Measure what layers do to the loss, and print it."""
    with CellProgress() as progress:
        ablation = measure_ablation(replace(request, on_event=progress))
    shown = chain(map(ablation_table, [ablation] if ablation.layers else []), sensitivity_tables(ablation))
    print_result(format, shown, (ablation.sensitivity or ablation).table)


def evaluate(request: EvaluateRequest, format: str) -> None:
    """Evaluate models and plans, and print the results."""
    with CellProgress() as progress:
        evaluations = measure_tasks(replace(request, on_event=progress))
    print_result(format, map(evaluation_table, [evaluations]), evaluations.table)


def shrink(request: ShrinkRequest, format: str) -> None:
    """Write a smaller checkpoint, and print how it compares."""
    with StepProgress() as progress:
        done = write_smaller(replace(request, on_event=progress))
    print_result(format, [shrunk_tables(done), *shrunk_lines(done)], lambda: [shrunk_values(done)])


def estimate(request: EstimateRequest, format: str) -> None:
    """Print the memory of a run with every partition."""
    result = estimate_memory(request)
    if format == "json":
        emit_json(result.as_dict(), indent=2)
    else:
        console().print(estimate_table(result))


def run(request: RunCommandRequest, format: str) -> int:
    """Run a job file, or print what that would do."""
    if request.schema:
        emit_json(job_schema(), indent=2)
        return 0
    job = request.job if isinstance(request.job, JobFile) else read_job(request.job)
    if request.dry_run:
        return _preview(job, format, request.replaced)
    with run_progress(len(job.specs)) as progress:
        on_event = both(progress, CellProgress()) if job.experiment else progress
        runs = unwrap(run_job)(replace(request, job=job, on_event=on_event))
    failures = [_outcome(run) for run in runs if run.status == "failed"]
    if runs.experiment is None:
        print_result(format, [*failures, _summary(runs)], runs.table)
    else:
        rows = runs.experiment.table()
        print_result(format, [rendered(*experiment_sections(rows.to_pylist()))], lambda: rows)
        for line in failures:
            complain(line)
    return 1 if failures else 0


def _preview(job: JobFile, format: str, options: dict[str, Any]) -> int:
    previews = preview_job(job, lambda event: say(f"Planning {event.name} ..."), **options)
    shown = [plan_table(previews, job.warehouse), *([f"{describe_size(job)}."] if job.experiment else [])]
    print_result(format, shown, lambda: pa.Table.from_pylist([asdict(preview) for preview in previews]))
    return 1 if any(preview.status == "refused" for preview in previews) else 0


def _summary(runs: Runs) -> str:
    count = {status: sum(run.status == status for run in runs) for status in ("done", "skipped", "failed")}
    counts = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    return f"{count_of(len(runs), 'run')}: {counts}. Look at the results: {command_line('ls', '-w', runs[0].warehouse)}"
