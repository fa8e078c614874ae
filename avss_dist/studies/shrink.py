"""Shrinking of a model: score its layers, choose, repair, evaluate on held-out text, and write the checkpoint.

The first rows of each text are scored on, the next rows are evaluated on, and a repair is fitted on the remaining rows.
A distillation trains on the rows of the repair, and is watched on rows before them.
All measurements are stored in a warehouse, so that a command that was stopped continues when it is repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from avss_dist.analysis.verdict import WHOLE, primary_metric
from avss_dist.core.errors import CorpusError
from avss_dist.core.intervention import NO_INTERVENTION, EncodedPatch, Intervention, count_removed
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.corpus.sources import open_source
from avss_dist.distillation.curve import Preparing, ignore
from avss_dist.distillation.record import DistillRecord
from avss_dist.distillation.teacher_text import with_own_text
from avss_dist.evaluation.continuations import Continuation, Prompt, continue_prompts, held_out_prompts
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import earlier_texts, plan_task, plan_text, refuse_overlaps
from avss_dist.evaluation.repairs import (
    Patches,
    copies_of,
    fit_of,
    fit_repairs,
    plan_fits,
    read_repaired,
    repaired_removal,
    require_changeable,
)
from avss_dist.evaluation.session import EvaluationSession, results_under
from avss_dist.models.checkpoint.layer_kinds import rules_of
from avss_dist.models.checkpoint.loading import require_head, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.planning.layers import LayerRanking
from avss_dist.planning.patterns import pattern_of
from avss_dist.plans.choice import Choice, PlanError, require_size
from avss_dist.plans.criteria import PUBLISHED, Criterion
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune, require_copyable, require_free, require_prunable
from avss_dist.pruning.repair.registry import NO_REPAIR, RepairRecord
from avss_dist.pruning.repair.repair import count_fitted, split_texts, tokens_needed
from avss_dist.requests import AblateRequest, ShrinkRequest
from avss_dist.runs.scoring import score
from avss_dist.stats.catalog import GREEDY, LOWEST_SHARE, SCORES
from avss_dist.stats.rankings import count_lowest
from avss_dist.studies.ablate import ablate
from avss_dist.studies.distill import distill_student, publish_distilled, require_distillable
from avss_dist.studies.search import RepairedSearch
from avss_dist.tasks.task import Result, Retention
from avss_dist.warehouse.names import PERPLEXITY, describe_task
from avss_dist.warehouse.reader import Warehouse

ROWS = 256  # rows of each text by default
HELD_OUT = 8  # one of this many rows is scored on, and one is evaluated on
WATCHED_PART = 8  # one of this many rows is watched in a distillation
WATCHED = 16  # maximum rows to watch a distillation on
SCORED = 16  # maximum rows to score on: more hardly improve the ranks, and the damage takes 8 passes over them


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

    @cached_property
    def retentions(self) -> dict[str, Retention]:
        """Retention of each smaller model against the whole model."""
        whole = self.results["whole"]
        return {name: Retention.of(whole, result) for name, result in self.results.items() if name != "whole"}

    @property
    def final(self) -> Retention:
        """Retention of the distilled model, else of the repaired model, else of the pruned model."""
        return [*self.retentions.values()][-1]

    def describe(self) -> str:
        """Return one line for people, with the perplexity of a loss."""
        names = {"pruned": "without these layers", "whole": "of the whole model"}
        metrics = {name: result.metrics()[-1] for name, result in self.results.items()}
        values = [f"{value:z,.4g} {names.get(name, name)}" for name, (_, value, _) in metrics.items()]
        task = describe_task(self.task, self.skipped, len(self.results["whole"].samples))
        return f"{task}: {metrics['whole'][0]} {', '.join(reversed(values))}."

    def describe_kept(self) -> str:
        """Return one line for people on the retention of the smaller models, with the interval of the last one."""
        final = self.final
        shares = ", ".join(f"{retention.value:z.1%} {name}" for name, retention in self.retentions.items())
        interval = f" (95% interval {final.low:z.1%} to {final.high:z.1%})" if final.has_interval else ""
        return f"Kept of the whole model on {self.task}: {shares}{interval}."

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

    _bars = ("kept",)

    def table(self) -> pa.Table:
        """Return a table with a row for each evaluated plan: dropped layers and retention.

        With distillation, a column ``distilled`` has the retention of the distilled model in the row of its plan.
        """
        rows: list[dict[str, Any]] = [{"drop": [*result.plan.drop], "kept": result.kept} for result in self.curve]
        if self.distillation:
            for row in rows:
                row["distilled"] = self.best.kept if row["drop"] == [*self.best.plan.drop] else None
        return pa.Table.from_pylist(rows)

    def summary(self) -> str:
        """Return the folder, the number of layers and the retention, in a line."""
        plan = self.best.plan
        distilled = f", distilled on {self.distillation.after.tokens:,} tokens" if self.distillation else ""
        return f"{self.folder}, {len(plan.keep)} of {plan.num_layers} layers, {self.best.kept:z.1%} kept{distilled}"


@dataclass(frozen=True)
class TextSplit:
    """Split of the rows of each text: rows to score, to evaluate, to watch distillation and to repair on, in order.

    Attributes:
        scored, evaluated: number of rows of the first two parts.
        rows: maximum number of rows of all parts.
        watched: number of rows on which the best checkpoint of a distillation is chosen; 0 without distillation.
    """

    scored: int
    evaluated: int
    rows: int
    watched: int = 0

    @property
    def measured(self) -> int:
        """Number of rows to score on and to evaluate on."""
        return self.scored + self.evaluated

    @property
    def held_out(self) -> int:
        """Number of rows before those to repair on."""
        return self.measured + self.watched


def shrink(request: ShrinkRequest) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and compare it with the model.

    ``max_sequences`` limits each text, over all of its parts. Steps that the warehouse has are not repeated. The folder
    of the checkpoint appears when it is complete.

    Raises:
        AvssError: a mistake, or work that failed. Measured cells remain in the warehouse.
    """
    on_event = request.on_event or ignore
    settings, output = request.settings, Path(request.output)
    distills = request.distill_tokens is not None
    require_free(output)
    if request.repair != NO_REPAIR:
        require_changeable(request.execution.partition)
    checkpoint = resolve(str(request.model), trust_remote_code=settings.trust_remote_code)
    require_head(checkpoint.name, text_config(checkpoint))
    require_copyable(checkpoint)
    if request.keep_pattern:
        _require_pattern(checkpoint, request)
    if distills:
        require_distillable(request, checkpoint)
    request = replace(
        request,
        repair_corpora=with_own_text(request.repair_corpora, checkpoint, settings, on_event),
        warehouse=request.warehouse or f"{request.output}-warehouse",
    )
    split = split_rows(checkpoint, request.texts, settings, distilled=distills)
    if request.repair != NO_REPAIR:
        _require_tokens(checkpoint, request, split)
    with EvaluationSession.open(str(request.warehouse), request.settings, request.execution, on_event) as session:
        session.executor.connect()  # because scores are measured by executors of their own
        ranking = _rank_layers(request, session, split)
        example = ranking.plan(replace(_choice(request, ranking.criterion, count=1), keep_pattern=False))
        require_prunable(checkpoint, example, settings)
        model = session.place(checkpoint, settings)
        trial = ShrinkTrial.plan_tasks(session, model, request, split, ranking, example)
        if request.keep is None:
            best = trial.evaluate(trial.choose(share=request.share or LOWEST_SHARE))
            curve = [best]
        else:
            best, curve = _bisect(trial, trial.counts(example.num_layers), request.keep)
        prompts = held_out_prompts(model, request.texts, skip_sequences=split.scored)
        pruned, without = best.plan.intervention, f"{count_removed(best.plan.drop)} dropped"
        variants = {WHOLE: NO_INTERVENTION, without: pruned}
        if best.patch:
            variants[f"{without}, repaired by {request.repair}"] = replace(pruned, patch=best.patch)
        continuations, unread = continue_prompts(session, model, prompts, variants)
    plan = replace(best.plan, evaluated=tuple(task.describe_all() for task in best.tasks))
    on_event(Preparing("writing"))
    student = output.with_name(f"{output.name}.part") / "student"  # stays after an error, to resume from
    if distills:
        shutil.rmtree(student, ignore_errors=True)  # of an earlier attempt, and perhaps of another plan
    written = prune(
        str(request.model),
        plan,
        student if distills else output,
        repair=read_repaired(best.patch) if best.patch else None,
        trust_remote_code=settings.trust_remote_code,
    )
    done = Shrunk(
        folder=written["folder"],
        bytes=written["bytes"],
        best=replace(best, plan=plan),
        curve=curve,
        record=written["repair"],
        difference=written["difference"],
        notes=[*written["notes"], *unread],
        continuations=continuations,
    )
    return _distill(request, split, student, done, prompts if continuations else [], on_event) if distills else done


