"""The loss of distillation: the divergence of the student's predictions from the teacher's, and losses of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from avss_dist.models.labels import LOGIT_BYTES, WIDENED_BYTES, pieces

NOT_COUNTED = -100  # the label of a token that is not predicted, as in transformers
_LEAST = -1e30  # log-probability of an impossible token: a finite number, so that 0 times it is 0

Predict = Callable[
    [torch.Tensor, torch.Tensor | None], torch.Tensor
]  # (ids, mask or None) -> [rows, tokens, vocabulary]


@dataclass(frozen=True)
class TopTokens:
    """The teacher's most probable next tokens at each token of a batch, and the probability of all others together.

    Attributes:
        ids: int64[tokens, top].
        log_probs: logarithms of their probabilities, float32[tokens, top].
        others: logarithm of the probability of all other tokens, float32[tokens].
        drawn_ids: tokens drawn from the others by their probabilities, int64[tokens, draws].
        drawn_log_probs: logarithms of their probabilities, float32[tokens, draws].
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    others: torch.Tensor
    drawn_ids: torch.Tensor
    drawn_log_probs: torch.Tensor

    def completed(self, piece: slice, student: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of all tokens, float32[piece, vocabulary].

        The others share their probability as they do in the student's predictions. The divergence from the student, and
        its gradient, are therefore those of the most probable tokens and of one more outcome: any other token.

        Args:
            student: log-probabilities, float32[piece, vocabulary].
        """
        result = student.scatter(1, self.ids[piece], -torch.inf)
        result.sub_(result.logsumexp(dim=-1, keepdim=True)).add_(self.others[piece, None])
        return result.scatter_(1, self.ids[piece], self.log_probs[piece]).clamp_min_(_LEAST)

    def missed(self, student: torch.Tensor, counted: torch.Tensor) -> float:
        """Return an estimate of what the divergence misses, summed over counted tokens: that among the other tokens.

        By the chain rule it is the probability of the others times the divergence of the distributions among them,
        which is a mean over drawn tokens. The estimate is unbiased.

        Args:
            student: logits, [tokens, vocabulary].
        """
        total = 0.0
        for piece in _pieces(student) if self.drawn_ids.shape[1] else ():
            actual, others = student[piece].float(), self.others[piece]
            among = actual.gather(1, self.drawn_ids[piece])
            among -= actual.scatter(1, self.ids[piece], -torch.inf).logsumexp(dim=-1, keepdim=True)
            missed = others.exp() * (self.drawn_log_probs[piece] - others[:, None] - among).mean(dim=-1)
            total += missed[counted[piece] & others.isfinite()].double().sum().item()
        return total


Expected = torch.Tensor | TopTokens
"""Predictions of the teacher for a batch: its logits, [tokens, vocabulary], or `TopTokens`."""


class _Loss(torch.autograd.Function):
    """Sums over tokens: the loss to train on, and the divergence of the student's from the teacher's predictions.

    The gradient is computed with the value, piece by piece, and stored in the memory of the teacher's logits if they
    have the student's dtype. Beside the logits of both models nothing as large as they exists.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: Expected, labels: torch.Tensor, text_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(teacher, torch.Tensor) and teacher.dtype == student.dtype:
            gradient = teacher
        else:
            gradient = torch.empty_like(student)
        total, surprise = torch.zeros((2, 1), dtype=torch.float64, device=student.device)
        for piece in _pieces(student):
            actual, counted = _log_probabilities(student[piece]), labels[piece] != NOT_COUNTED
            if isinstance(teacher, TopTokens):
                expected = teacher.completed(piece, actual)
            else:
                expected = _log_probabilities(teacher[piece])
            probabilities = expected.exp()
            divergences = (expected.sub_(actual)).mul_(probabilities).sum(dim=-1)
            total += torch.where(counted, divergences, 0.0).sum()
            if text_weight:
                targets = torch.where(counted, labels[piece], 0)[:, None]
                surprise -= torch.where(counted, actual.gather(1, targets)[:, 0], 0.0).sum()
                probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, text_weight))
            gradient[piece] = _scaled(actual.exp_(), 1 + text_weight).sub_(probabilities).mul_(counted[:, None])
        ctx.save_for_backward(gradient)
        diverged = total[0].float()
        ctx.mark_non_differentiable(diverged)
        return (total + text_weight * surprise)[0].float(), diverged

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0].to(gradient.dtype)), None, None, None


