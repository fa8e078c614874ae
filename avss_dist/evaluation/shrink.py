"""Shrinking of a model: score its layers, choose, repair, evaluate on held-out text, and write the checkpoint.

The first rows of each text are scored on, the next rows are evaluated on, and a repair is fitted on the remaining rows.
All measurements are stored in a warehouse, so that a command that was stopped continues when it is repeated.
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
from avss_dist.evaluation.events import OnEvent, WeightsWritten, ignore
from avss_dist.evaluation.repairs import copies_of, fit_of, fit_repairs, plan_fits, read_repaired, require_changeable
from avss_dist.evaluation.search import plan_repaired_search, searched_plan
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlacedModel,
    PlannedTask,
    Retention,
    StoredPatch,
    metrics,
)
from avss_dist.evaluation.tasks import (
    SeenText,
    as_task,
    make_task,
    plan_text,
    refuse_overlap,
    text_of_fit,
    texts_of_repair,
    texts_of_run,
)
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
from avss_dist.requests import GREEDY, AblateRequest, ShrinkRequest
from avss_dist.runs.api import score
from avss_dist.tasks.base import Result, Task
from avss_dist.warehouse.reader import Warehouse

ROWS = 256  # rows of each text by default
HELD_OUT = 8  # one of this many rows is scored on, and one is evaluated on
SCORED = 16  # maximum rows to score on: more hardly improve the ranks, and the damage takes 8 passes over them


@dataclass(frozen=True, kw_only=True)
class TaskRetention:
    """Primary metric of a task for the whole, the pruned and the repaired model.

    Attributes:
        repaired: result of the repaired model; None without a repair.
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
        metric, whole = readable_metric(self.whole)
        _, pruned = readable_metric(self.pruned)
        repaired = f"{readable_metric(self.repaired)[1]} repaired, " if self.repaired else ""
        return f"{self.task}: {metric} {repaired}{pruned} without these layers, {whole} of the whole model."


def readable_metric(result: Result) -> tuple[str, str]:
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
        """Lowest retention over the tasks."""
        return min(task.of(task.final).value for task in self.tasks)


@dataclass(frozen=True, kw_only=True, repr=False)
class Shrunk(TabularResult):
    """A shrunk model.

    Attributes:
        folder, bytes: folder of the checkpoint, and size of its weights.
        best: the plan of the checkpoint.
        curve: every plan that was evaluated, by the number of layers that it drops.
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
        """Return a table with a row for each evaluated plan: dropped layers and retention."""
        return pa.Table.from_pylist([{"drop": [*result.plan.drop], "kept": result.kept} for result in self.curve])

    def summary(self) -> str:
        """Return the folder, the number of layers and the retention, in a line."""
        plan = self.best.plan
        return f"{self.folder}, {len(plan.keep)} of {plan.num_layers} layers, {self.best.kept:z.1%} kept"


@dataclass(frozen=True)
class TextSplit:
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


def shrink(request: ShrinkRequest, on_event: OnEvent | None = None) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and compare it with the model.

    ``max_sequences`` limits each text, over all of its parts. Steps that the warehouse has are not repeated. The folder
    of the checkpoint appears when it is complete.

    Raises:
        AvssError: a mistake, or work that failed. Measured cells remain in the warehouse.
    """
    on_event = ignore if on_event is None else on_event
    settings, model, output = request.settings, str(request.model), Path(request.output)
    require_free(output)
    if request.repair != NO_REPAIR:
        require_changeable(request.execution.partition)
    checkpoint = resolve(model, trust_remote_code=settings.trust_remote_code)
    require_head(checkpoint.name, text_config(checkpoint, trust_remote_code=settings.trust_remote_code))
    require_copyable(checkpoint)
    needed = 0 if request.repair == NO_REPAIR else tokens_needed(checkpoint, request.repair, settings)
    split = split_rows(checkpoint, request.texts, settings)
    _require_tokens(checkpoint, request, split, needed)
    warehouse = request.warehouse or f"{request.output}-warehouse"
    with EvaluationSession.open(warehouse, settings, request.execution, on_event) as session:
        session.executor.connect()  # because scores are measured by executors of their own
        make_plan = _measure_scores(request, session, split)
        example = make_plan(count=1)
        require_prunable(checkpoint, example, settings)
        evaluator = _evaluator(session, checkpoint, request, split, example)
        if request.by == GREEDY:
            text, fit = plan_repaired_search(evaluator.model, request, split.scored, evaluator.fit)
            make_plan = partial(searched_plan, session, make_plan, request, text, fit)
        if request.keep is None:
            best = evaluator(make_plan(share=request.share or LOWEST_SHARE))
            curve = [best]
        else:
            maximum = min(example.num_layers - 1, example.num_layers - request.first - request.last)
            best, curve = _bisect(evaluator, make_plan, maximum, request.keep)
    plan = replace(best.plan, evaluated=tuple(task.describe() for task in best.tasks))
    written = prune(
        model,
        plan,
        output,
        repair=read_repaired(best.patch) if best.patch else None,
        trust_remote_code=settings.trust_remote_code,
        copied=lambda size: on_event(WeightsWritten(size)),
    )
    return Shrunk(
        folder=written["folder"],
        bytes=written["bytes"],
        best=replace(best, plan=plan),
        curve=curve,
        record=written["repair"],
        difference=written["difference"],
        notes=written["notes"],
    )


