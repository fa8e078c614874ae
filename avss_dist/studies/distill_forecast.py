"""Forecast of a distillation: its passes, tokens and memory, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from avss_dist.core.devices import devices_here
from avss_dist.distillation.curve import ignore
from avss_dist.distillation.distill import open_ranks, require_possible, require_same_request, schedule_of
from avss_dist.distillation.memory import Memory
from avss_dist.distillation.texts import DistillText, read_texts
from avss_dist.evaluation.events import MemoryNeeded
from avss_dist.evaluation.forecast import Forecast, ForecastStep
from avss_dist.requests import DistillRequest
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
        if request.corpora or request.watch or not request.self_texts:
            # The teacher's own text would have to be written first.
            with TemporaryDirectory() as work:
                texts = read_texts(replace(request, self_texts=0), models, Path(work), ignore)
        if request.self_texts:
            notes.append(f"The teacher writes {request.self_texts:,} texts first, which are not part of this.")
        schedule = schedule_of(request, models)
    length = models.settings.sequence_length
    held_out = sum(text.held_out.num_sequences for text in texts)
    evaluations = schedule.evaluations + 2  # before training, and of the written checkpoint
    steps = [
        ForecastStep(
            step="training",
            evaluations=schedule.steps,
            passes=TRAINING_PASSES * schedule.steps,
            tokens=TRAINING_PASSES * schedule.steps * schedule.step_tokens,
        ),
        ForecastStep(
            step="evaluations on held-out rows",
            evaluations=evaluations,
            passes=PASSES_OF_EVALUATION * evaluations * -(-held_out // request.batch_size),
            tokens=PASSES_OF_EVALUATION * evaluations * held_out * length,
        ),
    ]
    return Forecast(steps=steps, memory=_memory_needed(memory, models.device.type), notes=notes)


def _memory_needed(memory: Memory, device: str) -> MemoryNeeded:
    """Return the memory of a process of a distillation beside what is free."""
    return MemoryNeeded(parts=memory.parts, free=devices_here(device).device_bytes)
