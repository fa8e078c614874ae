"""`avss score` and `avss estimate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.base import spelled
from avss_dist.cli.options import (
    MODEL,
    TEXT_FORMATS,
    CorpusOption,
    ModelArgument,
    TextFormatOption,
    WarehouseOption,
    format_option,
    takes_settings,
)
from avss_dist.settings import DEFAULT_WAREHOUSE, Execution, Settings, split_options
from avss_dist.system.streams import console, emit, emit_json, say

if TYPE_CHECKING:
    from avss_dist.runs.api import Run

ESTIMATED = tuple(
    name
    for name in Settings.__dataclass_fields__
    if name not in ("skip_first_tokens", "thresholds", "experts", "allow_pickle")
)


@takes_settings(*Settings.__dataclass_fields__, *Execution.__dataclass_fields__)
def score(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL)],
    corpus: CorpusOption,
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
    label_field: Annotated[
        str | None, typer.Option(help="Field with the labels of paired text (file.jsonl:prompt+answer).")
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Then run a backward pass on the same text, as avss ablate --gradients does."),
    ] = False,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> int:
    """Score every layer of one or more models on a corpus, and keep the result as Parquet."""
    if gradients:
        from avss_dist.evaluation.ablate import require_gradients

        require_gradients(split_options(options)[1])
    corpus = f"{corpus}:{label_field}" if label_field else corpus

    from avss_dist.report.terminal.progress import run_progress
    from avss_dist.runs.api import score as score_one
    from avss_dist.runs.api import score_all

    with run_progress(len(models), ends=False) as progress:
        if len(models) == 1:
            runs = [score_one(models[0], corpus=corpus, warehouse=warehouse, reporter=progress, **options)]
        else:
            runs = score_all(models, corpus=corpus, warehouse=warehouse, reporter=progress, **options)
    for run in runs:
        if format == "json":
            emit_json(asdict(run))
        else:
            emit(_outcome(run))
    done = [run for run in runs if run.status != "failed"]
    if gradients:
        _take_gradients([run.model for run in done], corpus, warehouse, options, say if format == "json" else emit)
    if done and format != "json":
        emit(f"Look at it: avss show -w {done[-1].warehouse} --run {done[-1].run_id}")
        if len(done) > 1:
            emit(f"Compare them: avss compare -w {done[-1].warehouse}")
    return 0 if len(done) == len(runs) else 1


@takes_settings(*ESTIMATED, "ranks", "max_memory")
def estimate(
    model: ModelArgument,
    corpus: CorpusOption,
    format: Annotated[str, format_option("table", "json")] = "table",
    **options: Any,
) -> None:
    """Estimate the memory and time of a run with every partition, before loading any weights."""
    settings, execution = split_options({**options, "partition": "zero3" if "ranks" in options else "auto"})

    from avss_dist.estimation.estimate import estimate as estimate_run
    from avss_dist.report.terminal.estimate import estimate_table

    doing = "Measuring a few layers on this device ..."
    if not sys.stdout.isatty():
        say(doing)
    with console().status(doing) if sys.stdout.isatty() else nullcontext():
        made = estimate_run(model, corpus, settings, execution)
    if format == "json":
        emit_json(made.as_dict(), indent=2)
    else:
        console().print(estimate_table(made))


def _take_gradients(
    models: Sequence[str], corpus: str, warehouse: str, options: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Measure gradients as the runs were: the same rows, the same settings."""
    from avss_dist.evaluation.ablate import ablate
    from avss_dist.report.terminal.progress import CellProgress

    options = {name: value for name, value in options.items() if name not in ("sites", "thresholds")}
    for model in models:
        with CellProgress() as progress:
            found = ablate(
                model,
                corpus=corpus,
                warehouse=warehouse,
                leave_one_out=False,
                gradients=True,
                reporter=progress,
                **options,
            )
        tell(f"{model}: gradients of {len(found.layers)} layers, in the table evaluations.")


def _outcome(run: Run) -> str:
    if run.status == "failed":
        return f"{run.run_id}: failed. {spelled(str(run.error))}"
    if run.status == "skipped":
        return f"{run.run_id}: done before, nothing to do (--fresh measures again)."
    kept = f", {run.resumed_shards} of {run.num_shards} shards from before" if run.resumed_shards else ""
    return f"{run.run_id}: {run.num_tokens:,} tokens in {run.seconds:.1f} s{kept}."