def _distill(
    request: ShrinkRequest,
    split: TextSplit,
    student: Path,
    pruned: Shrunk,
    prompts: Sequence[Prompt],
    on_event: OnEvent,
) -> Shrunk:
    """Distill a pruned and repaired checkpoint, evaluate the result, and move it to the output.

    Args:
        student: folder of the checkpoint.
        prompts: prompts that the distilled model continues.
    """
    output, best = Path(request.output), pruned.best
    folder, record = distill_student(
        request, student, skip=split.measured, held_out=split.watched, rows=split.rows, on_event=on_event
    )
    checkpoint = resolve(str(folder), trust_remote_code=request.settings.trust_remote_code)
    with EvaluationSession.open(str(request.warehouse), request.settings, request.execution, on_event) as session:
        model = session.place(replace(checkpoint, name=str(output)), request.settings)
        planned = held_out_tasks(model, request, split).values()
        results = session.measure(dict.fromkeys(planned, (NO_INTERVENTION,)))
        label = f"{count_removed(best.plan.drop)} dropped, distilled on {record.after.tokens:,} tokens"
        continuations, unread = continue_prompts(session, model, prompts, {label: NO_INTERVENTION})
    tasks = [
        replace(before, results={**before.results, **_primary(results[task], {"distilled": NO_INTERVENTION})})
        for before, task in zip(best.tasks, planned, strict=True)
    ]
    publish_distilled(student, folder, output, record, [f"Evaluated: {task.describe_all()}" for task in tasks])
    return replace(
        pruned,
        folder=str(output),
        bytes=sum(file.stat().st_size for file in weight_files(output)),
        best=replace(best, tasks=tasks),
        notes=[*pruned.notes, *unread],
        distillation=record,
        continuations=[*pruned.continuations, *continuations],
    )


