"""Measuring: estimates, ablations, evaluations, and the runs of a job file."""

from __future__ import annotations

from dataclasses import fields

import pyarrow as pa

from avss_dist.core.results import Table, TabularResult
from avss_dist.estimation import estimate as estimating
from avss_dist.evaluation import ablate as ablating
from avss_dist.evaluation import evaluate as evaluating
from avss_dist.evaluation.experiment import run_experiment
from avss_dist.options import keywords
from avss_dist.requests import AblateRequest, EstimateRequest, EvaluateRequest, JobRequest
from avss_dist.runs import api as scoring
from avss_dist.runs.job_file import JobFile, read_job
from avss_dist.runs.run import Run


@keywords(EstimateRequest)
def estimate(request: EstimateRequest) -> estimating.Estimate:
    """Estimate the memory of a run with every partition on this machine, before any weight is loaded."""
    return estimating.estimate(request)


@keywords(AblateRequest)
def ablate(request: AblateRequest) -> ablating.Ablation:
    """Measure the effect of each layer on the loss of a model, and store it. Stored results are not measured again."""
    return ablating.ablate(request, request.on_event)


@keywords(EvaluateRequest)
def evaluate(request: EvaluateRequest) -> evaluating.Evaluations:
    """Evaluate models and plans on tasks, each compared with its whole model. Stored results are not measured again.

    A plan is a file that ends in .yaml or .yml. The results are stored in a warehouse.
    """
    return evaluating.evaluate(request, request.on_event)


class Runs(list[Run], TabularResult):
    """The runs of a job, in its order.

    Attributes:
        experiment: rows of ``experiments`` of the job's experiment; None without one.
    """

    __repr__ = TabularResult.__repr__
    experiment: Table | None = None

    def table(self) -> pa.Table:
        """Return a table with a row for each run."""
        return pa.Table.from_pylist([{f.name: getattr(run, f.name) for f in fields(run)} for run in self])


@keywords(JobRequest)
def run_job(request: JobRequest) -> Runs:
    """Execute a job file, its experiment included. Finished runs are not repeated.

    Fields of `settings.Execution` replace those of the file.
    """
    job = request.job if isinstance(request.job, JobFile) else read_job(request.job)
    job.refuse_unused(allow_overlap=request.allow_overlap, allow_many=request.allow_many)
    if job.experiment is None:
        return Runs(scoring.run_job(job, request.on_event, **request.given))
    runs, rows = run_experiment(job, request, request.on_event)
    done = Runs(runs)
    done.experiment = Table(pa.Table.from_pylist(rows))
    return done
