"""Shrink a model: score its layers, choose, repair, evaluate on text that nothing else has seen, write the checkpoint.

Of each text, the first rows are scored on, the next are evaluated on, and a repair is fitted on the rest. All that is
measured is kept in a warehouse, so the same command goes on where it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa

from avss_dist.analysis.plans import plan_layers
from avss_dist.analysis.verdict import primary_metric
from avss_dist.core.errors import CorpusError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.names import PERPLEXITY
from avss_dist.core.registry import LOWEST_SHARE, SCORES
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.evaluation.ablate import ablate
from avss_dist.evaluation.events import OnEvent, ScoringAdvanced, ScoringStarted, WeightsWritten, ignore
from avss_dist.evaluation.held_out import as_task, refuse_overlap, text_of_fit, texts_of_repair, texts_of_run
from avss_dist.evaluation.repairs import copies_of, fit_of, fit_repairs, plan_fits, read_repaired, require_changeable
from avss_dist.evaluation.search import plan_repaired_search, searched_plan
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlacedModel,
    PlannedTask,
    Retention,
    StoredPatch,
    evaluation_options,
    metrics,
)
from avss_dist.evaluation.tasks import make_task, plan_text
from avss_dist.models.auto import require_head
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import text_config
from avss_dist.options import PromptOptions
from avss_dist.pruning.checkpoint import prune, require_copyable, require_free, require_prunable
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.record import RepairRecord
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.repair.repair import Repair
from avss_dist.pruning.repair.requirements import tokens_needed
from avss_dist.pruning.repair.splits import HELD_BACK, count_fitted, split_texts
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.shrinking import GREEDY, Shrinking
from avss_dist.runs.api import score
from avss_dist.runs.reporter import Reporter
from avss_dist.tasks.base import Result, Task
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

ROWS = 256  # of each text, where nothing is said
HELD_OUT = 8  # one row of so many is scored on, and one is evaluated on
SCORED = 16  # rows that are scored on, at most: more rank layers hardly better, and the damage takes 8 passes over them


class _Scoring(Reporter):
    """Reporter that turns the progress of scoring into events."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Send the event of the start of scoring."""
        self._on_event(ScoringStarted(num_tokens, done_tokens))

    def advanced(self, name: str, num_tokens: int) -> None:
        """Send the event of a measured shard."""
        self._on_event(ScoringAdvanced(num_tokens))


@dataclass(frozen=True, kw_only=True)
class TaskRetention:
    """Results of a task for the whole, the pruned and the repaired model.

    Attributes:
        whole, pruned, repaired: primary metric of the task; ``repaired`` is None without a repair.
    """

    task: str
    whole: Result
    pruned: Result
    repaired: Result | None

    @property
    def final(self) -> Result:
        """Result of the repaired model, or of the pruned model if nothing was repaired."""
        return self.repaired or self.pruned

    def of(self, result: Result) -> Retention:
        """Return the retention of a result against that of the whole model."""
        return Retention.of(self.whole, result)

    def describe(self) -> str:
        """Return one line for people; a loss is shown as its perplexity."""
        metric, whole = shown(self.whole)
        repaired = f"{shown(self.final)[1]} repaired, " if self.repaired else ""
        return (
            f"{self.task}: {metric} {repaired}{shown(self.pruned)[1]} without these layers, {whole} of the whole model."
        )


def shown(result: Result) -> tuple[str, str]:
    """Return name and value of a metric for people; a loss is shown as its perplexity."""
    *_, (name, value, _) = metrics(result)
    return name, f"{value:z,.4g}"


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """A plan, and the results of the model under it.

    Attributes:
        patch: weights that repair the model; None without a repair.
        tasks: results by task, in order.
    """

    plan: Plan
    patch: StoredPatch | None = field(repr=False)
    tasks: Sequence[TaskRetention]

    @cached_property
    def kept(self) -> float:
        """Retention of the task that keeps the least."""
        return min(task.of(task.final).value for task in self.tasks)


