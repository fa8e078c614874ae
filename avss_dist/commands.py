"""Python functions of the commands that measure or change something, or run a job file: their fields are keywords."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import pyarrow as pa

from avss_dist import estimation
from avss_dist.analysis.chosen import ChosenRun
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import Removal, count_removed, removal_names
from avss_dist.core.results import Table, TabularResult
from avss_dist.core.thresholds import parse_threshold
from avss_dist.core.validation import keywords
from avss_dist.core.values import JsonObject, TableRow
from avss_dist.evaluation.planned_tasks import seen_by_plan
from avss_dist.evaluation.repairs import fit_plan
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.planning.criteria import default_score
from avss_dist.planning.evaluated import evaluated_lines
from avss_dist.planning.experts import plan_experts
from avss_dist.planning.layers import plan_layers
from avss_dist.planning.precision import plan_precision, predicted_run
from avss_dist.planning.runs import plannable_run, sparsifiable_run
from avss_dist.planning.search import SearchStep
from avss_dist.plans.choice import Choice
from avss_dist.plans.map_plans import PrecisionPlan, SparsityPlan
from avss_dist.plans.plan import Plan, read_plan
from avss_dist.plans.size import count_for_memory, run_size
from avss_dist.pruning.checkpoint import prune as write_checkpoint
from avss_dist.pruning.repair.repair import Repair
from avss_dist.requests import (
    AblateRequest,
    DistillRequest,
    EstimateRequest,
    EvaluateRequest,
    PlanRequest,
    PrecisionRequest,
    PruneRequest,
    RunJobRequest,
    ShrinkRequest,
    SparsifyRequest,
    VerifyRequest,
    refuse_unused,
)
from avss_dist.runs import scoring
from avss_dist.runs.job_file import JobFile, read_job
from avss_dist.runs.result import Run
from avss_dist.serving.verify import Verified
from avss_dist.serving.verify import verify as compare_with_server
from avss_dist.stats.catalog import GREEDY
from avss_dist.studies import ablate as ablating
from avss_dist.studies import distill as distilling
from avss_dist.studies import evaluate as evaluating
from avss_dist.studies import shrink as shrinking
from avss_dist.studies import sparsify as sparsifying
from avss_dist.studies.experiment import run_experiment
from avss_dist.studies.search import search
from avss_dist.warehouse.reader import Warehouse

ablate = keywords(AblateRequest)(ablating.ablate)
distill = keywords(DistillRequest)(distilling.distill_model)
estimate = keywords(EstimateRequest)(estimation.estimate)
evaluate = keywords(EvaluateRequest)(evaluating.evaluate)
shrink = keywords(ShrinkRequest)(shrinking.shrink)


class Runs(list[Run], TabularResult):
    """The runs of a job, in its order.

    Attributes:
        experiment: rows of ``experiments`` of the job's experiment; None without one.
    """

    __repr__ = TabularResult.__repr__
    experiment: Table | None = None

    def table(self) -> pa.Table:
        """Return a table with a row for each run."""
        return pa.Table.from_pylist([asdict(result) for result in self])


@keywords(RunJobRequest)
def run(request: RunJobRequest) -> Runs:
    """Execute a job file, its experiment included. Finished runs are not repeated."""
    job = request.job if isinstance(request.job, JobFile) else read_job(request.job, watch=request.watch)
    job.refuse_unused(allow_overlap=request.allow_overlap, allow_many=request.allow_many)
    if request.watch:
        job.require_watched()
        return Runs(
            scoring.watch_job(
                job, request.on_event, end=request.until, seconds=request.watch_seconds, **request.replaced
            )
        )
    if job.experiment is None:
        return Runs(scoring.run_job(job, request.on_event, **request.replaced))
    results, rows = run_experiment(job, request)
    runs = Runs(results)
    runs.experiment = Table(pa.Table.from_pylist(rows))
    return runs


@keywords(PlanRequest)
def plan(request: PlanRequest) -> Plan:
    """Choose the layers or routed experts of a run's model to drop, with the reason and the findings against it.

    `Plan.write` writes the plan to a file, as ``output`` does. Without `run`, the plan is for the newest run that can
    be planned for.
    """
    opened = Warehouse(request.warehouse)
    return choose_layers(opened, planned_run(opened, request).row, request)[0]


def planned_run(opened: Warehouse, request: PlanRequest) -> ChosenRun:
    """Return the newest run of the request's name for which a plan can be made."""
    return plannable_run(opened, request.run, request.by, experts=request.experts is not None)


def choose_layers(opened: Warehouse, run: TableRow, request: PlanRequest) -> tuple[Plan, list[SearchStep]]:
    """Return the plan for a row of ``runs``, and the rounds of its search. The plan is written if a file is named."""
    steps: list[SearchStep] = []
    unused = {"corpus": request.corpus, **request.options}
    if request.experts is not None:
        refuse_unused(unused, "on routed experts", "Leave it out.")
        chosen = plan_experts(opened, run, str(request.by), request.experts, request.seed)
    elif request.by == GREEDY:
        chosen, steps = search(request, run, requested_choice(opened, run, request))
    else:
        refuse_unused(unused, "without a search", "Leave it out, or choose `by` greedy.")
        chosen = plan_layers(opened, run, requested_choice(opened, run, request))
    if request.output is not None:
        chosen.write(request.output)
    return chosen, steps