def split_rows(
    checkpoint: Checkpoint, texts: Sequence[str], settings: Settings, *, distilled: bool = False
) -> TextSplit:
    """Return the split of texts. The shortest text determines how many rows are held out.

    Args:
        distilled: hold out rows to watch a distillation on.

    Raises:
        CorpusError: a text cannot be read, is paired, or has too few rows.
    """
    rows = settings.max_sequences or ROWS
    plans = {text: plan_text(checkpoint, text, replace(settings, max_sequences=rows)) for text in texts}
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
    part, watched = available // HELD_OUT, min(available // WATCHED_PART, WATCHED) if distilled else 0
    return TextSplit(min(part, SCORED), part, rows, watched)


def _require_pattern(checkpoint: Checkpoint, request: ShrinkRequest) -> None:
    """Refuse a number of layers without which no set of the others keeps the pattern, before anything is measured.

    Raises:
        PlanError: see `require_size`; or no number of layers can be dropped.
    """
    rules = rules_of(text_config(checkpoint))
    if not rules:
        return
    num_layers = len(rules[0].whole)
    candidates = range(request.first, num_layers - request.last)
    number = 1 if request.keep else count_lowest(num_layers, request.share or LOWEST_SHARE)
    pattern = pattern_of(rules, num_layers)
    if not (request.keep and pattern.sizes(candidates)):
        require_size(pattern, number, candidates)


def _require_tokens(checkpoint: Checkpoint, request: ShrinkRequest, split: TextSplit) -> None:
    """Refuse texts whose rows for the repair hold too few tokens to fit it to.

    Raises:
        CorpusError: there are too few tokens.
    """
    needed = tokens_needed(checkpoint, request.repair, request.settings)
    read = replace(request.settings, max_sequences=split.rows - split.held_out, skip_sequences=split.held_out)
    texts = [plan_text(checkpoint, text, read) for text in request.repair_texts]
    tokens = sum(count_fitted(split_texts(texts, request.settings.batch_size), len(texts)))
    if tokens < needed:
        raise CorpusError(
            f"The repair {request.repair} of this model needs at least {needed:,} tokens to fit to, not {tokens:,}.",
            "Raise `max_sequences`, give longer texts, or choose a `repair` of fewer unknowns (channel).",
        )


