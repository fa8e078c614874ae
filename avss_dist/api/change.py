"""Changes of models: plans, sparsity plans, pruned checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from avss_dist.analysis.plans import evaluated_lines, plan_experts, plan_layers, plannable_run
from avss_dist.api.names import named_run
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import count_removed, removal_names
from avss_dist.core.registry import GREEDY
from avss_dist.core.results import TabularResult
from avss_dist.core.text import parse_threshold
from avss_dist.options import field_values, keywords, refuse_unused
from avss_dist.pruning.plan import Plan, count_for_memory, read_plan, run_size
from avss_dist.pruning.selection import Choice, ExpertChoice
from avss_dist.requests import (
    DistillRequest,
    PlanRequest,
    PrecisionRequest,
    PruneRequest,
    ShrinkRequest,
    SparsifyRequest,
)
from avss_dist.warehouse.reader import Warehouse

if TYPE_CHECKING:
    from avss_dist.distillation.distill import Distilled
    from avss_dist.evaluation.events import OnEvent
    from avss_dist.evaluation.search import SearchResult
    from avss_dist.evaluation.shrink import Shrunk
    from avss_dist.map_plans.plans import PrecisionPlan, SparsityPlan
    from avss_dist.pruning.repair.repair import Repair, Repaired


@keywords(PlanRequest)
def plan(request: PlanRequest) -> Plan:
    """Choose the layers or routed experts of a run's model to drop, with the reason and the findings against it.

    `Plan.write` writes the plan to a file. Without `run`, the plan is for the newest run that can be planned for.
    """
    opened = Warehouse(request.warehouse)
    if request.run is not None or request.by == GREEDY:
        row = named_run(opened, request.run, measured=request.by != GREEDY)
    else:
        row, _ = plannable_run(opened, request.by, experts=request.experts is not None)
    return choose_layers(opened, row, request, request.on_event)[0]


def choose_layers(
    opened: Warehouse, run: Mapping[str, Any], request: PlanRequest, on_event: OnEvent | None = None
) -> tuple[Plan, SearchResult | None]:
    """Return the plan for a row of ``runs``, and the result of its search."""
    if request.experts is not None:
        refuse_unused(request.given, "on routed experts", "Leave it out.")
        return plan_experts(opened, run, ExpertChoice(**field_values(ExpertChoice, request))), None
    reading = (request.site, request.recipe, *parse_threshold(request.threshold))
    constraints = field_values(Choice, request)
    del constraints["by"]
    if request.memory is not None:
        if given := [name for name in ("share", "count") if constraints[name] is not None]:
            raise ConfigError(f"`memory` and `{given[0]}` are mutually exclusive.", "Keep one.")
        constraints["count"] = count_for_memory(run_size(run), request.memory)
    if request.by == GREEDY:
        from avss_dist.evaluation.search import search

        result = search(request, run, Choice(by=GREEDY, **constraints), on_event)
        return result.plan, result
    unused = {"corpus": request.corpus, **request.given}
    refuse_unused(unused, "without a search", "Leave it out, or choose `by` greedy.")
    return plan_layers(opened, run, by=request.by, reading=reading, **constraints), None


@keywords(SparsifyRequest)
def sparsify(request: SparsifyRequest) -> SparsityPlan:
    """Choose the activations of a run's model that become zero: thresholds of the inputs of its linear maps.

    The run must have measured the sites of these inputs; see `evaluation.sparsify.sparsify`.
    """
    from avss_dist.evaluation.sparsify import sparsify as measure

    return measure(request, named_run(Warehouse(request.warehouse), request.run), request.on_event)


@keywords(PrecisionRequest)
def quantize(request: PrecisionRequest) -> PrecisionPlan:
    """Choose the number format of each linear map of a run's model under a budget of bits.

    ``ablate(..., quantize=[...])`` must have predicted the losses; see `map_plans.quantize.plan_precision`.
    """
    from avss_dist.map_plans.quantize import plan_precision

    store = Warehouse(request.warehouse)
    return plan_precision(request, store, named_run(store, request.run, measured=True))


@keywords(ShrinkRequest)
def shrink(request: ShrinkRequest) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and evaluate both. Finished steps are not repeated.

    The model is scored, pruned, repaired and evaluated. ``max_sequences`` is for each text, over all of its parts.
    """
    from avss_dist.evaluation.shrink import shrink as run

    return run(request, request.on_event)