@dataclass(frozen=True, kw_only=True, repr=False)
class Shrunk(TabularResult):
    """A shrunk model.

    Attributes:
        folder, bytes: folder of the checkpoint, and size of its weights.
        best: the plan that was carried out.
        curve: every plan that was tried, by the number of layers that it drops.
        record: record of the repair; None without a repair.
        difference: see `pruning.checkpoint.prune`.
        notes: remarks on the checkpoint.
    """

    folder: str
    bytes: int
    best: CandidateResult
    curve: Sequence[CandidateResult]
    record: RepairRecord | None
    difference: float | None
    notes: Sequence[str]

    _bars = ("kept",)

    def table(self) -> pa.Table:
        """Return a table with a row for each plan that was tried: dropped layers and retention."""
        return pa.Table.from_pylist([{"drop": [*one.plan.drop], "kept": one.kept} for one in self.curve])

    def summary(self) -> str:
        """Return the folder, the number of layers and the retention, in a line."""
        plan = self.best.plan
        return f"{self.folder}, {len(plan.keep)} of {plan.num_layers} layers, {self.best.kept:z.1%} kept"


@dataclass(frozen=True)
class Parts:
    """Split of the rows of each text: rows to score on, then rows to evaluate on, then rows to repair on.

    Attributes:
        scored, evaluated: number of rows of the first two parts.
        rows: maximum number of rows of all three parts.
    """

    scored: int
    evaluated: int
    rows: int

    @property
    def held_out(self) -> int:
        """Number of rows before those to repair on."""
        return self.scored + self.evaluated


