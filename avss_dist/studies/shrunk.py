"""Results of shrinking: evaluated plans, and the written model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa

from avss_dist.core.intervention import EncodedPatch
from avss_dist.core.results import TabularResult
from avss_dist.core.values import NewRow
from avss_dist.distillation.record import DistillRecord
from avss_dist.evaluation.continuations import Continuation
from avss_dist.evaluation.speed import Speed
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.registry import RepairRecord
from avss_dist.tasks.results import Result, Retention
from avss_dist.warehouse.names import describe_task

WHOLE_RESULT = "whole"
"""Name of the whole model among the results of a task."""
OF_MODEL = {"pruned": "without these layers", WHOLE_RESULT: "of the whole model"}
"""Ends of the sentence on a result, where they are not the name of the model."""


@dataclass(frozen=True, kw_only=True)
class TaskRetention:
    """Primary metric of a task for the whole and the smaller models.

    Attributes:
        results: result of the ``whole``, the ``pruned``, the ``repaired`` and the ``distilled`` model, in this order,
            as far as they exist.
        skipped: number of rows of a text before those that were evaluated.
    """

    task: str
    results: Mapping[str, Result]
    skipped: int = 0

    @property
    def whole(self) -> Result:
        """Result of the whole model."""
        return self.results[WHOLE_RESULT]

    @cached_property
    def retentions(self) -> dict[str, Retention]:
        """Retention of each smaller model against the whole model."""
        retentions = {}
        for name, result in self.results.items():
            if name != WHOLE_RESULT:
                retentions[name] = Retention.of(self.whole, result)
        return retentions

    @property
    def final(self) -> Retention:
        """Retention of the distilled model, else of the repaired model, else of the pruned model."""
        return list(self.retentions.values())[-1]

    def describe(self) -> str:
        """Return one line for people, with the perplexity of a loss."""
        values = []
        for name, result in reversed(list(self.results.items())):
            _, value, _ = result.metrics()[-1]
            values.append(f"{value:z,.4g} {OF_MODEL.get(name, name)}")
        metric, _, _ = self.whole.metrics()[-1]
        task = describe_task(self.task, self.skipped, len(self.whole.samples))
        return f"{task}: {metric} {', '.join(values)}."

    def describe_kept(self) -> str:
        """Return one line for people on the retention of the smaller models, with the interval of the last one."""
        shares = [f"{retention.value:z.1%} {name}" for name, retention in self.retentions.items()]
        line = f"Kept of the whole model on {self.task}: {', '.join(shares)}"
        final = self.final
        if final.has_interval:
            line += f" (95% interval {final.low:z.1%} to {final.high:z.1%})"
        return f"{line}."

    def describe_all(self) -> str:
        """Return the lines of `describe` and `describe_kept` as one."""
        return f"{self.describe()} {self.describe_kept()}"


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """A plan, and the results of the model under it.

    Attributes:
        patch: weights that repair the model; None without a repair.
        tasks: results by task, in order.
    """

    plan: Plan
    patch: EncodedPatch | None = field(repr=False)
    tasks: Sequence[TaskRetention]

    @cached_property
    def kept(self) -> float:
        """Lowest retention over the tasks."""
        return min(task.final.value for task in self.tasks)


@dataclass(frozen=True, kw_only=True, repr=False)
class Shrunk(TabularResult):
    """A shrunk model.

    Attributes:
        folder, bytes: folder of the checkpoint, and size of its weights.
        best: the plan of the checkpoint.
        curve: every plan that was evaluated, by the number of layers that it drops; before any distillation.
        record: record of the repair; None without a repair.
        difference: see `pruning.checkpoint.prune`; of the checkpoint before any distillation.
        notes: remarks on the checkpoint.
        distillation: record of the distillation; None without one.
        continuations: continuations of the prompts by the whole model and by the smaller ones.
        speed: speed and memory beside the whole model; None if they were not measured.
    """

    folder: str
    bytes: int
    best: CandidateResult
    curve: Sequence[CandidateResult]
    record: RepairRecord | None
    difference: float | None
    notes: Sequence[str]
    distillation: DistillRecord | None = None
    continuations: Sequence[Continuation] = ()
    speed: Speed | None = None

    _bars = ("kept",)

    def table(self) -> pa.Table:
        """Return a table with a row for each evaluated plan: dropped layers and retention.

        With distillation, a column ``distilled`` has the retention of the distilled model in the row of its plan.
        """
        rows = []
        for result in self.curve:
            row: NewRow = {"drop": list(result.plan.drop), "kept": result.kept}
            if self.distillation:
                is_best = result.plan.drop == self.best.plan.drop
                row["distilled"] = self.best.kept if is_best else None
            rows.append(row)
        return pa.Table.from_pylist(rows)

    def summary(self) -> str:
        """Return the folder, the number of layers and the retention, in a line."""
        plan = self.best.plan
        line = f"{self.folder}, {len(plan.keep)} of {plan.num_layers} layers, {self.best.kept:z.1%} kept"
        if self.distillation:
            line += f", distilled on {self.distillation.after.tokens:,} tokens"
        return line
