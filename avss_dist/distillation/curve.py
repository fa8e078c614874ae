"""The course of a training: its events, evaluations on held-out text by tokens, and the rules that end it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.validation import Count, checked
from avss_dist.core.values import JsonObject

# Reasons why a training ended.
COMPLETE = "complete"
DIVERGED = "diverged"
SAME_PREDICTIONS = 1e-6  # nats per token: a smaller divergence is rounding
DIVERGENCE_FACTOR = 2.0  # of the held-out loss before training: beyond it, training has diverged

# Names of metrics in a trainer's history. All but the first are followed by the label of a text.
LOSS = "eval_loss"
KEPT = "eval_kept/"
PERPLEXITY = "eval_perplexity/"
DIVERGENCE = "eval_divergence/"

MOST_LOGGED = 2000  # losses of a training that are logged

Number = Annotated[float, Field(strict=False)]
ByText = Mapping[str, Number]
History = Sequence[JsonObject]
"""Log of a trainer: a mapping for each training step and each evaluation, with its ``step``."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a training and its course.

    Attributes:
        steps: number of optimizer steps.
        step_tokens: tokens of a step.
        evaluations: number of evaluations after the start.
        learning_rate: highest learning rate of the optimizer.
        warmup: number of steps in which the learning rate rises. Then it falls to zero, along a line.
    """

    steps: int
    step_tokens: int
    evaluations: int
    learning_rate: float
    warmup: int


@checked
class CurvePoint:
    """An evaluation on held-out rows. It is also the event of its end.

    Attributes:
        step: training steps before it.
        tokens: tokens trained on before it, those before an interruption included.
        train_loss: mean divergence from the teacher in the steps since the point before, in nats per token.
        loss: divergence from the teacher on held-out rows of the trained texts, by their weights, in nats per token.
        divergence: divergence from the teacher, by trained text.
        perplexity: perplexity, by text.
        kept: perplexity of the teacher over that of the student, by text.
    """

    step: Count
    tokens: Count = 0
    train_loss: Number | None = None
    loss: Number
    divergence: ByText
    perplexity: ByText
    kept: ByText


@dataclass(frozen=True)
class Preparing:
    """The progress of a step before or after training: the share of it that is done."""

    step: str
    share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainingAdvanced:
    """The end of a training step.

    Attributes:
        tokens: number of tokens trained on so far, those before an interruption included.
        total: number of tokens of the whole training.
        loss: mean divergence from the teacher in this step, in nats per token.
    """

    tokens: int
    total: int
    loss: float


Event = Preparing | TrainingAdvanced | CurvePoint
OnEvent = Callable[[Event], None]


def ignore(_event: object) -> None:
    """Ignore an event."""


def evaluations(history: History, step_tokens: int = 0) -> list[CurvePoint]:
    """Return the evaluations of a history, in order.

    Args:
        step_tokens: tokens of a training step.
    """
    result: list[CurvePoint] = []
    losses: list[float] = []
    for entry in history:
        if "loss" in entry:
            losses.append(float(entry["loss"]))
        if LOSS in entry:
            train_loss = sum(losses) / len(losses) if losses else None
            result.append(_point(entry, step_tokens, train_loss))
            losses = []
    return result


def _point(entry: JsonObject, step_tokens: int, train_loss: float | None) -> CurvePoint:
    """Return the evaluation of an entry of a history."""
    step = int(entry["step"])
    return CurvePoint(
        step=step,
        tokens=step * step_tokens,
        train_loss=train_loss,
        loss=entry[LOSS],
        divergence=_by_text(entry, DIVERGENCE),
        perplexity=_by_text(entry, PERPLEXITY),
        kept=_by_text(entry, KEPT),
    )


def _by_text(entry: JsonObject, prefix: str) -> dict[str, float]:
    """Return the metrics of an entry whose names have a prefix, by the label of their text."""
    return {name.removeprefix(prefix): entry[name] for name in sorted(entry) if name.startswith(prefix)}


def best(points: Sequence[CurvePoint]) -> CurvePoint | None:
    """Return the trained evaluation with the lowest held-out loss, or None if none has a finite loss.

    Evaluations that keep less of every text than the first one come last.
    """
    trained = [point for point in points if point.step and math.isfinite(point.loss)]
    return min(trained, key=lambda point: (_keeps_less(point, points[0]), point.loss, point.step), default=None)


def is_better(point: CurvePoint, before: CurvePoint) -> bool:
    """Whether a student is closer to the teacher than before training, and does not keep less of every text."""
    return point.loss < before.loss and not _keeps_less(point, before)


def _keeps_less(point: CurvePoint, before: CurvePoint) -> bool:
    """Whether less of every text is kept. A perplexity below the teacher's counts as the teacher's."""
    for label, share_before in before.kept.items():
        if min(point.kept[label], 1.0) >= min(share_before, 1.0):
            return False
    return True


def require_distance(point: CurvePoint, work: Path) -> None:
    """Refuse a student that there is nothing to train of.

    Args:
        point: evaluation before training.
        work: folder of the work so far.

    Raises:
        ModelError: the student predicts NaN or infinities.
        ConfigError: the student predicts what the teacher does.
    """
    if not math.isfinite(point.loss):
        raise ModelError(
            "The student predicts NaN or infinities on held-out text, before any training.",
            f"Check its weights, and write the checkpoint again; first delete {work}.",
        )
    if point.loss < SAME_PREDICTIONS:
        raise ConfigError(
            f"The student predicts what the teacher does: before training, the divergence on held-out text is "
            f"{point.loss:.2g} nats per token.",
            f"Name a student that differs from the teacher; first delete {work}.",
        )


def ending(history: History, steps: int) -> str | None:
    """Return why a training has ended, or None if it goes on.

    Args:
        steps: number of steps of the whole training.
    """
    points = evaluations(history)
    if not all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry):
        return DIVERGED
    if not points:
        return None
    has_stayed_close = points[-1].loss <= DIVERGENCE_FACTOR * points[0].loss  # which NaN has not
    if not has_stayed_close:
        return DIVERGED
    if points[-1].step >= steps:
        return COMPLETE
    return None
