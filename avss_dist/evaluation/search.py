"""Search of the set of layers to drop by the loss without it, measured by cells of a session, repaired or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from avss_dist.analysis.plans import evaluated_lines
from avss_dist.core.intervention import Intervention, InterventionKey, Removals, encode_removals, whole_layers
from avss_dist.core.names import LOSS, SEARCH
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.events import OnEvent, SearchStep
from avss_dist.evaluation.repairs import fit_of, fit_repairs, plan_fits
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlacedModel,
    PlannedTask,
    evaluation_options,
)
from avss_dist.evaluation.subjects import checkpoint_of_run
from avss_dist.evaluation.tasks import plan_text, text_task
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import text_config
from avss_dist.pruning.plan import Plan, layer_list, plan_of, reasons
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.splits import HELD_BACK, SINK_TOKENS
from avss_dist.pruning.search import Effort, Expansion, Search, best_sets, search_for
from avss_dist.pruning.selection import Choice
from avss_dist.pruning.shrinking import GREEDY, POOL, Shrinking
from avss_dist.tasks.base import Result, Task, combine
from avss_dist.tasks.cells import Cell, CellResult
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.warehouse.reader import Warehouse

CHOSEN_HERE = "The set was chosen for its loss on this very text: on other text, its loss will be higher."
AT_ONCE = 10  # sets in a cell: more cost less, and keep fewer workers busy


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search.

    Attributes:
        whole: loss of the whole model.
        chosen: loss without the set of the plan.
        steps: rounds, in order.
    """

    plan: Plan
    corpus: str
    whole: Result
    chosen: Result
    steps: Sequence[SearchStep]


