"""Distillation, alone or as the last step of shrinking, with the work beside the output."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

from avss_dist.core.errors import ConfigError, RunFailed, explain_unwritable
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import ModelOptions, TextOptions
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewObject
from avss_dist.distillation.curve import DIVERGED, OnEvent
from avss_dist.distillation.distill import Distilled, distill
from avss_dist.distillation.memory import estimate_memory, require_memory, without_layers
from avss_dist.distillation.pair import resolve_pair
from avss_dist.distillation.record import DistillRecord, read_record, write_card
from avss_dist.distillation.texts import OpenWriter
from avss_dist.evaluation.own_text import OwnTextWriter, cache_of_own_text
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.models.checkpoint.size import footprint
from avss_dist.requests import DistillRequest, ShrinkRequest
from avss_dist.stats.catalog import LOWEST_SHARE
from avss_dist.stats.rankings import count_lowest


def distill_model(request: DistillRequest) -> Distilled:
    """Train a student on the predictions of a teacher, and write it as a checkpoint.

    Text that the teacher writes itself is kept in the user's cache.

    Raises:
        AvssError: see `distillation.distill.distill`.
    """
    return distill(request, partial(teacher_writer, request))


@contextmanager
def teacher_writer(request: DistillRequest) -> Iterator[OwnTextWriter]:
    """Open what writes text of the teacher of a distillation on this machine, and keeps it in the user's cache."""
    settings = request.settings
    checkpoint = resolve(str(request.teacher), trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(cache_of_own_text(), settings, on_event=request.on_event) as session:
        yield OwnTextWriter(session, session.place(checkpoint), seed=request.seed)


def require_distillable(request: ShrinkRequest, checkpoint: Checkpoint) -> None:
    """Refuse a model that cannot be distilled, before anything is measured.

    The estimate of memory is for as many layers less as may be dropped. `distill` repeats it for the student.

    Raises:
        ConfigError: the model is quantized, its dtype cannot be trained, student and teacher do not fit in memory, or a
            text is named twice.
        ModelError: the model cannot be read or built.
    """
    if len(set(request.repair_texts)) < len(request.repair_texts):
        raise ConfigError("`repair_corpora` names a text twice.", "Name it once, with a weight: CORPUS=2.")
    training = _distill_request(request, checkpoint.path, Path(request.output), {})
    models = resolve_pair(training)
    size = footprint(checkpoint, models.settings)
    if request.keep:
        dropped = max(0, min(size.num_layers - 1, size.num_layers - request.first - request.last))
    else:
        dropped = count_lowest(size.num_layers, request.share or LOWEST_SHARE)
    whole = estimate_memory(
        checkpoint,
        checkpoint,
        models.settings,
        models.teacher_settings,
        train=training.train,
        rank=training.lora_rank,
    )
    require_memory(
        without_layers(whole, size, dropped),
        models.device.type,
        training.train,
        "Lower `sequence_length`, or leave out `distill_tokens` and distill the result with avss distill, which can "
        "train fewer weights. It loads both models whole on one device, whatever `partition` is.",
    )


def distill_student(
    request: ShrinkRequest,
    student: Path,
    open_writer: OpenWriter,
    *,
    skip: int,
    held_out: int,
    rows: int,
    on_event: OnEvent,
) -> tuple[Path, DistillRecord]:
    """Distill a student, or find an earlier result of the same request, and return its folder and record.

    Args:
        student: its folder.
        open_writer: opens what writes text of the whole model.
        skip: rows of each text that distillation does not read.
        held_out: rows after them that are only measured.
        rows: maximum number of rows of each text, the skipped ones included.

    Raises:
        AvssError: see `distillation.distill.distill`.
    """
    reading = {"max_sequences": rows - skip, "skip_sequences": skip, "held_out": held_out}
    checkpoint = resolve(str(student), trust_remote_code=request.settings.trust_remote_code)
    options = _reading(request) | reading
    key = fingerprint(
        **options,
        tokens=request.distill_tokens,
        corpora=[RedactedURI(text) for text in request.weighted_repair_texts],
        student=checkpoint.revision,
    )
    # Ids of runs have the name of the folder, so it is that of the output.
    folder = student.with_name(f"distilled-{key[:12]}") / Path(request.output).name
    record = read_record(folder)
    if record is None or record.ended == DIVERGED:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            training = _distill_request(request, student, folder, {**reading, "on_event": on_event})
            record = distill(training, open_writer).record
        except RunFailed as error:
            raise RunFailed(
                f"{error.message} The checkpoint before distillation is in {student}.",
                "Leave out `distill_tokens`, or distill that checkpoint with avss distill, which has more options.",
            ) from error
    return folder, record


def publish_distilled(
    student: Path, folder: Path, output: Path, record: DistillRecord, evaluated: Sequence[str]
) -> None:
    """Write lines on evaluations into the model card, move the checkpoint to the output, and delete the work.

    Raises:
        AvssError: a folder cannot be written.
    """
    with explain_unwritable(output, "Repair that, and run the same command again."):
        write_card(student, folder, record, evaluated)
        shutil.rmtree(student)
        folder.replace(output)
        for path in student.parent.glob("distilled-*"):
            shutil.rmtree(path)
    with suppress(OSError):  # the folder has files of the user
        student.parent.rmdir()


def _distill_request(request: ShrinkRequest, student: str | Path, output: Path, options: NewObject) -> DistillRequest:
    """Return the request of distilling a student of the model that is shrunk.

    Args:
        options: fields in place of those of the request.
    """
    assert request.distill_tokens is not None
    return DistillRequest(
        str(student),
        teacher=request.model,
        output=output,
        corpora=request.weighted_repair_texts,
        tokens=request.distill_tokens,
        allow_overlap=request.allow_overlap,
        **_reading(request) | options,
    )


def _reading(request: ShrinkRequest) -> NewObject:
    """Return the settings that distillation takes too. Its batch is a training step, not that of the evaluation."""
    values = {}
    for group in (TextOptions, ModelOptions):
        for option in fields(group):
            values[option.name] = getattr(request, option.name)
    return values
