"""`avss experiment` and `avss scorecard`: does the claim hold, and which score predicts the loss."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from avss_dist.cli.base import spelled
from avss_dist.cli.choose import choose_runs, open_warehouse
from avss_dist.cli.jobs import JobPath, require_experiment
from avss_dist.cli.options import (
    FORMATS,
    WORKERS,
    EveryRunOption,
    FormatOption,
    ManyOption,
    OverlapOption,
    WarehousePath,
    takes_settings,
)
from avss_dist.system.streams import console, say


@takes_settings(*WORKERS, overrides=True)
def experiment(
    job: JobPath,
    allow_overlap: OverlapOption = False,
    allow_many: ManyOption = False,
    format: FormatOption = FORMATS[0],
    **options: Any,
) -> int:
    """Score the models of a job file, drop layers by every method of its section experiment, and evaluate each."""
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
            read,
            reporter=reporter,
            cells=CellProgress(),
            allow_overlap=allow_overlap,
            allow_many=allow_many,
            **options,
        )
    if format == "table":
        console().print(experiment_tables(rows))
    else:
        write_table(pa.Table.from_pylist(rows), format, console())
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        say(f"{run.run_id}: failed. {spelled(str(run.error))}")
    return 1 if failed else 0


def scorecard(
    warehouse: WarehousePath,
    run: EveryRunOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every reading of AVSS; else the best of each site.")] = False,
    format: FormatOption = FORMATS[0],
) -> None:
    """Compare every score of runs with the ground truth: which of them finds the layers that can go."""
    from avss_dist.analysis.scorecard import best_readings, score_cards
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.scorecard import scorecard_tables

    opened = open_warehouse(warehouse)
    cards = score_cards(opened, choose_runs(opened, run or [], every=True))
    shown = cards if every else best_readings(cards)
    if format == "table":
        console().print(scorecard_tables(shown))
    else:
        write_table(shown, format, console())
