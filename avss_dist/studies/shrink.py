"""Shrinking of a model: score its layers, choose, repair, evaluate on held-out text, and write the checkpoint.

The first rows of each text are scored on, the next rows are evaluated on, and a repair is fitted on the remaining rows.
A distillation trains on the rows of the repair, and is watched on rows before them.
All measurements are stored in a warehouse, so that a command that was stopped continues when it is repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from avss_dist.analysis.verdict import WHOLE
from avss_dist.core.errors import AvssError, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, count_removed
from avss_dist.distillation.curve import Preparing, ignore
from avss_dist.evaluation.continuations import Continuation, Prompt, continue_prompts, held_out_prompts
from avss_dist.evaluation.events import OnEvent, Remark
from avss_dist.evaluation.own_text import OwnTextWriter
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.repairs import read_repaired, require_changeable
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.evaluation.speed import Speed
from avss_dist.evaluation.timing import SpeedSubject, measure_speed
from avss_dist.models.checkpoint.loading import require_head, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.pruning.checkpoint import prune, require_copyable, require_free, require_prunable
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.requests import ShrinkRequest
from avss_dist.stats.catalog import LOWEST_SHARE
from avss_dist.studies.distill import distill_student, publish_distilled, require_distillable
from avss_dist.studies.shrink_trial import (
    ShrinkTrial,
    TextSplit,
    held_out_tasks,
    on_text_alone,
    primary_results,
    protected_choice,
    rank_layers,
    read_repair_texts,
    require_pattern,
    require_tokens,
    rows_to_write,
    split_rows,
    with_writable_texts,
)
from avss_dist.studies.shrunk import CandidateResult, Shrunk


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The plan that a model is written by.

    Attributes:
        best: the plan, with its results.
        model: the whole model.
        curve: every plan that was evaluated.
        prompts: prompts that the models continue; none if they cannot generate text.
        continuations: their continuations by the whole, the pruned and the repaired model.
        notes: remarks on them, and why the speed was not measured.
        speed: speed of the model without the layers beside the whole one; None if it was not measured.
    """

    best: CandidateResult
    curve: Sequence[CandidateResult]
    prompts: Sequence[Prompt]
    continuations: Sequence[Continuation]
    notes: Sequence[str]
    model: PlacedModel
    speed: Speed | None = None


