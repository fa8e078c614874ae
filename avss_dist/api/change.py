"""Changes of models: plans, sparsity plans, pruned checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from avss_dist.analysis.plans import evaluated_lines, plan_layers, plannable_run
from avss_dist.api.names import named_run
from avss_dist.core.errors import ConfigError
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import parse_threshold
from avss_dist.options import field_values, keywords, refuse_unused, request_values
from avss_dist.pruning.plan import Plan, read_plan
from avss_dist.pruning.savings import Budget
from avss_dist.pruning.search import Effort
from avss_dist.pruning.selection import Choice
from avss_dist.requests import DistillRequest, PlanRequest, PruneRequest, ShrinkRequest, SparsifyRequest
from avss_dist.warehouse.reader import Warehouse

if TYPE_CHECKING:
    from avss_dist.distillation.distill import Distilled
    from avss_dist.evaluation.search import Found
    from avss_dist.evaluation.shrink import Shrunk
    from avss_dist.pruning.repair.repair import Repair, Repaired
    from avss_dist.sparsity.plan import SparsityPlan


@keywords(PlanRequest)
def plan(request: PlanRequest) -> Plan:
    """Choose the layers of a run's model to drop, with the reason and the findings against it.

    `Plan.write` writes the plan to a file. Without `run`, the plan is for the newest run that can be planned for.
    """
    opened = Warehouse(request.warehouse)
    if request.run is not None or request.search:
        row = named_run(opened, request.run)
    else:
        row, _ = plannable_run(opened, request.by)
    return choose_layers(opened, row, request)[0]


def choose_layers(opened: Warehouse, row: Mapping[str, Any], request: PlanRequest) -> tuple[Plan, Found | None]:
    """Return the plan for a row of ``runs``, and the result of its search."""
    reading = (request.site, request.recipe, *parse_threshold(request.threshold))
    how = field_values(Choice, request)
    by, sublayers = how.pop("by"), how.pop("sublayers")
    limits = field_values(Budget, request)
    if any(value is not None for value in limits.values()):
        how["count"] = _count(row, Budget(**limits), how)
    text: dict[str, Any] = {"corpus": request.corpus, "skip_sequences": request.skip_sequences}
    effort = field_values(Effort, request)
    if request.search is None:
        measuring = {**text, "sublayers": sublayers, **effort, **request.given}
        defaults = Settings().as_dict() | asdict(Execution())
        refuse_unused(measuring, defaults, "without a search", "Leave it out, or name a `search`.")
        return plan_layers(opened, row, by=by, reading=reading, **how), None
    if request.corpus is None:
        raise ConfigError("`search` needs text to measure losses on.", "Name it with `corpus`.")
    starts = () if by is None else [plan_layers(opened, row, by=by, reading=reading, **how).drop]
    from avss_dist.evaluation.search import search

    result = search(
        opened.root.full,
        row,
        Choice(by=request.search, sublayers=sublayers, **how),
        effort=Effort(**effort),
        starts=starts,
        reporter=request.reporter,
        **text,
        **request.given,
    )
    return result.plan, result


def _count(run: Mapping[str, Any], budget: Budget, how: Mapping[str, Any]) -> int:
    """Return the number of layers to drop to meet a budget."""
    from avss_dist.evaluation.subjects import run_size

    if given := [name for name in ("share", "count", "mass") if how.get(name) is not None]:
        raise ConfigError(f"{budget.given[0]} and `{given[0]}` are mutually exclusive.", "Keep one.")
    return budget.count(run_size(run))


@keywords(SparsifyRequest)
def sparsify(request: SparsifyRequest) -> SparsityPlan:
    """Choose the activations of a run's model that become zero: thresholds of the inputs of its linear maps.

    The run must have measured the sites of these inputs; see `evaluation.sparsify.sparsify`.
    """
    from avss_dist.evaluation.sparsify import sparsify as measure

    opened = Warehouse(request.warehouse)
    run = named_run(opened, request.run)
    how = request_values(request) | {"warehouse": opened.root, "run": run}
    return measure(reporter=request.reporter, **how, **request.given)


@keywords(ShrinkRequest)
def shrink(request: ShrinkRequest) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and evaluate both. Finished steps are not repeated.

    The model is scored, pruned, repaired and evaluated. ``max_sequences`` is for each text, over all of its parts.
    """
    from avss_dist.evaluation.shrink import shrink as run

    return run(reporter=request.reporter, **request_values(request), **request.given)