def _rank_layers(request: ShrinkRequest, session: EvaluationSession, split: TextSplit) -> LayerRanking:
    """Measure the score by which layers are chosen, or from which a search begins, and return its values."""
    options = {
        **request.options,
        "max_sequences": split.scored,
        "corpus": request.corpus,
        "warehouse": session.store.root.full,
        "on_event": session.on_event,
    }
    run = score(str(request.model), sites=("block",), **options)
    if SCORES[request.ranked_by].task:
        ablate(AblateRequest(str(request.model), **options | dict(SCORES[request.ranked_by].ablate)))
    opened = Warehouse(session.store.root.full)
    row = opened.run(run.run_id)
    assert row is not None
    criterion = Criterion(request.ranked_by, reading=PUBLISHED if request.ranked_by == "avss" else None)
    return LayerRanking.of_run(opened, row, criterion)


def _choice(request: ShrinkRequest, criterion: Criterion, **size: Any) -> Choice:
    """Return a choice of layers by a criterion, with the protected layers of a request.

    Args:
        size: ``share`` or ``count``.
    """
    return Choice(
        by=criterion.by,
        reading=criterion.reading,
        first=request.first,
        last=request.last,
        keep_pattern=request.keep_pattern,
        **size,
    )


@dataclass(frozen=True, kw_only=True)
class ShrinkTrial:
    """Choice, repair and evaluation of plans of one model, on held-out text.

    Attributes:
        ranking: values by which layers are chosen, or from which a search begins.
        tasks: tasks by name.
        fit: task of fitting a repair; None for no repair.
        search: search of the layers; None if the values decide alone.
    """

    session: EvaluationSession
    request: ShrinkRequest
    ranking: LayerRanking
    tasks: Mapping[str, PlannedTask]
    fit: PlannedTask | None
    search: RepairedSearch | None

    @classmethod
    def plan_tasks(
        cls,
        session: EvaluationSession,
        model: PlacedModel,
        request: ShrinkRequest,
        split: TextSplit,
        ranking: LayerRanking,
        example: Plan,
    ) -> ShrinkTrial:
        """Return the trial of a request, for plans like the example. Overlapping texts are refused."""
        tasks = held_out_tasks(model, request, split)
        fit = None
        if request.repair != NO_REPAIR:
            fit = _plan_fit(session, model, request, split, example)
        if not request.allow_overlap:
            _refuse_overlaps(model, request, split, tasks, fit, example)
        search = None
        if request.by == GREEDY:
            search = RepairedSearch.plan_tasks(session, model, ranking, request, split.scored, fit)
        return cls(session=session, request=request, ranking=ranking, tasks=tasks, fit=fit, search=search)

    def choose(self, **size: Any) -> Plan:
        """Return the plan that drops a ``share`` or a ``count`` of the layers."""
        if self.search is not None:
            return self.search.plan(_choice(self.request, Criterion(GREEDY), **size))
        return self.ranking.plan(_choice(self.request, self.ranking.criterion, **size))

    def counts(self, num_layers: int) -> list[int]:
        """Return the numbers of layers that can be dropped, ascending."""
        choice = _choice(self.request, self.ranking.criterion)
        candidates = choice.unprotected(num_layers)
        pattern = self.ranking.pattern(choice)
        if pattern is not None:
            return pattern.sizes(candidates)
        return list(range(1, min(num_layers - 1, len(candidates)) + 1))

    def evaluate(self, plan: Plan) -> CandidateResult:
        """Return the result of a plan: fit its repair, and measure it beside the whole model.

        Stored cells are reused.

        Raises:
            AvssError: a mistake, or a fit or an evaluation that failed. Measured cells remain in the warehouse.
        """
        patches: Patches = {}
        if self.fit is not None:
            patches = fit_repairs(self.session, [(self.fit, [plan.drop])])
        repaired = repaired_removal(plan.drop, self.fit, patches)
        variants = {"whole": NO_INTERVENTION, "pruned": plan.intervention}
        if repaired.patch is not None:
            variants["repaired"] = repaired
        results = self.session.measure({task: variants.values() for task in self.tasks.values()})
        retained = []
        for name, task in self.tasks.items():
            primary = _primary(results[task], variants)
            retained.append(TaskRetention(task=name, results=primary, skipped=task.settings.skip_sequences))
        return CandidateResult(plan=plan, patch=repaired.patch, tasks=retained)


