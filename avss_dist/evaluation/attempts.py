"""Plans of one model, tried: repaired, and evaluated beside the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from avss_dist.analysis.verdict import primary_metric
from avss_dist.evaluation.engine import CellReporter, PlannedTask, commit, failure, measure, metrics
from avss_dist.evaluation.repairs import StoredPatch, fit_repairs
from avss_dist.evaluation.retention import Retained, retained
from avss_dist.executors.base import Executor
from avss_dist.intervention import NO_INTERVENTION, Intervention
from avss_dist.pruning.plan import Plan
from avss_dist.tasks.base import Result
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a task says: of the whole model, without the layers, and repaired.

    Attributes:
        whole, pruned, repaired: the metric that speaks for the task; None where nothing is repaired.
    """

    task: str
    whole: Result
    pruned: Result
    repaired: Result | None

    @property
    def final(self) -> Result:
        """Of the model with all that is done to it."""
        return self.repaired or self.pruned

    def of(self, result: Result) -> Retained:
        """What is left of the whole model's."""
        return retained(self.whole, result)

    def describe(self) -> str:
        """One line for people; of a loss, the perplexity."""
        metric, whole = shown(self.whole)
        repaired = f"{shown(self.final)[1]} repaired, " if self.repaired else ""
        return (
            f"{self.task}: {metric} {repaired}{shown(self.pruned)[1]} without these layers, {whole} of the whole model."
        )


def shown(result: Result) -> tuple[str, str]:
    """Name and value of a metric as people read them: of a loss, of its perplexity."""
    *_, (name, value, _) = metrics(result)
    return name, f"{value:z,.4g}"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A plan, evaluated.

    Attributes:
        patch: the weights that repair it; None where nothing is repaired.
        tasks: in their order.
    """

    plan: Plan
    patch: StoredPatch | None = field(repr=False)
    tasks: Sequence[Kept]

    @cached_property
    def kept(self) -> float:
        """What is left of the whole model's, in the task in which the least is."""
        return min(task.of(task.final).value for task in self.tasks)


@dataclass(eq=False, kw_only=True)
class Bench:
    """What plans of a model are tried with.

    Attributes:
        tasks: by name.
        fit: the task of fitting a repair; None for no repair.
        fresh: measure again what was done before.
    """

    tasks: Mapping[str, PlannedTask]
    fit: PlannedTask | None
    store: Store
    executor: Executor
    reporter: CellReporter | None = None
    fresh: bool = False
    _seen: set[tuple[str, str]] = field(default_factory=set, init=False)

    def attempt(self, plan: Plan) -> Attempt:
        """Repair and evaluate a plan; what was done before is found.

        Raises:
            AvssError: a mistake, or a fit or an evaluation that failed; what was measured is kept.
        """
        patch = self._fit(plan.drop)
        variants = [NO_INTERVENTION, plan.intervention, replace(plan.intervention, patch=patch)]
        cells = [cell for task in self.tasks.values() for cell in task.cells(variants)]
        cells = [cell for cell in cells if (cell.run_id, cell.cell_id) not in self._seen]
        failed = measure(cells, self.store, self.executor, self.reporter, fresh=self.fresh)
        self._seen |= {(cell.run_id, cell.cell_id) for cell in cells}
        found = {name: commit(task, self.store) for name, task in self.tasks.items()}
        if failed:
            raise failure(failed)
        return Attempt(plan=plan, patch=patch, tasks=[_kept(name, of, *variants) for name, of in found.items()])

    def _fit(self, drop: tuple[int, ...]) -> StoredPatch | None:
        if self.fit is None:
            return None
        found = fit_repairs([(self.fit, [drop])], self.store, self.executor, self.reporter, fresh=self.fresh)
        return found.get((self.fit.run_id(), drop))


def _kept(
    task: str, results: Sequence[Result], whole: Intervention, pruned: Intervention, repaired: Intervention
) -> Kept:
    of_model = [result for result in results if result.layer is None]
    metric = primary_metric([{"metric": result.metric} for result in of_model])
    by_key = {result.intervention: result for result in of_model if result.metric == metric}
    return Kept(
        task=task,
        whole=by_key[whole.key],
        pruned=by_key[pruned.key],
        repaired=by_key[repaired.key] if repaired.patch else None,
    )
