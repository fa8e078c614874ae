"""Forecast of a distillation: its passes, tokens and memory, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from avss_dist.core.devices import devices_here
from avss_dist.core.settings import Settings
from avss_dist.distillation.curve import ignore
from avss_dist.distillation.distill import open_ranks, require_possible, require_same_request, schedule_of
from avss_dist.distillation.memory import Memory
from avss_dist.distillation.texts import DistillText, read_texts, rows_of_teacher, share_of_teacher
from avss_dist.evaluation.events import MemoryNeeded
from avss_dist.evaluation.forecast import Forecast, ForecastStep
from avss_dist.evaluation.own_text import TEXTS_OF_BATCH
from avss_dist.requests import DistillRequest
from avss_dist.studies.distill import teacher_writer
from avss_dist.studies.shrink_forecast import TRAINING_PASSES

PASSES_OF_EVALUATION = 2
"""Forward passes over held-out rows: of the student and, where its losses are not kept, of the teacher."""


def forecast_distillation(request: DistillRequest) -> Forecast:
    """Return what `distill` would do. Nothing is trained or written.

    Raises:
        AvssError: a mistake, as in `distill`.
    """
    with open_ranks(request) as executor:
        models, memory = require_possible(request, executor)
        resumes = require_same_request(request, models)
        notes = ["The time is not known, as a distillation has no warehouse with earlier speeds."]
        if resumes:
            notes.append("It goes on from the work beside the output, so that less is left.")
        texts: list[DistillText] = []
        has_own_text = request.self_texts != 0
        if request.corpora or request.watch or not has_own_text:
            # The teacher's own text would have to be written first.
            texts = read_texts(replace(request, self_texts=0), models, partial(teacher_writer, request), ignore)
        schedule = schedule_of(request, models)
    length = models.settings.sequence_length
    steps = []
    if has_own_text:
        steps.append(_writing(request, models.settings, texts))
    held_out = sum(text.held_out.num_sequences for text in texts)
    evaluations = schedule.evaluations + 2  # before training, and of the written checkpoint
    steps += [
        ForecastStep(
            step="training",
            evaluations=schedule.steps,
            passes=TRAINING_PASSES * schedule.steps,
            tokens=TRAINING_PASSES * schedule.steps * schedule.step_tokens,
        ),
        ForecastStep(
            step="evaluations on held-out rows",
            evaluations=evaluations,
            passes=PASSES_OF_EVALUATION * evaluations * -(-held_out // request.rows),
            tokens=PASSES_OF_EVALUATION * evaluations * held_out * length,
        ),
    ]
    return Forecast(steps=steps, memory=_memory_needed(memory, models.device.type), notes=notes)


def _writing(request: DistillRequest, settings: Settings, texts: Sequence[DistillText]) -> ForecastStep:
    """Return the step in which the teacher writes text, all of which is taken to be missing.

    Args:
        texts: the other texts.
    """
    count = request.self_texts or rows_of_teacher(request, settings, share_of_teacher(request, texts))
    return ForecastStep(
        step="text that the teacher writes",
        evaluations=count,
        passes=settings.sequence_length * -(-count // TEXTS_OF_BATCH[settings.device]),
        tokens=count * settings.sequence_length,
    )


def _memory_needed(memory: Memory, device: str) -> MemoryNeeded:
    """Return the memory of a process of a distillation beside what is free."""
    return MemoryNeeded(parts=memory.parts, free=devices_here(device).device_bytes)
