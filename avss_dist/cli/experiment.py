"""`avss experiment` and `avss scorecard`: does it hold, and which score would have told."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from avss_dist.cli.base import console
from avss_dist.cli.choose import choose_runs
from avss_dist.cli.jobs import JobPath, require_experiment
from avss_dist.cli.options import EveryRunOption, FreshOption, ReplicasOption, WarehousePath
from avss_dist.errors import require_known
from avss_dist.settings import EXECUTORS

FORMATS = ("table", "csv", "json")


def experiment(
    job: JobPath,
    executor: Annotated[str | None, typer.Option(help="auto, local (this process), ray.")] = None,
    replicas: ReplicasOption = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; RAY_ADDRESS otherwise.")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Evaluate on text that layers were scored on.")
    ] = False,
    fresh: FreshOption = False,
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = FORMATS[0],
) -> int:
    """Score the models of a job file, drop layers by every method of its section experiment, and evaluate each."""
    require_known("format", format, FORMATS)
    if executor is not None:
        require_known("executor", executor, EXECUTORS)
    given = {"executor": executor, "replicas": replicas, "address": address, "fresh": fresh or None}
    options = {name: value for name, value in given.items() if value is not None}

    from avss_dist.runs.job_file import read_job

    read = read_job(job)
    require_experiment(read)

    import pyarrow as pa

    from avss_dist.evaluation.experiment import run_experiment
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.experiment import experiment_tables
    from avss_dist.report.terminal.progress import CellProgress, Log, Progress

    with Progress() if sys.stderr.isatty() else Log(len(read.specs)) as reporter:
        runs, rows = run_experiment(
            read, reporter=reporter, cells=CellProgress(), allow_overlap=allow_overlap, **options
        )
    if format == "table":
        console().print(experiment_tables(rows))
    else:
        write_table(pa.Table.from_pylist(rows), format, console())
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        print(f"{run.run_id}: failed. {run.error}", file=sys.stderr)
    return 1 if failed else 0


def scorecard(
    warehouse: WarehousePath,
    run: EveryRunOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every reading of AVSS; else the best of each site.")] = False,
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = FORMATS[0],
) -> None:
    """Compare every score of runs with the ground truth: which would have told which layers can go."""
    require_known("format", format, FORMATS)
    from avss_dist.analysis.scorecard import best_readings, score_cards
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.scorecard import scorecard_tables
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(warehouse)
    cards = score_cards(opened, choose_runs(opened, run or [], every=True))
    shown = cards if every else best_readings(cards)
    if format == "table":
        console().print(scorecard_tables(shown))
    else:
        write_table(shown, format, console())