class Pruned(TabularResult):
    """A written checkpoint.

    Attributes:
        plan: the plan, with its evaluations.
        folder, bytes, difference, notes, repair: values that `pruning.checkpoint.prune` returns.
        pushed: address on the hub; None if it was not pushed.
    """

    def __init__(self, plan: Plan, done: Mapping[str, Any]) -> None:
        self.plan = plan
        self.folder, self.bytes, self.difference = str(done["folder"]), int(done["bytes"]), done["difference"]
        self.notes, self.repair = done["notes"], done["repair"]
        self.pushed: str | None = done.get("pushed")

    def table(self) -> pa.Table:
        """Return a table of one row."""
        values = {"folder": self.folder, "bytes": self.bytes, "difference": self.difference, "drop": [*self.plan.drop]}
        values |= {"notes": self.notes, "repair": self.repair and self.repair.repair, "pushed": self.pushed}
        return pa.Table.from_pylist([values])

    def summary(self) -> str:
        """Return the folder and the number of remaining layers, in a line."""
        return f"{self.folder}, {len(self.plan.keep)} of {self.plan.num_layers} layers"


@keywords(PruneRequest)
def prune(request: PruneRequest) -> Pruned:
    """Write a checkpoint without the layers that a plan drops, repaired on request.

    With a warehouse, a repair is fitted on workers and stored there, or read if it is stored already. A checkpoint that
    cannot be pushed remains in its folder.
    """
    from avss_dist.models.checkpoints import resolve
    from avss_dist.pruning.checkpoint import prune as write
    from avss_dist.system.hub import require_access, upload

    model, output, warehouse, push = str(request.model), Path(request.output), request.warehouse, request.push
    settings, execution, code = request.settings, request.execution, request.settings.trust_remote_code
    plan = request.plan if isinstance(request.plan, Plan) else read_plan(request.plan)
    wanted = _repair(request)
    if wanted is None or warehouse is None:
        _refuse_workers(settings, execution)
    if push:
        require_access(push, "model")
    fitted: Repair | Repaired | None = wanted
    if wanted is not None and warehouse is not None:
        from avss_dist.evaluation.repairs import kept_repair

        where: dict[str, Any] = {"warehouse": warehouse, "execution": execution, "reporter": request.reporter}
        fitted = kept_repair(model, plan, wanted, output, **where)
    if warehouse is not None:
        checkpoint = resolve(model, trust_remote_code=code)
        lines = evaluated_lines(Warehouse(warehouse), {"revision": checkpoint.revision}, plan.removed)
        plan = replace(plan, evaluated=tuple(dict.fromkeys([*plan.evaluated, *lines])))
    done = write(model, plan, output, repair=fitted, execution=execution, trust_remote_code=code)
    if push:
        what = f"{Path(plan.model).name} without {len(plan.removed)} of its layers"
        hint = f"The checkpoint is complete in {output}. Upload it: hf upload {push} {output}"
        replaced = ["*.safetensors", "*.json"]
        done = {**done, "pushed": upload(output, push, "model", message=what, replaced=replaced, hint=hint)}
    return Pruned(plan, done)


def _refuse_workers(settings: Settings, execution: Execution) -> None:
    """Raise ConfigError for options of workers if nothing is fitted on workers."""
    here = {"partition", "max_memory", "offload_folder"} | ({"executor"} if execution.executor == "local" else set())
    given = {name: getattr(execution, name) for name in Execution.__dataclass_fields__ if name not in here}
    why = "without workers, which fit a repair into a warehouse"
    hint = "Leave it out, or name a `repair` and a `warehouse`."
    refuse_unused(given | {"threads": settings.threads}, Settings().as_dict() | asdict(Execution()), why, hint)


def _repair(request: PruneRequest) -> Repair | None:
    """Return the repair of a request, or None. Raises ConfigError for options of a repair without one."""
    from avss_dist.pruning.repair.repair import Repair

    settings, skipped, corpora = request.settings, request.skip_sequences, request.repair_corpora
    if request.fitted:
        return Repair(by=request.fitted, corpora=corpora, skip_sequences=skipped, settings=settings)
    given = {**settings.as_dict(), "skip_sequences": skipped, "repair_corpora": corpora}
    defaults = Settings(trust_remote_code=settings.trust_remote_code).as_dict()
    refuse_unused(given, defaults, "without a repair", "Leave it out, or name a `repair`.")
    return None


@keywords(DistillRequest)
def distill(request: DistillRequest) -> Distilled:
    """Train a smaller model on the predictions of the whole one, and write it as a checkpoint.

    The work so far is kept in a folder beside the output, from which the same call resumes after an interruption.
    """
    from avss_dist.distillation.distill import distill as run

    return run(request)