def split_rows(checkpoint: Checkpoint, texts: Sequence[str], settings: Settings) -> TextSplit:
    """Return the split of texts. The shortest text determines how many rows are held out.

    Raises:
        CorpusError: a text cannot be read, is paired, or has too few rows.
    """
    rows = settings.max_sequences or ROWS
    read = replace(settings, max_sequences=rows)
    plans = {text: plan_text(checkpoint, text, read) for text in texts}
    if paired := [text for text, plan in plans.items() if plan.shards[0].pairing]:
        raise CorpusError(
            f"{paired[0]} is paired text, whose rows belong together: it has no part to repair on.",
            "Name its answers as plain text, such as FILE.jsonl:FIELD.",
        )
    shortest = min(plans, key=lambda text: plans[text].num_sequences)
    available = plans[shortest].num_sequences
    if available < HELD_OUT:
        raise CorpusError(
            f"{shortest} has {available} rows; a part to score on, one to evaluate on and one to repair on take "
            f"{HELD_OUT} at least.",
            "Name a longer text, lower `sequence_length`, or raise `max_sequences`.",
        )
    part = available // HELD_OUT
    return TextSplit(min(part, SCORED), part, rows)


def _require_tokens(checkpoint: Checkpoint, request: ShrinkRequest, split: TextSplit, needed: int) -> None:
    """Refuse texts whose rows for the repair hold too few tokens to fit it to.

    Args:
        needed: minimum number of tokens to fit the repair to.

    Raises:
        CorpusError: there are fewer tokens. The hint says how many rows suffice, if the texts have them.
    """
    if not needed:
        return
    given, rows = _fitted_tokens(checkpoint, request, split)
    if given >= needed:
        return
    enough = next(
        number
        for number in itertools.count(split.rows + 1)
        if _fitted_rows(number) * len(request.repair_texts) * given >= needed * rows
    )
    larger = split_rows(checkpoint, request.texts, replace(request.settings, max_sequences=enough))
    suffices = _fitted_tokens(checkpoint, request, larger)[0] >= needed
    longer = f"Set `max_sequences` to {enough} or more" if suffices else "Give longer texts"
    raise CorpusError(
        f"The repair {request.repair} of this model needs {needed:,} tokens to fit to at least; {given:,} are given.",
        f"{longer}, or choose a `repair` of fewer unknowns (channel, scale).",
    )


def _fitted_tokens(checkpoint: Checkpoint, request: ShrinkRequest, split: TextSplit) -> tuple[int, int]:
    """Return the number of tokens and of rows that the repair is fitted to."""
    read = replace(request.settings, max_sequences=split.rows - split.held_out)
    texts = [plan_text(checkpoint, text, read, skip_sequences=split.held_out) for text in request.repair_texts]
    tokens = sum(count_fitted(split_texts(texts, request.settings.batch_size), len(texts)))
    return tokens, sum(text.num_sequences - ceil(text.num_sequences / HELD_BACK) for text in texts)


def _fitted_rows(rows: int) -> int:
    """Return the number of rows that the repair is fitted to, of a text with ``rows`` rows."""
    part = rows // HELD_OUT
    repaired = rows - min(part, SCORED) - part
    return repaired - ceil(repaired / HELD_BACK)


