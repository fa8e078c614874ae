"""`avss plan`, `sparsify`, `quantize`, `prune`, `distill` and `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from inspect import unwrap
from pathlib import Path

from rich.console import RenderableType

from avss_dist.analysis.chosen import ChosenRun
from avss_dist.analysis.next_commands import describe_headless, repeated_options
from avss_dist.cli.forecasts import print_forecast
from avss_dist.cli.program import spelled
from avss_dist.cli.read import open_for
from avss_dist.commands import Pruned, choose_layers, describe_remaining, planned_run
from avss_dist.commands import prune as write_pruned
from avss_dist.core.streams import console, emit, say
from avss_dist.core.suggestions import command_line, option_words
from avss_dist.core.text import describe_bytes
from avss_dist.core.values import NewObject, TableRow
from avss_dist.distillation.distill import Distilled
from avss_dist.planning.precision import plan_precision, predicted_run
from avss_dist.planning.runs import sparsifiable_run
from avss_dist.plans.plan import read_plan
from avss_dist.plans.precision_files import EXPORTS
from avss_dist.plans.size import describe_savings, local_run_size
from avss_dist.reports.output import print_result
from avss_dist.reports.terminal.evaluation import search_table, thresholds_table
from avss_dist.reports.terminal.progress import CellProgress, StepProgress
from avss_dist.reports.terminal.shrink import distilled_table
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.reports.terminal.verified import verified_table
from avss_dist.requests import (
    DistillCommandRequest,
    PlanRequest,
    PrecisionRequest,
    PruneRequest,
    SparsifyRequest,
    VerifyRequest,
)
from avss_dist.serving.verify import verify as compare_with_server
from avss_dist.stats.catalog import GREEDY
from avss_dist.studies.distill import distill_model
from avss_dist.studies.distill_forecast import forecast_distillation
from avss_dist.studies.sparsify import sparsify as choose_thresholds
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse


def plan(request: PlanRequest) -> None:
    """Write the plan, and print it with the size that is saved and the command that evaluates it."""
    opened = open_for(request, measured=request.by != GREEDY)
    run = planned_run(opened, request)
    with CellProgress() as progress:
        chosen, steps = choose_layers(opened, run.row, replace(request, on_event=progress))
    if steps:
        console().print(search_table(chosen, steps))
    lines = [*chosen.describe()]
    size = local_run_size(run.row) if chosen.dropped_layers else None
    if size is not None:
        lines.append(describe_savings(chosen, size))
    lines += describe_run(run)
    if request.by is None:
        lines.append(f"No --by was given: {chosen.why['by']} is measured in {opened.root}.")
    _emit_plan(request.output, lines)
    if not chosen.evaluated:
        _hint_evaluation(opened, run.row, request)


def sparsify(request: SparsifyRequest) -> None:
    """Write the plan, and print it with its thresholds and the command that evaluates it."""
    opened = open_for(request)
    run = sparsifiable_run(opened, request.run)
    with CellProgress() as progress:
        chosen = choose_thresholds(replace(request, on_event=progress), run.row)
    console().print(FittedTable(thresholds_table(chosen)))
    _emit_plan(request.output, [*chosen.describe(), *describe_run(run)])
    _hint_evaluation(opened, run.row, request)


def quantize(request: PrecisionRequest) -> None:
    """Write the plan or the file of another program, and print it with the command that evaluates it."""
    opened = open_for(request, measured=True)
    run = predicted_run(request, opened)
    chosen = plan_precision(request, opened, run.row)
    _emit_plan(request.output, [*chosen.describe(), *describe_run(run)])
    if request.format not in EXPORTS:
        _hint_evaluation(opened, run.row, request)


def describe_run(run: ChosenRun) -> list[str]:
    """Return lines that say which of several runs a plan is for."""
    return [spelled(line) for line in run.describe()]


def _emit_plan(output: str | Path | None, lines: list[str]) -> None:
    """Print the file of a plan, and lines about the plan below it."""
    heading = "Not written, as no --output was given" if output is None else output
    emit("\n  ".join([f"{heading}:", *lines]))


def _hint_evaluation(
    opened: Warehouse, row: TableRow, request: PlanRequest | SparsifyRequest | PrecisionRequest
) -> None:
    """Print the command that evaluates the plan that a request wrote for a run, or why there is none."""
    if not has_head(row):
        say(f"  {describe_headless(row)}")
    elif request.output is not None:
        options = {"tasks": "perplexity:CORPUS", "warehouse": opened.root, **repeated_options(row, request)}
        words = option_words(options)
        say(f"  Evaluate it: {command_line('evaluate', request.output, *words)}")


def prune(request: PruneRequest, format: str) -> None:
    """Print the plan, write the checkpoint, and print how its outputs compare."""
    plan = read_plan(request.plan)
    if format == "text":
        emit("\n  ".join([f"{request.plan}:", *plan.describe()]))
    with CellProgress() if request.fitted else nullcontext() as progress:
        pruned = unwrap(write_pruned)(replace(request, plan=plan, on_event=progress))
    print_result(format, _pruned_lines(pruned), pruned.table().to_pylist)


def _pruned_lines(pruned: Pruned) -> Iterator[str]:
    """Yield lines about a written checkpoint."""
    yield f"{pruned.folder}: {describe_remaining(pruned.plan)}, {describe_bytes(pruned.bytes)} of weights."
    if pruned.repair:
        yield from pruned.repair.describe()
    if pruned.difference is None:
        yield "Layers have the shapes and settings that they had."
    else:
        masked = "the experts masked" if pruned.plan.experts else "the layers skipped"
        repaired = " and the repaired weights" if pruned.repair else ""
        yield f"Outputs are those of the original with {masked}{repaired} (largest difference {pruned.difference:g})."
    yield from pruned.notes


def distill(request: DistillCommandRequest, format: str) -> None:
    """Train and write the model, and print its divergences and losses; or print what that would take."""
    if request.dry_run:
        print_forecast(forecast_distillation(request), format)
        return
    with StepProgress() as progress:
        distilled = distill_model(replace(request, on_event=progress))
    lines = [f"{distilled.folder}: {describe_bytes(distilled.bytes)} of weights."]
    lines += distilled.record.describe()
    lines += distilled.notes
    print_result(format, [FittedTable(distilled_table(distilled)), *lines], lambda: [_distilled_values(distilled)])


def _distilled_values(distilled: Distilled) -> NewObject:
    """Return a distillation as values that are printed as JSON."""
    values = {"output": distilled.folder, "bytes": distilled.bytes, "notes": [*distilled.notes]}
    return values | asdict(distilled.record)


def verify(request: VerifyRequest, format: str) -> int:
    """Compare the checkpoint with the server, and print the outcome. The exit code is 0 if they are the same."""
    with StepProgress() as progress:
        verified = compare_with_server(replace(request, on_event=progress))
    shown: list[RenderableType] = []
    if verified.comparison is not None:
        shown.append(FittedTable(verified_table(verified)))
    shown += [spelled(sentence) for sentence in verified.sentences]
    print_result(format, shown, verified.table().to_pylist)
    return 0 if verified.is_same else 1