def shrink(request: ShrinkRequest) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and compare it with the model.

    ``max_sequences`` limits each text, over all of its parts. Steps that the warehouse has are not repeated. The folder
    of the checkpoint appears when it is complete.

    Raises:
        AvssError: a mistake, or work that failed. Measured cells remain in the warehouse.
    """
    on_event = request.on_event or ignore
    distills = request.distill_tokens is not None
    checkpoint = require_shrinkable(request)
    request = replace(request, warehouse=request.warehouse or f"{request.output}-warehouse")
    split = split_rows(checkpoint, request.texts, request.settings, distilled=distills)
    opened = EvaluationSession.open(str(request.warehouse), request.settings, request.execution, on_event, create=False)
    with opened as session:
        # Scores are measured by executors of their own, which share the cluster that this one connects to.
        session.executor.connect()
        model = session.place(checkpoint, request.settings)
        request, notes = with_writable_texts(request, model)
        for note in notes:
            on_event(Remark(note))
        if request.repair != NO_REPAIR:
            require_tokens(checkpoint, request, split)
        session.store.storage.create()
        chosen = _choose(request, session, model, split, notes)
    if request.speed:
        # Before the checkpoint is written, so that a command that is interrupted here can be repeated.
        chosen = _with_speed(chosen, on_event)
    on_event(Preparing("writing"))
    if not distills:
        return _write(request, chosen, Path(request.output))
    # The folder stays after an error, so that the distillation goes on from it. One that is there is of an earlier
    # attempt, and perhaps of another plan.
    output = Path(request.output)
    student = output.with_name(f"{output.name}.part") / "student"
    shutil.rmtree(student, ignore_errors=True)
    pruned = _write(request, chosen, student)
    prompts = chosen.prompts if chosen.continuations else []
    return _distill(request, split, student, pruned, prompts, on_event)


def require_shrinkable(request: ShrinkRequest) -> Checkpoint:
    """Return the checkpoint of a request. Refuse what is known before anything is measured.

    Raises:
        AvssError: the output is not free, or the model cannot be pruned, repaired or distilled.
    """
    require_free(Path(request.output))
    if request.repair != NO_REPAIR:
        require_changeable(request.execution.partition)
    checkpoint = resolve(str(request.model), trust_remote_code=request.settings.trust_remote_code)
    require_head(checkpoint.name, text_config(checkpoint))
    require_copyable(checkpoint)
    if request.keep_pattern:
        require_pattern(checkpoint, request)
    if request.distill_tokens is not None:
        require_distillable(request, checkpoint)
    return checkpoint


def _choose(
    request: ShrinkRequest, session: EvaluationSession, model: PlacedModel, split: TextSplit, notes: Sequence[str]
) -> _Chosen:
    """Score the layers, and evaluate plans until one meets the request. Let models continue prompts by it.

    Args:
        notes: remarks so far.
    """
    ranking = rank_layers(request, session, split)
    # No set of one layer may keep the pattern, so the example does not.
    example = ranking.plan(replace(protected_choice(request, ranking.criterion, count=1), keep_pattern=False))
    require_prunable(model.checkpoint, example, request.settings)
    own_text = OwnTextWriter(session, model, skipped=split.watched)
    request, unwritten = _write_own_text(request, own_text, model, split)
    for note in unwritten:
        session.on_event(Remark(note))
    trial = ShrinkTrial.plan_tasks(session, model, request, split, ranking, example, own_text)
    if request.keep is None:
        best = trial.evaluate(trial.choose(share=request.share or LOWEST_SHARE))
        curve = [best]
    else:
        best, curve = trial.keep_most(trial.counts(example.num_layers), request.keep)
    prompts = held_out_prompts(model, request.texts, skip_sequences=split.scored)
    pruned = best.plan.intervention
    label = f"{count_removed(best.plan.drop)} dropped"
    variants = {WHOLE: NO_INTERVENTION, label: pruned}
    if best.patch:
        variants[f"{label}, repaired by {request.repair}"] = replace(pruned, patch=best.patch)
    continuations, uncontinued = continue_prompts(session, model, prompts, variants)
    return _Chosen(
        best=best,
        model=model,
        curve=curve,
        prompts=prompts,
        continuations=continuations,
        notes=[*notes, *unwritten, *uncontinued],
    )


def _write_own_text(
    request: ShrinkRequest, own_text: OwnTextWriter, model: PlacedModel, split: TextSplit
) -> tuple[ShrinkRequest, list[str]]:
    """Let the model write the text that its repair is fitted on beside the given one.

    Returns:
        The request, and a remark if the repair is fitted on the given text alone, as the model writes none. Text that
        was asked for is an error then.
    """
    texts = read_repair_texts(model.checkpoint, request, split)
    rows = rows_to_write(texts, request, split)
    if not rows:
        return request, []
    try:
        own_text.write_rows(split.watched + rows)
    except ModelError as error:
        if request.repair_corpora:
            raise
        return on_text_alone(request, error.message.removesuffix("."))
    return request, []


@contextmanager
def _own_text_writer(request: ShrinkRequest, on_event: OnEvent) -> Iterator[OwnTextWriter]:
    """Open what writes text of the whole model on this machine, where a distillation computes, too."""
    settings = request.settings
    checkpoint = resolve(str(request.model), trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(str(request.warehouse), settings, on_event=on_event) as session:
        yield OwnTextWriter(session, session.place(checkpoint))


def _with_speed(chosen: _Chosen, on_event: OnEvent) -> _Chosen:
    """Measure the speed of the model without the chosen layers, which its checkpoint has, beside the whole model.

    Neither a repair nor distillation changes it, as they change no shapes. A model whose speed cannot be measured is
    written all the same.
    """
    plan = chosen.best.plan
    whole = SpeedSubject(label=WHOLE, model=chosen.model)
    smaller = SpeedSubject(label=f"{count_removed(plan.drop)} dropped", model=chosen.model, removed=plan.dropped_layers)
    try:
        (speed,) = measure_speed(whole, [smaller], on_event)
    except AvssError as error:
        return replace(chosen, notes=[*chosen.notes, f"Speed was not measured. {error.message}"])
    return replace(chosen, speed=speed)


def _write(request: ShrinkRequest, chosen: _Chosen, folder: Path) -> Shrunk:
    """Write the pruned and repaired checkpoint into a folder."""
    best = chosen.best
    plan = replace(best.plan, evaluated=tuple(task.describe_all() for task in best.tasks))
    repair = read_repaired(best.patch) if best.patch else None
    written = prune(
        str(request.model), plan, folder, repair=repair, trust_remote_code=request.settings.trust_remote_code
    )
    return Shrunk(
        folder=written["folder"],
        bytes=written["bytes"],
        best=replace(best, plan=plan),
        curve=chosen.curve,
        record=written["repair"],
        difference=written["difference"],
        notes=[*written["notes"], *chosen.notes],
        continuations=chosen.continuations,
        speed=chosen.speed,
    )


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
    output = Path(request.output)
    best = pruned.best
    folder, record = distill_student(
        request,
        student,
        partial(_own_text_writer, request, on_event),
        skip=split.measured,
        held_out=split.watched,
        rows=split.rows,
        on_event=on_event,
    )
    checkpoint = resolve(str(folder), trust_remote_code=request.settings.trust_remote_code)
    with EvaluationSession.open(str(request.warehouse), request.settings, request.execution, on_event) as session:
        model = session.place(replace(checkpoint, name=str(output)), request.settings)
        planned = list(held_out_tasks(model, request, split).values())
        results = session.measure(dict.fromkeys(planned, (NO_INTERVENTION,)))
        label = f"{count_removed(best.plan.drop)} dropped, distilled on {record.after.tokens:,} tokens"
        continuations, notes = continue_prompts(session, model, prompts, {label: NO_INTERVENTION})
    tasks = []
    for before, task in zip(best.tasks, planned, strict=True):
        distilled = primary_results(results[task], {"distilled": NO_INTERVENTION})
        tasks.append(replace(before, results={**before.results, **distilled}))
    publish_distilled(student, folder, output, record, [f"Evaluated: {task.describe_all()}" for task in tasks])
    return replace(
        pruned,
        folder=str(output),
        bytes=sum(file.stat().st_size for file in weight_files(output)),
        best=replace(best, tasks=tasks),
        notes=[*pruned.notes, *notes],
        distillation=record,
        continuations=[*pruned.continuations, *continuations],
    )
