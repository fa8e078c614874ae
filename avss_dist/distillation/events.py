"""Events that a distillation passes to its callback. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


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


@dataclass(frozen=True, kw_only=True)
class HeldOutMeasured:
    """The result of an evaluation on held-out text.

    Attributes:
        tokens: number of tokens trained on so far.
        kept: perplexity of the teacher over that of the student, by text.
    """

    tokens: int
    kept: Mapping[str, float]


Event = Preparing | TrainingAdvanced | HeldOutMeasured
OnEvent = Callable[[Event], None]


def ignore(_event: object) -> None:
    """Ignore an event."""
