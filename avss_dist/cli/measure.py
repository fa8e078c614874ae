"""`avss score`, `ablate`, `evaluate`, `shrink`, `run` and `estimate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from inspect import unwrap

import pyarrow as pa
from rich.console import RenderableType

from avss_dist.analysis.verdict import experiment_sections
from avss_dist.cli.forecasts import print_forecast
from avss_dist.cli.program import spelled
from avss_dist.commands import Runs
from avss_dist.commands import run as run_job
from avss_dist.core.errors import ConfigError
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
from avss_dist.reports.terminal.speed import speed_table
from avss_dist.reports.terminal.tables import FittedTable, rendered
from avss_dist.requests import (
    AblateCommandRequest,
    EstimateRequest,
    EvaluateCommandRequest,
    RunCommandRequest,
    ScoreAllRequest,
    ShrinkCommandRequest,
)
from avss_dist.runs.events import both, describe_repeated
from avss_dist.runs.job_file import JobFile, job_schema, read_job
from avss_dist.runs.result import Run
from avss_dist.runs.scoring import score_models
from avss_dist.studies.ablate import Ablation, forecast_ablation
from avss_dist.studies.ablate import ablate as measure_ablation
from avss_dist.studies.evaluate import evaluate as measure_tasks
from avss_dist.studies.evaluate import forecast_evaluation
from avss_dist.studies.experiment_size import describe_size
from avss_dist.studies.shrink import shrink as write_smaller
from avss_dist.studies.shrink_forecast import forecast_shrinking
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import Damage


def score(request: ScoreAllRequest, format: str) -> int:
    """Score models, and print a line for each. A single model that fails ends the command with its error."""
    with run_progress(len(request.models), ends=False) as progress:
        results = score_models(replace(request, on_event=progress), request.models, alone=len(request.models) == 1)
    damaged = _damage_of_skipped(results)
    print_result(format, _outcomes(results, damaged), lambda: map(asdict, results))
    scored = [result for result in results if result.status != "failed"]
    readable = [result for result in scored if result.run_id not in damaged]
    if readable and format != "json":
        _say_next_commands(readable, request.sites)
    return 0 if len(scored) == len(results) else 1


def _damage_of_skipped(results: Sequence[Run]) -> dict[str, Damage]:
    """Return why runs that were done before cannot be read, by run id, of those that cannot."""
    skipped = {result.run_id for result in results if result.status == "skipped"}
    if not skipped:
        return {}
    opened = Warehouse(results[0].warehouse)
    opened.note_damaged(skipped)
    return {run_id: damage for run_id, damage in opened.damaged.items() if run_id in skipped}


def _say_next_commands(results: Sequence[Run], sites: Sequence[str]) -> None:
    """Print the commands that show the newest of several results, and compare them."""
    newest = results[-1]
    options = {}
    if SITES[0] not in sites:
        options["site"] = sites[0]
    words = option_words({"run": newest.run_id, **options})
    say(f"Look at it: {command_line('show', '-w', newest.warehouse, *words)}")
    if len(results) > 1:
        say(f"Compare them: {command_line('compare', '-w', newest.warehouse, *option_words(options))}")


def _outcomes(results: Sequence[Run], damaged: Mapping[str, Damage]) -> Iterator[str]:
    """Yield a line for each run. One that repeats a run that was measured by this very command is told so."""
    first_results: dict[str, Run] = {}
    for result in results:
        first = first_results.setdefault(result.run_id, result)
        if result.status == "skipped" and first.status == "done":
            yield f"{result.run_id}: {describe_repeated(first.model)}"
        else:
            yield _outcome(result, damaged.get(result.run_id))


def _outcome(result: Run, damage: Damage | None = None) -> str:
    """Return a line that says how a run ended.

    Args:
        damage: why the stored scores of a run that was done before cannot be read.
    """
    if result.status == "failed":
        return f"{result.run_id}: failed. {spelled(str(result.error))}"
    if damage is not None:
        return f"{result.run_id}: done before, but it cannot be read ({damage}). {damage.hint}"
    if result.status == "skipped":
        return f"{result.run_id}: done before, nothing to do (--fresh measures again)."
    line = f"{result.run_id}: {result.num_tokens:,} tokens in {result.seconds:.1f} s"
    if result.resumed_shards:
        line += f", {result.resumed_shards} of {result.num_shards} shards from before"
    return f"{line}."


def ablate(request: AblateCommandRequest, format: str) -> None:
    """Measure what layers do to the loss, and print it; or print what that would take."""
    if request.dry_run:
        print_forecast(forecast_ablation(request), format)
        return
    with CellProgress() as progress:
        ablation = measure_ablation(replace(request, on_event=progress))
    print_result(format, _ablation_tables(ablation), (ablation.sensitivity or ablation).table)


def _ablation_tables(ablation: Ablation) -> Iterator[FittedTable]:
    if ablation.layers:
        yield ablation_table(ablation)
    yield from sensitivity_tables(ablation)


def evaluate(request: EvaluateCommandRequest, format: str) -> None:
    """Evaluate models and plans, and print the results; or print what that would take."""
    if request.dry_run:
        print_forecast(forecast_evaluation(request), format)
        return
    if request.speed and format == "csv":
        raise ConfigError("Speed has rows of its own, which a CSV file has no place for.", "Set `format` to json.")
    with CellProgress() as progress:
        evaluations = measure_tasks(replace(request, on_event=progress))
    shown = [evaluation_table(evaluations), *map(speed_table, evaluations.speed)]
    print_result(format, shown, evaluations.table)
    if format == "json":
        for speed in evaluations.speed:
            print_result(format, [], speed.table)


def shrink(request: ShrinkCommandRequest, format: str) -> None:
    """Write a smaller checkpoint, and print how it compares; or print what that would take."""
    if request.dry_run:
        print_forecast(forecast_shrinking(request), format)
        return
    with StepProgress() as progress:
        shrunk = write_smaller(replace(request, on_event=progress))
    print_result(format, [shrunk_tables(shrunk), *shrunk_lines(shrunk)], lambda: [shrunk_values(shrunk)])


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
    job = request.job if isinstance(request.job, JobFile) else read_job(request.job, watch=request.watches)
    for note in job.notes:
        say(note)
    if request.dry_run:
        return _preview(job, format, request.replaced)
    num_runs = None if request.watches else len(job.specs)
    with run_progress(num_runs) as progress:
        on_event = both(progress, CellProgress()) if job.experiment else progress
        results = unwrap(run_job)(replace(request, job=job, on_event=on_event))
    failures = [_outcome(result) for result in results if result.status == "failed"]
    if results.experiment is None:
        damaged = _damage_of_skipped(results)
        unreadable = [_outcome(result, damaged[result.run_id]) for result in results if result.run_id in damaged]
        print_result(format, [*failures, *unreadable, _summary(results)], results.table)
    else:
        rows = results.experiment.table()
        print_result(format, [rendered(*experiment_sections(rows.to_pylist()))], lambda: rows)
        for line in failures:
            complain(line)
    return 1 if failures else 0


def _preview(job: JobFile, format: str, options: Mapping[str, object]) -> int:
    """Print what a job would do. Return 1 if one of its runs would be refused."""
    previews = preview_job(job, lambda event: say(f"Planning {event.name} ..."), **options)
    shown: list[RenderableType] = [plan_table(previews, job.warehouse)]
    if job.experiment:
        shown.append(f"{describe_size(job)}.")
    print_result(format, shown, lambda: pa.Table.from_pylist([asdict(preview) for preview in previews]))
    return 1 if any(preview.status == "refused" for preview in previews) else 0


def _summary(results: Runs) -> str:
    """Return the number of runs by status, and the command that lists them, in a line."""
    counts = []
    for status in ("done", "skipped", "failed"):
        number = sum(result.status == status for result in results)
        if number:
            counts.append(f"{number} {status}")
    listing = command_line("ls", "-w", results[0].warehouse)
    return f"{count_of(len(results), 'run')}: {', '.join(counts)}. Look at the results: {listing}"
