"""What a run will take, and the runs of a job file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Unpack

import pyarrow as pa

from avss_dist.estimation import estimate as estimating
from avss_dist.evaluation.engine import CellReporter
from avss_dist.evaluation.experiment import run_experiment
from avss_dist.options import JobOptions, ScoringOptions, with_options
from avss_dist.results import Table, TabularResult
from avss_dist.runs import api as scoring
from avss_dist.runs.job_file import JobFile, read_job
from avss_dist.runs.reporter import Reporter
from avss_dist.runs.run import Run
from avss_dist.settings import split_options


@with_options(ScoringOptions)
def estimate(model: str | Path, *, corpus: str, **options: Unpack[ScoringOptions]) -> estimating.Estimate:
    """The memory and time of a run, for every partition, before any weight is loaded: see `estimate.estimate`."""
    settings, execution = split_options(dict(options))
    return estimating.estimate(str(model), corpus, settings, execution)


class Runs(list[Run], TabularResult):
    """The runs of a job, in its order.

    Attributes:
        experiment: the rows of ``experiments`` that its section of that name made; None without one.
    """

    __repr__ = TabularResult.__repr__
    experiment: Table | None = None

    def table(self) -> pa.Table:
        """A row for each run."""
        return pa.Table.from_pylist([{f.name: getattr(run, f.name) for f in fields(run)} for run in self])


@with_options(JobOptions)
def run_job(
    job: str | Path | JobFile,
    *,
    allow_overlap: bool = False,
    allow_many: bool = False,
    reporter: Reporter | None = None,
    cells: CellReporter | None = None,
    **options: Unpack[JobOptions],
) -> Runs:
    """Run what a job file asks for, its experiment included; what is done is not repeated.

    Args:
        job: a file, or what `runs.job_file.read_job` made of one.
        allow_overlap, allow_many: of an experiment, see `evaluation.experiment.run_experiment`.
        reporter, cells: hear how scoring and evaluating go.
        options: fields of ``settings.Execution`` in place of the job's.

    Raises:
        AvssError: a mistake, or an evaluation that failed; what was measured is kept.
    """
    read = job if isinstance(job, JobFile) else read_job(job)
    allowed = {"allow_overlap": allow_overlap, "allow_many": allow_many}
    read.refuse_unused(**allowed)
    if read.experiment is None:
        return Runs(scoring.run_job(read, reporter=reporter, **options))
    runs, rows = run_experiment(read, reporter=reporter, cells=cells, **allowed, **options)
    done = Runs(runs)
    done.experiment = Table(pa.Table.from_pylist(rows))
    return done