def _measure_scores(request: ShrinkRequest, session: EvaluationSession, split: TextSplit) -> Callable[..., Plan]:
    """Measure the criterion by which layers are chosen, and return a function that makes plans by it."""
    given: dict[str, Any] = {**request.given, "max_sequences": split.scored}
    given |= {"corpus": request.corpus, "warehouse": session.store.root.full}
    run = score(str(request.model), on_event=session.on_event, sites=("block",), **given)
    if SCORES[request.ranked_by].task:
        measured: dict[str, Any] = dict(SCORES[request.ranked_by].ablate)
        ablate(AblateRequest(str(request.model), **measured, **given), session.on_event)
    opened = Warehouse(session.store.root.full)
    row = opened.run(run.run_id)
    assert row is not None
    return partial(plan_layers, opened, row, by=request.ranked_by, first=request.first, last=request.last)


@dataclass(frozen=True, kw_only=True)
class _CandidateEvaluator:
    """Evaluates candidate plans of a model: fits the repair of each, and measures it beside the whole model.

    Attributes:
        tasks: tasks by name.
        fit: task of fitting a repair; None for no repair.
    """

    session: EvaluationSession
    model: PlacedModel
    tasks: Mapping[str, PlannedTask]
    fit: PlannedTask | None

    def __call__(self, plan: Plan) -> CandidateResult:
        """Return the result of a plan. Stored fits and cells are reused.

        Raises:
            AvssError: a mistake, or a fit or an evaluation that failed. Measured cells remain in the warehouse.
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


def _evaluator(
    session: EvaluationSession, checkpoint: Checkpoint, request: ShrinkRequest, split: TextSplit, example: Plan
) -> _CandidateEvaluator:
    """Return an evaluator of plans like the example. Texts of different uses that overlap are refused."""
    model = session.place(checkpoint, request.settings)
    names = request.tasks or [f"{PERPLEXITY}{text.full}" for text in request.texts]
    tasks = {str(name): _plan_task(model, name, request, split) for name in map(RedactedURI, names)}
    fit = None
    if request.repair != NO_REPAIR:
        skipped, corpora = split.held_out, request.repair_corpora or (request.corpus,)
        read = replace(model.settings, max_sequences=split.rows - skipped)
        repair = Repair(by=request.repair, corpora=corpora, skip_sequences=skipped, settings=read)
        copies = copies_of(model.placement, model.settings, session.executor)
        fit = plan_fits(model, example.layers, [repair], copies)[request.repair]
    if not request.allow_overlap:
        scored = texts_of_run(Warehouse(session.store.root.full), example.run_id, checkpoint, corpus=request.corpus)
        _refuse_overlaps(checkpoint, [planned.task for planned in tasks.values()], fit, [*scored], split)
    return _CandidateEvaluator(session=session, model=model, tasks=tasks, fit=fit)


def _plan_task(model: PlacedModel, name: str, request: ShrinkRequest, split: TextSplit) -> PlannedTask:
    model = model.reading(split.evaluated)
    task = make_task(
        model.checkpoint,
        name,
        model.settings,
        skip_sequences=split.scored,
        limit=request.limit,
        prompting=PromptOptions(num_fewshot=request.num_fewshot),
    )
    return model.plan(task)


def _refuse_overlaps(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    fit: PlannedTask | None,
    scored: Sequence[SeenText],
    split: TextSplit,
) -> None:
    """Refuse tasks on text that was scored on or is repaired on, and repairs on text that was scored on."""
    texts = fit_of(fit).texts if fit else ()
    fitted = (text_of_fit(text, split.held_out, checkpoint, trust_remote_code=False) for text in texts)
    refuse_overlap(tasks, chain(texts_of_repair(checkpoint), scored, fitted))
    refuse_overlap(map(as_task, texts), scored)


def _bisect(
    evaluate: Callable[[Plan], CandidateResult], make_plan: Callable[..., Plan], maximum: int, keep: float
) -> tuple[CandidateResult, list[CandidateResult]]:
    """Find the plan that drops the most layers and retains at least ``keep``, by bisection.

    Args:
        maximum: maximum number of layers to drop.

    Returns:
        The result of the plan, and all results by the number of dropped layers.

    Raises:
        PlanError: the plan that drops one layer retains less.
    """
    results: dict[int, CandidateResult] = {}
    low, high = 0, maximum + 1
    while high - low > 1:
        count = (low + high) // 2
        results[count] = evaluate(make_plan(count=count))
        low, high = (count, high) if results[count].kept >= keep else (low, count)
    curve = [results[count] for count in sorted(results)]
    if not low:
        raise PlanError(
            f"Without layer {curve[0].plan.drop[0]}, the first to go, {curve[0].kept:z.1%} is kept, under {keep:.1%}.",
            "Ask for less with `keep`, choose by another score, or repair on more text.",
        )
    return results[low], curve