def _primary(results: Sequence[Result], variants: Mapping[str, Intervention]) -> dict[str, Result]:
    """Return the results of a task in its primary metric, by the name of the intervention."""
    metric = primary_metric([{"metric": result.metric} for result in results if result.layer is None])
    return {
        name: result
        for name, intervention in variants.items()
        for result in results_under(results, intervention.key)
        if result.metric == metric
    }


def held_out_tasks(model: PlacedModel, request: ShrinkRequest, split: TextSplit) -> dict[str, PlannedTask]:
    """Return the tasks by name, each once: by default, the perplexity on every text.

    A task on one of the texts that are divided, under whatever name, skips the rows of the scores. No row of another
    text is skipped.
    """
    names = list(
        dict.fromkeys(map(RedactedURI, request.tasks or [f"{PERPLEXITY}{text.full}" for text in request.texts]))
    )
    divided = {open_source(text).fingerprint() for text in request.texts}
    tasks = {}
    for name in names:
        skipped = 0
        if name.startswith(PERPLEXITY) and open_source(name.full.removeprefix(PERPLEXITY)).fingerprint() in divided:
            skipped = split.scored
        evaluated = model.reading(max_sequences=split.evaluated, skip_sequences=skipped)
        tasks[str(name)] = plan_task(evaluated, name, limit=request.limit)
    return tasks


def _plan_fit(
    session: EvaluationSession, model: PlacedModel, request: ShrinkRequest, split: TextSplit, example: Plan
) -> PlannedTask:
    """Return the task of fitting the repair of a request, for plans like the example."""
    fits = plan_fits(
        model,
        example.layers,
        [request.repair],
        request.weighted_repair_texts,
        copies_of(model.placement, model.settings, session),
        max_sequences=split.rows - split.held_out,
        skip_sequences=split.held_out,
    )
    return fits[request.repair]


def _refuse_overlaps(
    model: PlacedModel,
    request: ShrinkRequest,
    split: TextSplit,
    tasks: Mapping[str, PlannedTask],
    fit: PlannedTask | None,
    example: Plan,
) -> None:
    """Refuse tasks on text that the layers are chosen on, or that the smaller model is fitted or distilled on.

    Raises:
        ConfigError: see `refuse_overlap`.
    """
    texts: Sequence[CorpusPlan] = ()
    if request.distill_tokens is not None:
        skipped = split.measured
        use = "the smaller model is distilled on"
        reading = model.reading(max_sequences=split.rows - skipped, skip_sequences=skipped).settings
        texts = [plan_text(model.checkpoint, text, reading) for text in request.repair_texts]
    else:
        skipped = split.held_out
        use = "the repair is fitted on"
        if fit is not None:
            texts = fit_of(fit).texts
    chosen_on = earlier_texts(example.seen, model.checkpoint, [request.corpus], skip_option=None)
    refuse_overlaps(
        [planned.task for planned in tasks.values()],
        texts,
        model,
        chosen_on,
        skipped=skipped,
        use=use,
        skip_option=None,
    )


def _bisect(trial: ShrinkTrial, counts: Sequence[int], keep: float) -> tuple[CandidateResult, list[CandidateResult]]:
    """Find the plan that drops the most layers and retains at least ``keep``, by bisection.

    Args:
        counts: numbers of layers that can be dropped, ascending.

    Returns:
        The result of the plan, and all results by the number of dropped layers.

    Raises:
        PlanError: the plan that drops the fewest layers retains less.
    """
    results: dict[int, CandidateResult] = {}
    enough = -1  # place, among the numbers, of the largest one that is known to retain enough
    too_many = len(counts)
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        result = trial.evaluate(trial.choose(count=counts[middle]))
        results[middle] = result
        if result.kept >= keep:
            enough = middle
        else:
            too_many = middle
    curve = [results[place] for place in sorted(results)]
    if enough < 0:
        fewest = curve[0]
        if len(fewest.plan.drop) == 1:
            without = f"Without layer {fewest.plan.drop[0]}, the first to go,"
        else:
            without = f"Without the {count_removed(fewest.plan.drop)} that can go first,"
        raise PlanError(
            f"{without} {fewest.kept:z.1%} is kept, under {keep:.1%}.",
            "Ask for less with `keep`, choose by another score, or repair on more text.",
        )
    return results[enough], curve