def requested_choice(opened: Warehouse, run: TableRow, request: PlanRequest) -> Choice:
    """Return the choice of layers that a request describes, for a row of ``runs``.

    Raises:
        ConfigError: values that exclude each other.
        QueryError: no score was named, and there is no default.
        PlanError: no number of layers leaves as little memory as is requested.
    """
    count = request.count
    if request.memory is not None:
        for name in ("share", "count"):
            if getattr(request, name) is not None:
                raise ConfigError(f"`memory` and `{name}` are mutually exclusive.", "Keep one.")
        count = count_for_memory(run_size(run), request.memory)
    by = request.by or default_score(opened, run)
    reading = None
    if by == "avss":
        reading = (request.site, request.recipe, *parse_threshold(request.threshold))
    return Choice(
        by=by,
        reading=reading,
        share=request.share,
        count=count,
        first=request.first,
        last=request.last,
        seed=request.seed,
        keep_pattern=request.keep_pattern,
    )


@keywords(SparsifyRequest)
def sparsify(request: SparsifyRequest) -> SparsityPlan:
    """Choose the activations of a run's model that become zero: thresholds of the inputs of its linear maps.

    The run must have measured the sites of these inputs; see `studies.sparsify.sparsify`.
    """
    return sparsifying.sparsify(request, sparsifiable_run(Warehouse(request.warehouse), request.run).row)


@keywords(PrecisionRequest)
def quantize(request: PrecisionRequest) -> PrecisionPlan:
    """Choose the number format of each linear map of a run's model under a budget of bits.

    ``ablate(..., quantize=[...])`` must have predicted the losses; see `planning.precision.plan_precision`.
    """
    store = Warehouse(request.warehouse)
    return plan_precision(request, store, predicted_run(request, store).row)


class Pruned(TabularResult):
    """A written checkpoint.

    Attributes:
        plan: the plan, with its evaluations.
        folder, bytes, difference, notes, repair: values that `pruning.checkpoint.prune` returns.
    """

    def __init__(self, plan: Plan, done: JsonObject) -> None:
        self.plan = plan
        self.folder = str(done["folder"])
        self.bytes = int(done["bytes"])
        self.difference = done["difference"]
        self.notes = done["notes"]
        self.repair = done["repair"]

    def table(self) -> pa.Table:
        """Return a table of one row."""
        values = {
            "folder": self.folder,
            "bytes": self.bytes,
            "difference": self.difference,
            "drop": [*self.plan.dropped_layers],
        }
        if self.plan.experts:
            values["experts"] = removal_names(_removed_experts(self.plan))
        values["notes"] = self.notes
        values["repair"] = self.repair.repair if self.repair else None
        return pa.Table.from_pylist([values])

    def summary(self) -> str:
        """Return the folder, the number of remaining layers, and that of removed experts, in a line."""
        return f"{self.folder}, {describe_remaining(self.plan)}"


def describe_remaining(plan: Plan) -> str:
    """Return the number of remaining layers and of removed experts as text."""
    text = f"{len(plan.keep)} of {plan.num_layers} layers"
    experts = _removed_experts(plan)
    if experts:
        text += f" without {count_removed(experts)}"
    return text


def _removed_experts(plan: Plan) -> Sequence[Removal]:
    """Return the ids of the removals of experts. Those of whole layers come before them."""
    return plan.drop[len(plan.dropped_layers) :]


@keywords(PruneRequest)
def prune(request: PruneRequest) -> Pruned:
    """Write a checkpoint without the layers and routed experts that a plan drops, repaired on request.

    With a warehouse, a repair is stored there, or read if it is stored already.
    """
    model, warehouse = str(request.model), request.warehouse
    plan = read_plan(request.plan) if isinstance(request.plan, str) else request.plan
    if not isinstance(plan, Plan):
        raise ConfigError("`plan` drops neither layers nor experts: no checkpoint is written for it.", "Evaluate it.")
    checkpoint = resolve(model, trust_remote_code=request.trust_remote_code)
    fitted = None
    if request.fitted:
        repair = Repair(by=request.fitted, corpora=request.repair_corpora, settings=request.settings)
        fitted = fit_plan(request, plan, repair)
    if warehouse is not None:
        lines = evaluated_lines(Warehouse(warehouse), {"revision": checkpoint.revision}, plan.drop)
        seen = seen_by_plan(plan, Warehouse(warehouse))
        plan = replace(plan, evaluated=tuple(dict.fromkeys([*plan.evaluated, *lines])), seen=seen)
    done = write_checkpoint(
        model,
        plan,
        request.output,
        repair=fitted,
        execution=request.execution,
        trust_remote_code=request.trust_remote_code,
    )
    return Pruned(plan, done)


@keywords(VerifyRequest)
def verify(request: VerifyRequest) -> Verified:
    """Compare a checkpoint, as transformers computes it, with a running inference server that serves it.

    The receipt is written into the checkpoint's folder, and changes nothing that is read from it.
    """
    return compare_with_server(request)
