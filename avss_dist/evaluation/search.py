"""Search the set of layers to drop: what a search asks, measured on text by the cells of `evaluate`, and the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from avss_dist.analysis.plans import evaluated_lines
from avss_dist.errors import AvssError
from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedTask,
    Rounds,
    SilentCells,
    commit,
    evaluation_options,
    failure,
    pinned,
    placed,
    plan_text,
)
from avss_dist.executors.open import open_executor
from avss_dist.intervention import Intervention, InterventionKey, Removals, encode_removals
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.names import LOSS, SEARCH
from avss_dist.pruning.plan import Plan, layer_list, plan_of, reasons
from avss_dist.pruning.search import Effort, Expansion, Search, best_sets, search_for
from avss_dist.pruning.selection import Choice, PlanError
from avss_dist.settings import Settings
from avss_dist.tasks.base import Result, Task, combine
from avss_dist.tasks.cells import Cell
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

CHOSEN_HERE = "The set was chosen for its loss on this very text: on other text, its loss will be higher."
AT_ONCE = 10  # sets in a cell: more cost less, and keep fewer workers busy


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a round of a search found.

    Attributes:
        best: the loss without the best set of the round.
        sets: whose loss the search has, this round's among them.
    """

    best: Result
    sets: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        whole: the loss of the whole model.
        chosen: the loss without the set of the plan.
        steps: in order.
    """

    plan: Plan
    corpus: str
    whole: Result
    chosen: Result
    steps: Sequence[Step]


class SearchReporter(CellReporter, Protocol):
    """Hears how a search goes; ``started`` is called at each round."""

    def stepped(self, step: Step) -> None: ...


class Silent(SilentCells):
    """Says nothing."""

    def stepped(self, step: Step) -> None: ...


def search(
    warehouse: str | Path,
    run: Mapping[str, Any],
    choice: Choice,
    *,
    corpus: str,
    effort: Effort | None = None,
    starts: Sequence[tuple[int, ...]] = (),
    skip_sequences: int = 0,
    reporter: SearchReporter | None = None,
    **options: Any,
) -> Found:
    """Choose a set of layers by the loss of the model without it, on text; no loss is measured twice.

    Every loss is kept as it comes: a search that was stopped, or one with a larger budget, goes on from there.

    Args:
        run: a row of ``runs``: the model is its checkpoint.
        choice: by one of ``settings.SEARCHES``.
        starts: see `search_for`.
        skip_sequences: rows at the start of the corpus that are not read.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = evaluation_options(options)
    effort = effort or Effort()
    store, corpus = Store(warehouse), RedactedURI(corpus)
    scores = Warehouse(warehouse).table("scores", run_ids=[run["run_id"]]).to_pylist()
    searching = search_for(choice, effort, layer_list(scores, str(run["model"]))[1], starts)
    checkpoint = _checkpoint(run, trust_remote_code=settings.trust_remote_code)
    with closing(open_executor(execution, settings)) as executor:
        fixed = pinned(settings, checkpoint, executor.device)
        placement = placed(checkpoint, fixed, execution, executor)
        task = search_task(checkpoint, corpus, fixed, skip_sequences=skip_sequences)
        planned = PlannedTask(checkpoint=checkpoint, settings=fixed, task=task, placement=placement)
        hears = reporter or Silent()
        with closing(Rounds(store, executor, hears)) as rounds:
            losses = Losses(planned, store, rounds, hears, fresh=execution.fresh)
            drop, steps = conduct(searching, losses, hears.stepped)
    commit(planned, store)
    whole, chosen = losses.of(()), losses.of(drop)
    text = {"text": str(corpus), "sequences": len(whole.samples), "skip_sequences": skip_sequences}
    outcome = {"sets": steps[-1].sets, "loss": round(chosen.value, 6), "whole_model": round(whole.value, 6)}
    how = {name: value for name, value in (("budget", effort.budget), ("width", effort.width)) if value}
    how |= {"starts": len(starts)} if starts else {}
    why = reasons(choice) | how | text | outcome | {"evaluation": planned.run_id(), "task": task.name}
    made = replace(
        plan_of(scores, run, drop, why),
        findings=(CHOSEN_HERE,),
        evaluated=evaluated_lines(Warehouse(warehouse), run, drop),
    )
    return Found(plan=made, corpus=str(corpus), whole=whole, chosen=chosen, steps=steps)


