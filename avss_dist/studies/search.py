"""Greedy search of the set of layers to drop by the loss without it, with or without a repair of each set.

See SLEB, Song et al., arXiv 2402.09025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import ceil, inf, isnan
from typing import Any

from avss_dist.core.intervention import Intervention, Removals
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.corpus import seen
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.distillation.curve import ignore
from avss_dist.evaluation.events import SearchStep
from avss_dist.evaluation.repairs import fit_of, fit_repairs, plan_fits
from avss_dist.evaluation.session import EvaluationSession, PlacedModel, PlannedTask, checkpoint_of_run
from avss_dist.evaluation.tasks import plan_text_task
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.planning.layers import evaluated_lines
from avss_dist.plans.choice import Choice
from avss_dist.plans.plan import Plan, layer_list, plan_of, reasons
from avss_dist.pruning.repair.registry import REPAIRS, searched_repair
from avss_dist.pruning.repair.repair import HELD_BACK, SINK_TOKENS
from avss_dist.requests import PlanRequest, ShrinkRequest
from avss_dist.stats.catalog import GREEDY
from avss_dist.stats.metrics import LOSS
from avss_dist.tasks.task import Result, combine
from avss_dist.tasks.text_loss import LeaveOneOut
from avss_dist.warehouse.names import SEARCH
from avss_dist.warehouse.reader import Warehouse

POOL = 2  # candidates of the greedy search after repairs, in multiples of the number of layers to drop
SETS_PER_CELL = 10  # more sets cost less each, and occupy fewer workers
Layers = tuple[int, ...]
CHOSEN_HERE = "The set was chosen for its loss on this very text: on other text, its loss will be higher."


def search(
    request: PlanRequest,
    run: Mapping[str, Any],
    choice: Choice,
) -> tuple[Plan, list[SearchStep]]:
    """Search the set of layers to drop by the loss without it. Losses that the warehouse has are not measured again.

    A search that was stopped continues from the stored losses.

    Args:
        run: row of ``runs`` whose checkpoint is searched.
        choice: number of layers to drop, and protected layers.

    Returns:
        The plan, and the rounds in order, after the whole model as a round without a set.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`). Measured cells remain in the warehouse.
    """
    assert request.corpus is not None  # which the request checks
    settings, corpus = request.settings, RedactedURI(request.corpus)
    scores = Warehouse(request.warehouse).read_scores(run["run_id"])
    layers = layer_list(scores, str(run["model"]))[1]
    count = choice.number(layers)
    checkpoint = checkpoint_of_run(run, trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(request.warehouse, settings, request.execution, request.on_event) as session:
        model = session.place(checkpoint, settings)
        with searching(session, model, corpus) as (planned, losses):
            removed, steps = greedy_search(choice.unprotected(layers), count, losses, session.on_event)
            whole = SearchStep(best=losses((), ())[()], sets=0)
    why = {
        **reasons(choice),
        "text": str(corpus),
        "sequences": len(whole.best.samples),
        "skip_sequences": settings.skip_sequences,
        "sets": steps[-1].sets,
        "loss": round(steps[-1].best.value, 6),
        "whole_model": round(whole.best.value, 6),
        "evaluation": planned.run_id(),
        "task": planned.task.name,
    }
    plan = replace(
        plan_of(scores, run, removed, why, planned.seen),
        findings=(CHOSEN_HERE,),
        evaluated=evaluated_lines(Warehouse(request.warehouse), run, removed),
    )
    return plan, [whole, *steps]


Losses = Callable[[Layers, Layers], dict[Layers, Result]]
"""Function that returns the loss without a base set and each of some other layers, or without the base set alone.

It raises AvssError if a cell fails. Other cells remain in the warehouse.
"""


def _expand(base: Layers, layers: Layers) -> list[Layers]:
    """Return the base set with each of the layers added, in ascending order, or the base set without any."""
    return [tuple(sorted([*base, layer])) for layer in layers] or [base]


def greedy_search(
    candidates: Iterable[int], count: int, losses: Losses, on_step: Callable[[SearchStep], None] = ignore
) -> tuple[Layers, list[SearchStep]]:
    """Return the layers that a greedy search removes, and its rounds.

    Each round removes the layer without which the loss is least.

    Args:
        candidates: layers that may be removed.
        count: number of layers to remove.
        on_step: receives each round.
    """
    chosen: Layers = ()
    steps: list[SearchStep] = []
    while len(chosen) < count:
        results = losses(chosen, tuple(layer for layer in candidates if layer not in chosen))
        values = {removed: inf if isnan(result.value) else result.value for removed, result in results.items()}
        chosen = min(values, key=lambda removed: (values[removed], removed))
        earlier = steps[-1].sets if steps else 0
        steps.append(SearchStep(best=results[chosen], sets=earlier + len(results)))
        on_step(steps[-1])
    return chosen, steps


@contextmanager
def searching(session: EvaluationSession, model: PlacedModel, corpus: str) -> Iterator[tuple[PlannedTask, Losses]]:
    """Plan the task of the loss on a corpus without sets of layers, and write its results at the end of the block.

    Workers are kept inside the block.

    Yields:
        The task, and a function that measures losses, several sets per cell and none twice.

    Raises:
        CorpusError: the corpus cannot be read, or is too short.
    """
    planned = plan_text_task(model, corpus, partial(LeaveOneOut, layers=()), SEARCH, use=seen.SEARCH)

    def measured() -> dict[Removals, Result]:
        combined = combine(session.known_rows(planned.run_id()), len(planned.task.parts))
        return {result.removed: result for result in combined}

    results = measured()

    def losses(base: Layers, layers: Layers) -> dict[Layers, Result]:
        drops = _expand(base, layers)
        missing = [removed for removed in drops if removed not in results]
        chunks = [missing[start : start + SETS_PER_CELL] for start in range(0, len(missing), SETS_PER_CELL)]
        cells = []
        for part, measure in enumerate(planned.task.parts):
            assert isinstance(measure, LeaveOneOut)
            for chunk in chunks:
                added = [layer for removed in chunk for layer in removed if layer not in base]
                cells.append(planned.cell(part, replace(measure, layers=tuple(added)), Intervention(removed=base)))
        if cells:
            session.run(cells)
            results.update(measured())
        return {removed: results[removed] for removed in drops}

    with session.keeping_workers():
        yield planned, losses
    session.results(planned)


def _rows_to_fit(repair: str, model: PlacedModel, texts: Sequence[CorpusPlan]) -> int:
    """Return the number of rows of each text that a repair needs at least. 0 for one that does with few.

    Args:
        texts: texts that the repair is fitted on; their rows are as long as those that are counted.
    """
    if REPAIRS[repair].form != "full":
        return 0
    width = text_config(model.checkpoint).get_text_config().hidden_size
    tokens = sum(text.num_tokens for text in texts)
    sequences = sum(text.num_sequences for text in texts)
    tokens_of_row = max(1.0, tokens / sequences - SINK_TOKENS)
    fitted_rows = REPAIRS[repair].tokens_needed(width, width) / tokens_of_row / len(texts)
    with_held_back = fitted_rows * HELD_BACK / (HELD_BACK - 1)
    return ceil(with_held_back) + 2  # because the held-back rows are rounded up


def repaired_search(
    session: EvaluationSession,
    model: PlacedModel,
    make_plan: Callable[..., Plan],
    request: ShrinkRequest,
    rows: int,
    fit: PlannedTask | None,
) -> Callable[..., Plan]:
    """Return a function that plans a ``count`` or ``share`` of layers by a greedy search among those of least damage.

    The search goes by the loss on the first rows of the text after a repair, which is fitted to each set on the same
    number of rows of each repair text, or on more if the repair needs them: the best set with a repair may differ from
    the best one without.

    Args:
        make_plan: returns a plan by damage that drops a ``count`` of layers.
        fit: the task of fitting the final repair; None for no repair.

    Raises:
        CorpusError: a text cannot be read, or has too few rows.
    """
    model = model.reading(max_sequences=rows)
    repair = searched_repair(request.repair)
    text = plan_text_task(model, request.corpus, prefix=SEARCH, use=seen.SEARCH)
    read = [*text.seen]
    if fit is not None:
        final = fit_of(fit)
        fit = plan_fits(
            model,
            final.layers,
            [repair],
            final.repair.corpora,
            max_sequences=max(rows, _rows_to_fit(repair, model, final.texts)),
            skip_sequences=final.repair.settings.skip_sequences,
        )[repair]
        read += [seen.seen_text(fitted, fit.settings, seen.SEARCH) for fitted in fit_of(fit).texts]

    def losses(base: Layers, layers: Layers) -> dict[Layers, Result]:
        drops = _expand(base, layers)
        patches = fit_repairs(session, [(fit, drops)]) if fit else {}
        repaired = {drop: Intervention(removed=drop, patch=patches.get((fit, drop))) for drop in drops}
        measured = session.measure({text: repaired.values()})[text]
        results = {result.intervention: result for result in measured if result.metric == LOSS}
        return {drop: results[intervention.key] for drop, intervention in repaired.items()}

    def searched_plan(**size: Any) -> Plan:
        choice = Choice(by=GREEDY, first=request.first, last=request.last, **size)
        layers = make_plan(count=1).num_layers
        number = choice.number(layers)
        pool = make_plan(count=min(POOL * number, len(choice.unprotected(layers)), layers - 1))
        removed, steps = greedy_search(pool.dropped_layers, number, losses)
        why = {
            **reasons(choice),
            "among": describe_layers(pool.dropped_layers),
            "repair": repair,
            "sets": steps[-1].sets,
            "loss": round(steps[-1].best.value, 6),
            "text": str(RedactedURI(request.corpus)),
            "sequences": text.settings.max_sequences,
            "evaluation": text.run_id(),
            "task": text.task.name,
        }
        every_text = seen.distinct([*pool.seen, *read])
        return replace(pool, drop=removed, why=why, findings=(CHOSEN_HERE,), evaluated=(), seen=every_text)

    return searched_plan