def _scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    return values if factor == 1 else values.mul_(factor)


def _pieces(logits: torch.Tensor) -> list[slice]:
    maximum = WIDENED_BYTES if logits.device.type == "cpu" else LOGIT_BYTES
    return pieces(len(logits), logits.shape[1], maximum)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return finite log-probabilities in float32; NaN stays NaN."""
    return logits.float().log_softmax(dim=-1).clamp_min_(_LEAST)


def distillation_loss(
    student: torch.Tensor, teacher: Expected, labels: torch.Tensor, text_weight: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss to train on and the divergence KL(teacher || student), summed over tokens with a label, in nats.

    With `TopTokens`, the divergence is that of their probabilities and of the probability of all other tokens, as one
    outcome. It is never larger than that of all tokens (by the data processing inequality), and equal to it if no token
    is among the others.

    Args:
        student: logits, [tokens, vocabulary].
        teacher: its predictions. Logits are overwritten.
        labels: int64[tokens], the next token, or `NOT_COUNTED`.
        text_weight: weight of the cross entropy of the labels, which is added to the divergence in the loss.

    Returns:
        Two float32 scalars. Only the first one has a gradient.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _Loss.apply(student, teacher, labels, text_weight)
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
        missed: what the divergence misses, see `TopTokens.missed`.
        others: of the teacher, the probability of the tokens that are not in `TopTokens`.
    """

    surprise: float = 0.0
    divergence: float = 0.0
    tokens: int = 0
    missed: float = 0.0
    others: float = 0.0

    def __add__(self, other: TextLoss) -> TextLoss:
        """Return the sums over the tokens of both operands."""
        return TextLoss(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def text_loss(student: Predict, teacher: Predict | None, batch: dict[str, torch.Tensor]) -> TextLoss:
    """Measure a batch of text: ``input_ids``, ``attention_mask`` and ``labels``, each [rows, tokens].

    Args:
        teacher: predictions of the teacher. Those that come with the batch replace it.
    """
    with torch.no_grad():
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], next_labels(batch["labels"])
        logits, counted = predictions(student, ids, mask), labels != NOT_COUNTED
        surprise, missed, diverged = sum(_surprises(logits, labels)), 0.0, 0.0
        expected = expected_predictions(teacher, batch)
        if isinstance(expected, TopTokens):
            missed = expected.missed(logits, counted)
        if expected is not None:
            diverged = distillation_loss(logits, expected, labels)[1].item()
    return TextLoss(surprise, diverged, int(counted.sum()), missed)


def expected_predictions(teacher: Predict | None, batch: Mapping[str, torch.Tensor]) -> Expected | None:
    """Return the teacher's predictions for a batch: those that come with it, or else its logits; None without either.

    Args:
        batch: the tensors of `text_loss`; `TopTokens` come as tensors by the names of their fields.
    """
    if "log_probs" in batch:
        names = [f.name for f in fields(TopTokens)]
        return TopTokens(**{name: batch[name].flatten(0, 1) for name in names})
    if teacher is None:
        return None
    with torch.no_grad():
        return predictions(teacher, batch["input_ids"], batch["attention_mask"])


def _surprises(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[float]:
    """Yield the summed negative log-likelihood of pieces of the labels."""
    for piece in _pieces(logits):
        yield cross_entropy(logits[piece].float(), labels[piece], ignore_index=NOT_COUNTED, reduction="sum").item()
