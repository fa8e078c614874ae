"""The loss of distillation: the divergence of the student's predictions from the teacher's, and losses of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from avss_dist.models.labels import LOGIT_BYTES, WIDENED_BYTES, pieces

NOT_COUNTED = -100  # the label of a token that is not predicted, as in transformers
_LEAST = -1e30  # log-probability of an impossible token: a finite number, so that 0 times it is 0

Predict = Callable[
    [torch.Tensor, torch.Tensor | None], torch.Tensor
]  # (ids, mask or None) -> [rows, tokens, vocabulary]


class _Divergence(torch.autograd.Function):
    """Sum of the Kullback-Leibler divergences of a student's from a teacher's next-token distributions.

    The gradient is computed with the value, piece by piece, and stored in the memory of the teacher's logits if they
    have the student's dtype. Beside the logits of both models nothing as large as they exists.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        gradient = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        maximum = WIDENED_BYTES if student.device.type == "cpu" else LOGIT_BYTES
        for piece in pieces(len(student), student.shape[1], maximum):
            expected, actual = (_log_probabilities(logits[piece]) for logits in (teacher, student))
            probabilities = expected.exp()
            divergences = (expected.sub_(actual)).mul_(probabilities).sum(dim=-1)
            total += torch.where(counted[piece], divergences, 0.0).sum()
            gradient[piece] = actual.exp_().sub_(probabilities).mul_(counted[piece, None])
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0].to(gradient.dtype)), None, None


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return finite log-probabilities in float32; NaN stays NaN."""
    return logits.float().log_softmax(dim=-1).clamp_min_(_LEAST)


def divergence(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return the summed divergence KL(teacher || student) over counted tokens, in nats, as a float32 scalar.

    Args:
        student: logits, [tokens, vocabulary].
        teacher: logits, [tokens, vocabulary]. They are overwritten.
        counted: bool[tokens].
    """
    result: torch.Tensor = _Divergence.apply(student, teacher, counted)
    return result


def predictions(predict: Predict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of all tokens, [rows * tokens, vocabulary].

    Args:
        mask: [rows, tokens], nonzero where a token is real. The model gets none if all are.
    """
    return predict(ids, None if bool(mask.all()) else mask).flatten(0, 1)


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each token predicts, [rows * tokens]: that of the next one, none for the last of a row."""
    return pad(labels[:, 1:], (0, 1), value=NOT_COUNTED).flatten()


def logits_of(model: Any) -> Predict:
    """Return the function from tokens to the logits of a causal language model, without a key-value cache."""

    def predict(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    return predict


@dataclass(frozen=True)
class TextLoss:
    """Sums over the counted tokens of a text.

    Attributes:
        surprise: negative log-likelihood of the text, in nats.
        divergence: divergence of the student from the teacher, in nats; 0 without a teacher.
        tokens: number of counted tokens.
    """

    surprise: float = 0.0
    divergence: float = 0.0
    tokens: int = 0

    def __add__(self, other: TextLoss) -> TextLoss:
        """Return the sums over the tokens of both operands."""
        return TextLoss(self.surprise + other.surprise, self.divergence + other.divergence, self.tokens + other.tokens)


def text_loss(student: Predict, teacher: Predict | None, batch: dict[str, torch.Tensor]) -> TextLoss:
    """Measure a batch of text: ``input_ids``, ``attention_mask`` and ``labels``, each [rows, tokens]."""
    with torch.no_grad():
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], next_labels(batch["labels"])
        logits, counted = predictions(student, ids, mask), labels != NOT_COUNTED
        surprise = sum(_surprises(logits, labels))
        diverged = divergence(logits, predictions(teacher, ids, mask), counted).item() if teacher else 0.0
    return TextLoss(surprise, diverged, int(counted.sum()))


def _surprises(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[float]:
    """Yield the summed negative log-likelihood of pieces of the labels."""
    for piece in pieces(len(logits), logits.shape[1], WIDENED_BYTES if logits.device.type == "cpu" else LOGIT_BYTES):
        yield cross_entropy(logits[piece].float(), labels[piece], ignore_index=NOT_COUNTED, reduction="sum").item()