def _checkpoint(run: Mapping[str, Any], *, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint of a run, as it was."""
    model, revision = str(run["model"]), run["revision"] or ""
    hub_commit = len(revision) == 40
    checkpoint = resolve(f"{model}@{revision}" if hub_commit else model, trust_remote_code=trust_remote_code)
    if checkpoint.revision != revision:
        raise PlanError(
            f"{run['run_id']} is of {model} at {revision[:12]}; it is at {checkpoint.revision[:12]} now.",
            "Score it again.",
        )
    return checkpoint


def search_task(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> Task:
    """The loss on a corpus without sets of layers; ``settings`` are `pinned`.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    text = plan_text(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    parts = tuple(LeaveOneOut(shard, ()) for shard in text.shards)
    return Task(name=f"{SEARCH}{corpus}", parts=parts, options={"skip_sequences": skip_sequences})


class Measures(Protocol):
    """Measures the losses that a search asks for."""

    def measure(self, expansions: Sequence[Expansion]) -> dict[Removals, Result]:
        """The loss without every set.

        Raises:
            AvssError: a cell failed; what was measured is kept.
        """


def conduct(
    searching: Search, losses: Measures, stepped: Callable[[Step], None] | None = None
) -> tuple[Removals, list[Step]]:
    """Give a search the losses that it asks for, until it chooses; the set that it chooses, and its rounds.

    Args:
        stepped: is called after each round.
    """
    steps: list[Step] = []
    known: set[Removals] = set()
    expansions = next(searching)
    while True:
        found = losses.measure(expansions)
        known |= {*found}
        values = {drop: result.value for drop, result in found.items()}
        steps.append(Step(best=found[best_sets(values, 1)[0]], sets=len(known)))
        if stepped is not None:
            stepped(steps[-1])
        try:
            expansions = searching.send(values)
        except StopIteration as chosen:
            return chosen.value, steps


class Losses:
    """The losses of a model without sets of layers: those in the warehouse, and those that are measured.

    Args:
        planned: of a `search_task`.
        fresh: measure what the warehouse has, too.
    """

    def __init__(
        self, planned: PlannedTask, store: Store, rounds: Rounds, reporter: CellReporter, *, fresh: bool
    ) -> None:
        self._planned, self._rounds, self._reporter = planned, rounds, reporter
        self._rows: dict[Removals, dict[int, Mapping[str, Any]]] = {}
        for row in [] if fresh else store.cells(planned.run_id()).to_pylist():
            self._keep(row)

    def of(self, drop: Removals) -> Result:
        """The loss without layers, which has been measured."""
        (result,) = combine(self._rows[drop].values(), len(self._planned.task.parts))
        return result

    def measure(self, expansions: Sequence[Expansion]) -> dict[Removals, Result]:
        """See `Measures`."""
        cells = [cell for one in expansions for cell in self._cells(one)]
        self._reporter.started(cells, 0)
        failed: list[tuple[Cell, AvssError]] = []
        for cell, outcome in self._rounds.run(cells):
            if isinstance(outcome, AvssError):
                failed.append((cell, outcome))
                continue
            for row in outcome.rows:
                drop = encode_removals(row.removed or ())
                place = {"drop": drop, "layer": None, "metric": LOSS, "part": cell.part}
                self._keep(place | {"samples": row.samples, "weights": row.weights})
        if failed:
            raise failure(failed)
        return {drop: self.of(drop) for one in expansions for drop in one.sets}

    def _keep(self, row: Mapping[str, Any]) -> None:
        self._rows.setdefault(InterventionKey.of_row(row).removed, {})[row["part"]] = row

    def _cells(self, expansion: Expansion) -> list[Cell]:
        """The cells of what is not known: sets that begin from the same one together, `AT_ONCE` at most."""
        cells, base = [], Intervention(removed=expansion.base)
        for part, measure in enumerate(self._planned.task.parts):
            assert isinstance(measure, LeaveOneOut)
            if not expansion.layers and part not in self._rows.get(expansion.base, {}):
                cells.append(self._planned.cell(part, measure, base))
            pairs = zip(expansion.layers, expansion.sets, strict=False)
            layers = [layer for layer, drop in pairs if part not in self._rows.get(drop, {})]
            for start in range(0, len(layers), AT_ONCE):
                some = replace(measure, layers=tuple(layers[start : start + AT_ONCE]))
                cells.append(self._planned.cell(part, some, base))
        return cells