def search(
    warehouse: str | Path,
    run: Mapping[str, Any],
    choice: Choice,
    *,
    corpus: str,
    effort: Effort | None = None,
    starts: Sequence[tuple[int, ...]] = (),
    skip_sequences: int = 0,
    reporter: OnEvent | None = None,
    **options: Any,
) -> Found:
    """Choose a set of layers by the loss of the model without it, on text; no loss is measured twice.

    Every loss is kept as it comes: a search that was stopped, or one with a larger budget, goes on from there.

    Args:
        run: a row of ``runs``: the model is its checkpoint.
        choice: by one of ``registry.SEARCHES``.
        starts: see `search_for`.
        skip_sequences: rows at the start of the corpus that are not read.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = evaluation_options(options)
    effort, corpus = effort or Effort(), RedactedURI(corpus)
    scores = Warehouse(warehouse).table("scores", run_ids=[run["run_id"]]).to_pylist()
    searching = search_for(choice, effort, layer_list(scores, str(run["model"]))[1], starts)
    checkpoint = checkpoint_of_run(run, trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(warehouse, settings, execution, reporter) as session:
        model = session.place(checkpoint, settings)
        planned = model.plan(search_task(checkpoint, corpus, model.settings, skip_sequences=skip_sequences))
        losses = removal_losses(session, planned)
        with session.keeping_workers():
            removed, steps = conduct(searching, losses, session.on_event)
            measured = losses([Expansion(()), Expansion(removed)])
        session.results(planned)
    whole, chosen = measured[()], measured[removed]
    text = {"text": str(corpus), "sequences": len(whole.samples), "skip_sequences": skip_sequences}
    outcome = {"sets": steps[-1].sets, "loss": round(chosen.value, 6), "whole_model": round(whole.value, 6)}
    how = {name: value for name, value in (("budget", effort.budget), ("width", effort.width)) if value}
    how |= {"starts": len(starts)} if starts else {}
    why = reasons(choice) | how | text | outcome | {"evaluation": planned.run_id(), "task": planned.task.name}
    made = replace(
        plan_of(scores, run, removed, why),
        findings=(CHOSEN_HERE,),
        evaluated=evaluated_lines(Warehouse(warehouse), run, removed),
    )
    return Found(plan=made, corpus=str(corpus), whole=whole, chosen=chosen, steps=steps)


def search_task(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> Task:
    """Return the task of the loss on a corpus without sets of layers; ``settings`` are `pinned`.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    text = plan_text(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    parts = tuple(LeaveOneOut(shard, ()) for shard in text.shards)
    return Task(name=f"{SEARCH}{corpus}", parts=parts, options={"skip_sequences": skip_sequences})


Losses = Callable[[Sequence[Expansion]], dict[Removals, Result]]
"""Type of a function that measures the loss without every set of expansions.

It raises AvssError if a cell fails; the results of other cells are kept.
"""


def conduct(
    searching: Search, losses: Losses, on_step: Callable[[SearchStep], None] | None = None
) -> tuple[Removals, list[SearchStep]]:
    """Run a search, measure the losses that it requests, and return the chosen set and the rounds.

    Args:
        on_step: receives each round.
    """
    steps: list[SearchStep] = []
    known: set[Removals] = set()
    expansions = next(searching)
    while True:
        results = losses(expansions)
        known |= {*results}
        values = {removed: result.value for removed, result in results.items()}
        steps.append(SearchStep(best=results[best_sets(values, 1)[0]], sets=len(known)))
        if on_step is not None:
            on_step(steps[-1])
        try:
            expansions = searching.send(values)
        except StopIteration as chosen:
            return chosen.value, steps


def removal_losses(session: EvaluationSession, planned: PlannedTask) -> Losses:
    """Return a function that measures the loss without sets of layers, several sets per cell, none twice.

    Args:
        planned: a `search_task`.
    """
    rows: dict[Removals, dict[int, Mapping[str, Any]]] = {}  # by part of the task

    def keep(row: Mapping[str, Any]) -> None:
        rows.setdefault(InterventionKey.of_row(row).removed, {})[row["part"]] = row

    def see(cell: Cell, measured: CellResult) -> None:
        for row in measured.rows:
            place = {"drop": encode_removals(row.removed or ()), "layer": None, "metric": LOSS, "part": cell.part}
            keep(place | {"samples": row.samples, "weights": row.weights})

    def cells(expansion: Expansion) -> Iterable[Cell]:
        """Yield cells for unknown losses, each for up to `AT_ONCE` sets with the same base."""
        base = Intervention(removed=expansion.base)
        for part, measure in enumerate(planned.task.parts):
            assert isinstance(measure, LeaveOneOut)
            if not expansion.layers and part not in rows.get(expansion.base, {}):
                yield planned.cell(part, measure, base)
            pairs = zip(expansion.layers, expansion.sets, strict=False)
            layers = [layer for layer, removed in pairs if part not in rows.get(removed, {})]
            for start in range(0, len(layers), AT_ONCE):
                some = replace(measure, layers=tuple(layers[start : start + AT_ONCE]))
                yield planned.cell(part, some, base)

    def losses(expansions: Sequence[Expansion]) -> dict[Removals, Result]:
        if missing := [cell for expansion in expansions for cell in cells(expansion)]:
            session.run(missing, see)
        parts = len(planned.task.parts)
        every = [removed for expansion in expansions for removed in expansion.sets]
        return {removed: result for removed in every for result in combine(rows[removed].values(), parts)}

    for row in [] if session.fresh else session.rows(planned.run_id()):
        keep(row)
    return losses


def repaired_losses(session: EvaluationSession, text: PlannedTask, fit: PlannedTask | None) -> Losses:
    """Return a function that measures the loss without sets of layers after a repair, which is fitted to each set.

    The effect of a repair depends on the set, so the best set with a repair may differ from the best without one.

    Args:
        text: the task of the loss.
        fit: the task of fitting the repair; None for no repair.
    """

    def losses(expansions: Sequence[Expansion]) -> dict[Removals, Result]:
        drops = [whole_layers(removed) for expansion in expansions for removed in expansion.sets]
        patches = fit_repairs(session, [(fit, drops)]) if fit else {}
        run_id = fit.run_id() if fit else ""
        repaired = {drop: Intervention(removed=drop, patch=patches.get((run_id, drop))) for drop in drops}
        measured = session.measure([(text, repaired.values())])[text]
        results = {result.intervention: result for result in measured if result.metric == LOSS}
        return {drop: results[intervention.key] for drop, intervention in repaired.items()}

    return losses


def plan_repaired_search(
    model: PlacedModel, request: Shrinking, rows: int, fit: PlannedTask | None
) -> tuple[PlannedTask, PlannedTask | None]:
    """Return the tasks of a search by the repaired loss: the loss on the first rows of the text, and the fit.

    Each set is repaired on as many rows of each repair text, or more where the repair needs them.

    Args:
        fit: the task of fitting the final repair; None for no repair.

    Raises:
        CorpusError: a text cannot be read, or has too few rows.
    """
    model = model.reading(rows)
    checkpoint, settings = model.checkpoint, model.settings
    task = replace(text_task(checkpoint, request.corpus, settings), name=f"{SEARCH}{RedactedURI(request.corpus)}")
    text = model.plan(task)
    if fit is None:
        return text, None
    whole = fit_of(fit)
    width = text_config(checkpoint, trust_remote_code=settings.trust_remote_code).get_text_config().hidden_size
    enough = max(rows, _rows_for(whole.texts, request.searched_repair, width))
    repair = replace(whole.repair, by=request.searched_repair, settings=replace(settings, max_sequences=enough))
    return text, plan_fits(model, whole.layers, [repair])[repair.by]


def _rows_for(texts: Sequence[CorpusPlan], by: str, width: int) -> int:
    """Return the number of rows of each text that suffice to fit a repair of a residual stream of ``width`` units."""
    if REPAIRS[by].text_rank == 0:
        return 1
    tokens = sum(text.num_tokens for text in texts) / sum(text.num_sequences for text in texts) - SINK_TOKENS
    fitted = REPAIRS[by].tokens_needed(width, width) / max(1.0, tokens) / len(texts)
    return ceil(fitted * HELD_BACK / (HELD_BACK - 1)) + 2  # what is held back is rounded up


def searched_plan(
    session: EvaluationSession,
    make: Callable[..., Plan],
    request: Shrinking,
    text: PlannedTask,
    fit: PlannedTask | None,
    **how: Any,
) -> Plan:
    """Return the plan that a greedy search finds among the layers of the least damage.

    Args:
        make: returns a plan by damage, of a ``count`` of layers.
        text, fit: see `plan_repaired_search`.
        how: ``count`` or ``share``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    choice = Choice(by=GREEDY, first=request.first, last=request.last, **how)
    layers = make(count=1).num_layers
    pool = make(count=min(POOL * choice.number(layers), len(choice.unprotected(layers)), layers - 1))
    searching = search_for(choice, Effort(), layers, pool=pool.dropped_layers)
    removed, steps = conduct(searching, repaired_losses(session, text, fit))
    outcome = {
        "among": describe_layers(pool.dropped_layers),
        "repair": request.searched_repair,
        "sets": steps[-1].sets,
        "loss": round(steps[-1].best.value, 6),
        "text": request.corpus,
        "sequences": text.settings.max_sequences,
        "evaluation": text.run_id(),
        "task": text.task.name,
    }
    return replace(pool, drop=removed, why=reasons(choice) | outcome, findings=(CHOSEN_HERE,), evaluated=())