def shrink(
    model: str | Path,
    *,
    corpus: str,
    output: str | Path,
    warehouse: str | Path | None = None,
    reporter: OnEvent | None = None,
    **options: Any,
) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and return its retention; finished work is not repeated.

    Args:
        model: hub id or folder.
        corpus: see `Shrinking`.
        output: folder of the checkpoint, which does not exist, or is empty; it appears when it is whole.
        warehouse: where all that is measured is kept; ``output`` with ``-warehouse`` after it by default.
        options: the fields of `Shrinking`, ``settings.Settings`` and ``settings.Execution``; ``max_sequences`` is for
            each text, over all of its parts.

    Raises:
        AvssError: a mistake, or something that failed; what was measured is kept.
    """
    given: dict[str, Any] = dict(options)
    request = Shrinking(corpus=corpus, **{n: given.pop(n) for n in options if n in Shrinking.__dataclass_fields__})
    settings, execution = evaluation_options(given)
    require_free(Path(output))
    if request.repair != NO_REPAIR:
        require_changeable(execution.partition)
    on_event = ignore if reporter is None else reporter
    checkpoint = resolve(str(model), trust_remote_code=settings.trust_remote_code)
    require_head(checkpoint.name, text_config(checkpoint, trust_remote_code=settings.trust_remote_code))
    require_copyable(checkpoint)
    needed = 0 if request.repair == NO_REPAIR else tokens_needed(checkpoint, request.repair, settings)
    parts = cut(checkpoint, request.texts, settings)
    require_tokens(checkpoint, request, parts, settings, needed)
    stored = warehouse or f"{output}-warehouse"
    with EvaluationSession.open(stored, settings, execution, on_event) as session:
        session.executor.connect()  # scores are measured by executors of their own
        make = partial(
            _scored_plan(str(model), request, session.store, parts, given, on_event),
            first=request.first,
            last=request.last,
        )
        example = make(count=1)
        require_prunable(checkpoint, example, settings)
        judge = _judge(session, checkpoint, request, parts, example, settings)
        if request.by == GREEDY:
            text, fit = plan_repaired_search(judge.model, request, parts.scored, judge.fit)
            make = partial(searched_plan, session, make, request, text, fit)
        if request.keep is None:
            best = judge(make(share=request.share or LOWEST_SHARE))
            curve = [best]
        else:
            most = min(example.num_layers - 1, example.num_layers - request.first - request.last)
            best, curve = _most(judge, make, most, request.keep)
    plan = replace(best.plan, evaluated=tuple(task.describe() for task in best.tasks))
    done = prune(
        str(model),
        plan,
        output,
        repair=read_repaired(best.patch) if best.patch else None,
        trust_remote_code=settings.trust_remote_code,
        copied=lambda size: on_event(WeightsWritten(size)),
    )
    return Shrunk(
        folder=done["folder"],
        bytes=done["bytes"],
        best=replace(best, plan=plan),
        curve=curve,
        record=done["repair"],
        difference=done["difference"],
        notes=done["notes"],
    )


def cut(checkpoint: Checkpoint, texts: Sequence[str], settings: Settings) -> Parts:
    """Return the split of texts; the shortest text determines how many rows are held out.

    Raises:
        CorpusError: a text cannot be read, is paired, or has too few rows.
    """
    rows = settings.max_sequences or ROWS
    read = replace(settings, max_sequences=rows)
    plans = {text: plan_text(checkpoint, text, read) for text in texts}
    if paired := [text for text, made in plans.items() if made.shards[0].pairing]:
        raise CorpusError(
            f"{paired[0]} is paired text, whose rows belong together: it has no part to repair on.",
            "Name its answers as plain text, such as FILE.jsonl:FIELD.",
        )
    found = {text: made.num_sequences for text, made in plans.items()}
    shortest = min(found, key=lambda text: found[text])
    if found[shortest] < HELD_OUT:
        raise CorpusError(
            f"{shortest} has {found[shortest]} rows; a part to score on, one to evaluate on and one to repair on take "
            f"{HELD_OUT} at least.",
            "Name a longer text, lower `sequence_length`, or raise `max_sequences`.",
        )
    part = found[shortest] // HELD_OUT
    return Parts(min(part, SCORED), part, rows)


def require_tokens(checkpoint: Checkpoint, request: Shrinking, parts: Parts, settings: Settings, needed: int) -> None:
    """Refuse texts whose rows for the repair hold too few tokens to fit it to.

    Args:
        needed: minimum number of tokens to fit the repair to.

    Raises:
        CorpusError: there are fewer tokens. The hint says how many rows suffice, if the texts have them.
    """
    if not needed:
        return
    given, rows = _fitted_tokens(checkpoint, request, parts, settings)
    if given >= needed:
        return
    enough = next(
        n
        for n in itertools.count(parts.rows + 1)
        if _fitted_rows(n) * len(request.repair_texts) * given >= needed * rows
    )
    more = cut(checkpoint, request.texts, replace(settings, max_sequences=enough))
    suffices = _fitted_tokens(checkpoint, request, more, settings)[0] >= needed
    longer = f"Set `max_sequences` to {enough} or more" if suffices else "Give longer texts"
    raise CorpusError(
        f"The repair {request.repair} of this model needs {needed:,} tokens to fit to at least; {given:,} are given.",
        f"{longer}, or choose a `repair` of fewer unknowns (channel, scale).",
    )


def _fitted_tokens(checkpoint: Checkpoint, request: Shrinking, parts: Parts, settings: Settings) -> tuple[int, int]:
    """Return the number of tokens and of rows that the repair is fitted to."""
    read = replace(settings, max_sequences=parts.rows - parts.held_out)
    texts = [plan_text(checkpoint, text, read, skip_sequences=parts.held_out) for text in request.repair_texts]
    tokens = sum(count_fitted(split_texts(texts, settings.batch_size), len(texts)))
    return tokens, sum(text.num_sequences - ceil(text.num_sequences / HELD_BACK) for text in texts)


def _fitted_rows(rows: int) -> int:
    """Return the number of rows that the repair is fitted to, of a text with ``rows`` rows."""
    part = rows // HELD_OUT
    repaired = rows - min(part, SCORED) - part
    return repaired - ceil(repaired / HELD_BACK)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Evaluates candidate plans of a model: fits the repair of each, and measures it beside the whole model.

    Attributes:
        tasks: tasks by name.
        fit: the task of fitting a repair; None for no repair.
    """

    session: EvaluationSession
    model: PlacedModel
    tasks: Mapping[str, PlannedTask]
    fit: PlannedTask | None

    def __call__(self, plan: Plan) -> CandidateResult:
        """Return the result of a plan; earlier work is reused.

        Raises:
            AvssError: a mistake, or a fit or an evaluation that failed; what was measured is kept.
        """
        patch = None
        if self.fit is not None:
            patches = fit_repairs(self.session, [(self.fit, [plan.dropped_layers])])
            patch = patches.get((self.fit.run_id(), plan.dropped_layers))
        variants = [NO_INTERVENTION, plan.intervention, replace(plan.intervention, patch=patch)]
        results = self.session.measure([(task, variants) for task in self.tasks.values()])
        tasks = [_retention(name, results[task], *variants) for name, task in self.tasks.items()]
        return CandidateResult(plan=plan, patch=patch, tasks=tasks)


def _retention(
    task: str, results: Sequence[Result], whole: Intervention, pruned: Intervention, repaired: Intervention
) -> TaskRetention:
    metric = primary_metric([{"metric": result.metric} for result in results if result.layer is None])
    by_key = {result.intervention: result for result in results if result.layer is None and result.metric == metric}
    return TaskRetention(
        task=task,
        whole=by_key[whole.key],
        pruned=by_key[pruned.key],
        repaired=by_key[repaired.key] if repaired.patch else None,
    )


