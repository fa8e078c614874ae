"""Losses of sets of layers for a greedy search, with or without a repair, and the plans of such searches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

from avss_dist.core.intervention import Intervention, Removals
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.core.values import NewObject, TableRow
from avss_dist.corpus import seen
from avss_dist.corpus.seen import SeenText
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.own_text import OwnTextWriter
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text_task
from avss_dist.evaluation.repairs import Patches, fit_of, fit_repairs, plan_fits, repaired_removal
from avss_dist.evaluation.session import EvaluationSession, checkpoint_of_run
from avss_dist.models.checkpoint.layer_kinds import describe_misread
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.planning.criteria import read_layers
from avss_dist.planning.evaluated import evaluated_lines
from avss_dist.planning.layers import LayerRanking
from avss_dist.planning.patterns import pattern_of, rules_of_run
from avss_dist.planning.search import CHOSEN_HERE, Losses, SearchStep, expand, greedy_search
from avss_dist.plans.choice import Choice, require_pattern_size
from avss_dist.plans.criteria import Layers
from avss_dist.plans.plan import Plan
from avss_dist.plans.run_layers import plan_removal, reasons
from avss_dist.pruning.repair.registry import REPAIRS, searched_repair
from avss_dist.pruning.repair.splits import HELD_BACK, SINK_TOKENS
from avss_dist.requests import PlanRequest, ShrinkRequest
from avss_dist.stats.metrics import LOSS
from avss_dist.tasks.results import Result, combine
from avss_dist.tasks.text_loss import LeaveOneOut
from avss_dist.warehouse.names import SEARCH
from avss_dist.warehouse.reader import Warehouse

POOL = 2
"""Number of candidates of a search after repairs, in multiples of the number of layers to drop."""
SETS_PER_CELL = 10
"""Sets of layers that a cell measures. More sets in a cell cost less each, and occupy fewer workers."""


def search(request: PlanRequest, run: TableRow, choice: Choice) -> tuple[Plan, list[SearchStep]]:
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
    assert request.corpus is not None  # The request requires a text for a search.
    settings = request.settings
    corpus = RedactedURI(request.corpus)
    warehouse = Warehouse(request.warehouse)
    layers = read_layers(warehouse, run)
    layers.list_path()  # A model that no plan can be made for is refused before anything is measured.
    count = choice.number(layers.number)
    rules = rules_of_run(run)
    pattern = None
    if choice.keep_pattern:
        pattern = pattern_of(rules, layers.number)
        require_pattern_size(pattern, count, choice.unprotected(layers.number))
    checkpoint = checkpoint_of_run(run, trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(request.warehouse, settings, request.execution, request.on_event) as session:
        model = session.place(checkpoint, settings)
        with searching(session, model, corpus) as (planned, losses):
            removed, steps = greedy_search(choice.unprotected(layers.number), count, losses, session.on_event, pattern)
            whole = SearchStep(best=losses((), ())[()], sets=0)
    why = {
        **reasons(choice),
        "text": str(corpus),
        "sequences": len(whole.best.samples),
        "skip_sequences": settings.skip_sequences,
        **_search_reasons(steps[-1]),
        "whole_model": round(whole.best.value, 6),
        "evaluation": planned.run_id(),
        "task": planned.task.name,
    }
    plan = plan_removal(layers, removed, why, planned.seen)
    plan = replace(
        plan,
        findings=(*describe_misread(rules, plan.keep), CHOSEN_HERE),
        evaluated=evaluated_lines(Warehouse(request.warehouse), run, removed),
    )
    return plan, [whole, *steps]


def _search_reasons(last: SearchStep) -> NewObject:
    """Return what the last round of a search says in the reason of its plan."""
    return {"sets": last.sets, "loss": round(last.best.value, 6)}


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
        requested = expand(base, layers)
        missing = [removed for removed in requested if removed not in results]
        chunks = [missing[start : start + SETS_PER_CELL] for start in range(0, len(missing), SETS_PER_CELL)]
        cells = []
        for part, measure in enumerate(planned.task.parts):
            assert isinstance(measure, LeaveOneOut)
            for chunk in chunks:
                added: list[int] = []
                for removed in chunk:
                    added += [layer for layer in removed if layer not in base]
                cells.append(planned.cell(part, replace(measure, layers=tuple(added)), Intervention(removed=base)))
        if cells:
            session.run(cells)
            results.update(measured())
        return {removed: results[removed] for removed in requested}

    with session.keeping_workers():
        yield planned, losses
    session.results(planned)


@dataclass(frozen=True, kw_only=True)
class RepairedSearch:
    """Greedy search among the layers of least damage, by the loss after a repair of each set.

    The repair is fitted to each set on the same number of rows of each repair text as the loss is measured on, or on
    more if the repair needs them. The best set with a repair may differ from the best one without.

    Attributes:
        session: measures the losses.
        ranking: values of the layers, by which the candidates are chosen.
        text: task of the loss.
        repair: name of the repair.
        fit: task of fitting the repair; None without a repair.
        read: texts that the search reads.
    """

    session: EvaluationSession
    ranking: LayerRanking
    text: PlannedTask
    repair: str
    fit: PlannedTask | None
    read: Sequence[SeenText]

    @classmethod
    def plan_tasks(
        cls,
        session: EvaluationSession,
        model: PlacedModel,
        ranking: LayerRanking,
        request: ShrinkRequest,
        rows: int,
        final_fit: PlannedTask | None,
        own_text: OwnTextWriter,
    ) -> RepairedSearch:
        """Return a search for a request, whose tasks are planned.

        Args:
            rows: number of rows of the text to measure the loss on.
            final_fit: the task of fitting the final repair; None for no repair.
            own_text: writes the text of the model itself, if the repair is fitted on it.

        Raises:
            CorpusError: a text cannot be read, or has too few rows.
        """
        model = model.reading(max_sequences=rows)
        repair = searched_repair(request.repair)
        text = plan_text_task(model, request.corpus, prefix=SEARCH, use=seen.SEARCH)
        read = [*text.seen]
        fit = None
        if final_fit is not None:
            final = fit_of(final_fit)
            fit = plan_fits(
                model,
                final.layers,
                [repair],
                final.repair.corpora,
                own_text=own_text,
                max_sequences=max(rows, _rows_to_fit(repair, model, final.texts)),
                skip_sequences=final.repair.settings.skip_sequences,
            )[repair]
            read += [seen.seen_text(fitted, fit.settings, seen.SEARCH) for fitted in fit_of(fit).texts]
        return cls(session=session, ranking=ranking, text=text, repair=repair, fit=fit, read=read)

    def plan(self, choice: Choice) -> Plan:
        """Search the layers of a choice, and return their plan."""
        num_layers = self.ranking.layers.number
        number = choice.number(num_layers)
        num_candidates = min(POOL * number, len(choice.unprotected(num_layers)), num_layers - 1)
        pool = self.ranking.plan(
            replace(choice, by=self.ranking.criterion.by, share=None, count=num_candidates, keep_pattern=False)
        )
        candidates: Sequence[int] = pool.dropped_layers
        pattern = self.ranking.pattern(choice)
        if pattern is not None and not pattern.can_complete((), number, candidates):
            candidates = choice.unprotected(num_layers)
        removed, steps = greedy_search(candidates, number, self.losses, pattern=pattern)
        why = {
            **reasons(choice),
            "among": describe_layers(candidates),
            "repair": self.repair,
            **_search_reasons(steps[-1]),
            "text": self.text.task.name.removeprefix(SEARCH),
            "sequences": self.text.settings.max_sequences,
            "evaluation": self.text.run_id(),
            "task": self.text.task.name,
        }
        every_text = seen.distinct([*pool.seen, *self.read])
        plan = replace(pool, drop=removed, why=why, evaluated=(), seen=every_text)
        misread = describe_misread(self.ranking.rules, plan.keep)
        return replace(plan, findings=(*misread, CHOSEN_HERE))

    def losses(self, base: Layers, layers: Layers) -> dict[Layers, Result]:
        """Return the loss after a repair without a base set and each of some other layers; see `Losses`."""
        requested = expand(base, layers)
        patches: Patches = {}
        if self.fit is not None:
            patches = fit_repairs(self.session, [(self.fit, requested)])
        repaired = {}
        for removed in requested:
            repaired[removed] = repaired_removal(removed, self.fit, patches)
        measured = self.session.measure({self.text: repaired.values()})[self.text]
        results = {result.intervention: result for result in measured if result.metric == LOSS}
        return {removed: results[intervention.key] for removed, intervention in repaired.items()}


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
    rounding = 2  # The held-back rows of each text are rounded up.
    return ceil(with_held_back) + rounding