class Pruned(TabularResult):
    """A written checkpoint.

    Attributes:
        plan: the plan, with its evaluations.
        folder, bytes, difference, notes, repair: values that `pruning.checkpoint.prune` returns.
    """

    def __init__(self, plan: Plan, done: Mapping[str, Any]) -> None:
        self.plan = plan
        self.folder, self.bytes, self.difference = str(done["folder"]), int(done["bytes"]), done["difference"]
        self.notes, self.repair = done["notes"], done["repair"]

    def table(self) -> pa.Table:
        """Return a table of one row."""
        values = {
            "folder": self.folder,
            "bytes": self.bytes,
            "difference": self.difference,
            "drop": [*self.plan.dropped_layers],
        }
        if self.plan.experts:
            values["experts"] = removal_names(self.plan.drop[len(self.plan.dropped_layers) :])
        values |= {"notes": self.notes, "repair": self.repair and self.repair.repair}
        return pa.Table.from_pylist([values])

    def summary(self) -> str:
        """Return the folder, the number of remaining layers, and that of removed experts, in a line."""
        return f"{self.folder}, {describe_remaining(self.plan)}"


def describe_remaining(plan: Plan) -> str:
    """Return the number of remaining layers and of removed experts as text."""
    experts = plan.drop[len(plan.dropped_layers) :]
    without = f" without {count_removed(experts)}" if experts else ""
    return f"{len(plan.keep)} of {plan.num_layers} layers{without}"


@keywords(PruneRequest)
def prune(request: PruneRequest) -> Pruned:
    """Write a checkpoint without the layers and routed experts that a plan drops, repaired on request.

    With a warehouse, a repair is fitted on workers and stored there, or read if it is stored already.
    """
    from avss_dist.models.checkpoints import resolve
    from avss_dist.pruning.checkpoint import prune as write

    model, output, warehouse = str(request.model), Path(request.output), request.warehouse
    execution, code = request.execution, request.settings.trust_remote_code
    plan = request.plan if isinstance(request.plan, Plan) else read_plan(request.plan)
    checkpoint = resolve(model, trust_remote_code=code)
    fitted: Repair | Repaired | None = None
    if request.fitted:
        from avss_dist.distillation.teacher_text import with_own_text
        from avss_dist.evaluation.repairs import stored_repair
        from avss_dist.pruning.repair.repair import Repair

        corpora = with_own_text(request.repair_corpora, checkpoint, request.settings, request.on_event)
        wanted = Repair(by=request.fitted, corpora=corpora, settings=request.settings)
        stored = warehouse is not None and stored_repair(request, plan, wanted, warehouse, request.on_event)
        fitted = stored or wanted
    if warehouse is not None:
        lines = evaluated_lines(Warehouse(warehouse), {"revision": checkpoint.revision}, plan.drop)
        plan = replace(plan, evaluated=tuple(dict.fromkeys([*plan.evaluated, *lines])))
    done = write(model, plan, output, repair=fitted, execution=execution, trust_remote_code=code)
    return Pruned(plan, done)


@keywords(DistillRequest)
def distill(request: DistillRequest) -> Distilled:
    """Train a smaller model on the predictions of the whole one, and write it as a checkpoint.

    The work so far is kept in a folder beside the output, from which the same call resumes after an interruption.
    """
    from avss_dist.distillation.distill import distill as run

    return run(request)
