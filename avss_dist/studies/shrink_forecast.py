"""Forecast of shrinking: its steps, passes and time, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.corpus.seen import SELF
from avss_dist.distillation.texts import rows_drawn_of_teacher
from avss_dist.evaluation.continuations import held_out_prompts, plan_continuations
from avss_dist.evaluation.forecast import (
    BACKWARD,
    Forecast,
    ForecastStep,
    Work,
    forecast_memory,
    forecast_step,
    forecast_work,
    forecasting,
    repeated,
)
from avss_dist.evaluation.own_text import OwnTextWriter, rows_of_own_text
from avss_dist.evaluation.pace import PastSpeed, past_speed, writing_speed
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.size import Footprint, footprint
from avss_dist.models.structure.head import FLOAT32_BYTES
from avss_dist.plans.choice import PlanError
from avss_dist.pruning.repair.costs import fit_operations
from avss_dist.pruning.repair.registry import NO_REPAIR, names_own_text, searched_repair, split_weight
from avss_dist.requests import ShrinkRequest
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.stored import look_up_run
from avss_dist.stats.catalog import GREEDY, LOWEST_SHARE
from avss_dist.stats.rankings import count_lowest
from avss_dist.studies.ablate import plan_ablation
from avss_dist.studies.shrink import require_shrinkable
from avss_dist.studies.shrink_trial import (
    SCORED_SITES,
    TextSplit,
    ablation_of_score,
    held_out_tasks,
    read_repair_texts,
    require_tokens,
    rows_to_write,
    scoring_options,
    split_rows,
    with_writable_texts,
)
from avss_dist.tasks.task import Cell

PASSES_OF_FIT = 2
"""Passes of a fit over its text: one of the whole model, and one for the cuts, of which each runs a part."""
TRAINING_PASSES = 2 + BACKWARD
"""Forward passes of a training step: of the teacher, of the student, and as many as its backward pass takes."""


def forecast_shrinking(request: ShrinkRequest) -> Forecast:
    """Return what `shrink` would do. Nothing is measured or written.

    Which layers go is known after the scores, so that evaluations without layers and repairs are taken to be missing.

    Raises:
        AvssError: a mistake, as in `shrink`.
    """
    checkpoint = require_shrinkable(request)
    notes = ["Which layers go is known after the scores: what is stored without layers is not looked up."]
    request = replace(request, warehouse=request.warehouse or f"{request.output}-warehouse")
    split = split_rows(checkpoint, request.texts, request.settings, distilled=request.distill_tokens is not None)
    size = footprint(checkpoint, request.settings)
    with forecasting(str(request.warehouse), request.settings, request.execution, None) as session:
        model = session.place(checkpoint, request.settings)
        request, remarks = with_writable_texts(request, model)
        notes += remarks
        if request.repair != NO_REPAIR:
            require_tokens(checkpoint, request, split)
            notes.append("The time of a repair assumes that half of the removed layers are neighbours.")
        speed = past_speed(session, model)
        options = scoring_options(request, session, split)
        steps = [_scoring(request, session, split, speed)]
        cells = []
        measuring = ablation_of_score(request, options)
        if measuring is not None:
            for task in plan_ablation(measuring, session, checkpoint):
                of_task = task.cells()
                steps.append(forecast_step(session, task.task.name, of_task, task, speed))
                cells += of_task
        steps += _writing(request, session, model, split)
        if request.by == GREEDY:
            steps.append(_search(request, model, split, size, speed))
        steps += _candidates(request, session, model, split, size, speed)
        memory = forecast_memory(session, model, cells)
    if request.distill_tokens is not None:
        tokens = int(TRAINING_PASSES * request.distill_tokens)
        passes = math.ceil(tokens / request.sequence_length)  # a training step has one row
        steps.append(forecast_work("distillation", Work(passes, tokens, tokens), speed))
    if request.speed:
        notes.append("Speed is measured at the end, which is not part of the time.")
    return Forecast(steps=steps, memory=memory, notes=notes)


def _scoring(
    request: ShrinkRequest, session: EvaluationSession, split: TextSplit, speed: PastSpeed | None
) -> ForecastStep:
    """Return the step that scores the layers."""
    settings = replace(request.settings, max_sequences=split.scored, sites=SCORED_SITES)
    name = str(request.model)
    spec = RunSpec(
        model=name, corpus=request.corpus, settings=settings, execution=request.execution, title=name, name=name
    )
    planner = Planner(session.executor, session.store, fetch=False)
    stored = look_up_run(planner, session.store, spec)
    corpus = stored.planned.corpus
    kept = len(corpus.shards) if stored.is_done else stored.num_kept
    missing_share = 1 - kept / len(corpus.shards)
    tokens = round(missing_share * corpus.num_tokens)
    passes = round(missing_share * corpus.num_batches(settings.batch_size))
    step = forecast_work("scores", Work(passes, tokens, tokens), speed)
    return replace(step, evaluations=len(corpus.shards), stored=kept)


def _writing(
    request: ShrinkRequest, session: EvaluationSession, model: PlacedModel, split: TextSplit
) -> list[ForecastStep]:
    """Return the step in which the model writes text for the repair and the distillation, or none if it writes none."""
    rows = _rows_to_distil(request, split)
    rows_to_fit = rows_to_write(read_repair_texts(model.checkpoint, request, split), request, split)
    if rows_to_fit:
        rows = max(rows, split.watched + rows_to_fit)
    if not rows:
        return []
    cells: list[Cell] = []
    for batch in OwnTextWriter(session, model).batches(rows):
        cells += batch.cells()
    speed = writing_speed(session, model)
    return [forecast_step(session, "text that the model writes itself", cells, model, speed)]


def _rows_to_distil(request: ShrinkRequest, split: TextSplit) -> int:
    """Return the number of rows of its own text that a distillation watches and draws; 0 without a distillation."""
    if request.distill_tokens is None:
        return 0
    weights = {SELF: 1.0}
    for weighted in request.weighted_repair_texts:
        corpus, weight = split_weight(weighted)
        weights[corpus] = weight
    share = weights[SELF] / sum(weights.values())
    return split.watched + rows_drawn_of_teacher(share, request.distill_tokens, request.sequence_length)


def _num_dropped(request: ShrinkRequest, num_layers: int) -> int:
    """Return the number of layers that are dropped, at most."""
    if request.keep:
        return max(0, min(num_layers - 1, num_layers - request.first - request.last))
    return count_lowest(num_layers, request.share or LOWEST_SHARE)


def _fit(request: ShrinkRequest, model: PlacedModel, size: Footprint, repair: str, *, skipped: int, rows: int) -> Work:
    """Return the work of one fit of a repair.

    Args:
        size: size of the model.
        skipped, rows: rows of each text that are skipped, and those that are read after them.
    """
    reading = replace(model.settings, max_sequences=rows, skip_sequences=skipped)
    texts = [plan_text(model.checkpoint, text, reading) for text in request.repair_texts]
    passes = sum(text.num_batches(model.settings.batch_size) for text in texts)
    tokens = sum(text.num_tokens for text in texts)
    if names_own_text(request.weighted_repair_texts):
        own_rows = rows_of_own_text(texts, rows)
        passes += math.ceil(own_rows / model.settings.batch_size)
        tokens += own_rows * model.settings.sequence_length
    read_tokens = PASSES_OF_FIT * tokens
    solving = _tokens_of_solution(request, model, size, repair, tokens)
    return Work(PASSES_OF_FIT * passes, read_tokens, read_tokens + solving)


def _tokens_of_solution(request: ShrinkRequest, model: PlacedModel, size: Footprint, repair: str, tokens: int) -> float:
    """Return the number of tokens that whole passes would read in the time in which a fit is solved.

    Args:
        size: size of the model.
        tokens: tokens that the repair is fitted to.
    """
    cuts = _typical_cuts(_num_dropped(request, size.num_layers))
    operations = 0.0
    with suppress(PlanError):  # The layers are not known before a pass.
        operations = fit_operations(model.checkpoint, repair, model.settings, cuts, tokens)
    # Fits compute in float32 and float64: half as fast as passes in 16 bits, about.
    slowdown = FLOAT32_BYTES / size.element_bytes
    operations_of_token = size.forward_flops(1, request.sequence_length) / request.sequence_length
    return slowdown * operations / operations_of_token


def _typical_cuts(dropped: int) -> list[int]:
    """Return the number of removed layers of each cut: half of the layers side by side, and each other one alone."""
    together = math.ceil(dropped / 2)
    return [together] + [1] * (dropped - together)


def _search(
    request: ShrinkRequest, model: PlacedModel, split: TextSplit, size: Footprint, speed: PastSpeed | None
) -> ForecastStep:
    """Return the step of a greedy search: of the 2k layers with least damage, each set that it tries.

    A set is fitted to as many rows as its loss is measured on.
    """
    dropped = _num_dropped(request, size.num_layers)
    sets = dropped * (3 * dropped + 1) // 2
    text = plan_text(model.checkpoint, request.corpus, replace(model.settings, max_sequences=split.scored))
    work = Work(text.num_batches(model.settings.batch_size), text.num_tokens, text.num_tokens)
    if request.repair != NO_REPAIR:
        repair = searched_repair(request.repair)
        work += _fit(request, model, size, repair, skipped=split.held_out, rows=split.scored)
    step = forecast_work(f"greedy search, {sets:,} sets at most", work.times(sets), speed)
    return replace(step, evaluations=sets)


def _candidates(
    request: ShrinkRequest,
    session: EvaluationSession,
    model: PlacedModel,
    split: TextSplit,
    size: Footprint,
    speed: PastSpeed | None,
) -> Sequence[ForecastStep]:
    """Return the steps that repair, evaluate and continue prompts by the whole and the smaller models."""
    plans = 1
    if request.keep:
        plans = math.ceil(math.log2(_num_dropped(request, size.num_layers) + 1))
    kinds = 1
    if request.repair != NO_REPAIR:
        kinds = 2
    steps = []
    if request.repair != NO_REPAIR:
        rows = split.rows - split.held_out
        work = _fit(request, model, size, request.repair, skipped=split.held_out, rows=rows)
        fits = forecast_work(f"repair {request.repair}", work.times(plans), speed)
        steps.append(replace(fits, evaluations=plans))
    for name, task in held_out_tasks(model, request, split).items():
        cells = task.cells()
        steps.append(forecast_step(session, f"{name}, whole model", cells, task, speed))
        missing = forecast_step(session, name, cells, task, speed, stored=False)
        steps.append(repeated(missing, f"{name}, without layers", plans * kinds))
    prompts = held_out_prompts(model, request.texts, skip_sequences=split.scored)
    if prompts:
        continued = plan_continuations(model, prompts).cells([NO_INTERVENTION])
        missing = forecast_step(session, "continuations", continued, model, speed, stored=False)
        steps.append(repeated(missing, "continued prompts", 1 + kinds))
    return steps