def _scored_plan(
    model: str, request: Shrinking, store: Store, parts: Parts, options: dict[str, Any], on_event: OnEvent
) -> Callable[..., Plan]:
    """Measure the criterion by which layers are chosen; return a function that makes plans by it."""
    warehouse, options = store.root.full, options | {"max_sequences": parts.scored}
    run = score(
        model, corpus=request.corpus, warehouse=warehouse, reporter=_Scoring(on_event), sites=("block",), **options
    )
    if SCORES[request.ranked_by].task:
        how = {**SCORES[request.ranked_by].ablate, **options}
        ablate(model, corpus=request.corpus, warehouse=warehouse, reporter=on_event, **how)
    opened = Warehouse(warehouse)
    row = opened.run(run.run_id)
    assert row is not None
    return partial(plan_layers, opened, row, by=request.ranked_by)


def _judge(
    session: EvaluationSession,
    checkpoint: Checkpoint,
    request: Shrinking,
    parts: Parts,
    example: Plan,
    settings: Settings,
) -> _Judge:
    """Return an evaluator of plans like the example; refuse texts of different uses that overlap."""
    model = session.place(checkpoint, settings)
    names = request.tasks or [f"{PERPLEXITY}{text.full}" for text in request.texts]
    tasks = {str(name): _plan_task(model, name, request, parts) for name in map(RedactedURI, names)}
    fit = None
    if request.repair != NO_REPAIR:
        skip, corpora = parts.held_out, request.repair_corpora or (request.corpus,)
        read = replace(model.settings, max_sequences=parts.rows - skip)
        repair = Repair(by=request.repair, corpora=corpora, skip_sequences=skip, settings=read)
        copies = copies_of(model.placement, model.settings, session.executor)
        fit = plan_fits(model, example.layers, [repair], copies)[request.repair]
    if not request.allow_overlap:
        evaluated = [planned.task for planned in tasks.values()]
        _refuse_overlaps(checkpoint, request, evaluated, fit, str(example.run_id), session.store, parts)
    return _Judge(session=session, model=model, tasks=tasks, fit=fit)


def _plan_task(model: PlacedModel, name: str, request: Shrinking, parts: Parts) -> PlannedTask:
    model = model.reading(parts.evaluated)
    task = make_task(
        model.checkpoint,
        name,
        model.settings,
        skip_sequences=parts.scored,
        limit=request.limit,
        prompting=PromptOptions(num_fewshot=request.num_fewshot),
    )
    return model.plan(task)


def _refuse_overlaps(
    checkpoint: Checkpoint,
    request: Shrinking,
    tasks: Sequence[Task],
    fit: PlannedTask | None,
    run_id: str,
    store: Store,
    parts: Parts,
) -> None:
    """Refuse tasks on text that was scored on or is repaired on, and to repair on text that was scored on."""
    scored = list(texts_of_run(Warehouse(store.root.full), run_id, checkpoint, corpus=request.corpus))
    texts = fit_of(fit).texts if fit else ()
    fitted = (text_of_fit(text, parts.held_out, checkpoint, trust_remote_code=False) for text in texts)
    refuse_overlap(tasks, chain(texts_of_repair(checkpoint), scored, fitted))
    refuse_overlap(map(as_task, texts), scored)


def _most(
    judge: Callable[[Plan], CandidateResult], make: Callable[..., Plan], most: int, keep: float
) -> tuple[CandidateResult, list[CandidateResult]]:
    """Return the result of the plan that drops the most layers and keeps ``keep``, and all results by size (bisection).

    Args:
        most: maximum number of layers to drop.

    Raises:
        PlanError: the plan without a single layer keeps less.
    """
    tried: dict[int, CandidateResult] = {}
    low, high = 0, most + 1
    while high - low > 1:
        count = (low + high) // 2
        tried[count] = judge(make(count=count))
        low, high = (count, high) if tried[count].kept >= keep else (low, count)
    curve = [tried[count] for count in sorted(tried)]
    if not low:
        raise PlanError(
            f"Without layer {curve[0].plan.drop[0]}, the first to go, {curve[0].kept:z.1%} is kept, under {keep:.1%}.",
            "Ask for less with `keep`, choose by another score, or repair on more text.",
        )
    return tried[low], curve
