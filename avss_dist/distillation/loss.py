"""The loss of distillation: the divergence of the student's predictions from the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.functional import cross_entropy, pad

from avss_dist.models.structure.head import LOGIT_BYTES, WIDENED_BYTES, pieces

NOT_COUNTED = -100  # the label of a token that is not predicted, as in transformers
_LEAST = -1e30  # log-probability of an impossible token: a finite number, so that 0 times it is 0

Predict = Callable[
    [torch.Tensor, torch.Tensor | None], torch.Tensor
]  # (ids, mask or None) -> [rows, tokens, vocabulary]


class _Loss(torch.autograd.Function):
    """The divergence of the student's from the teacher's predictions, summed over tokens.

    The gradient is computed with the value, piece by piece, and stored in the memory of the teacher's logits if they
    have the student's dtype. Beside the logits of both models nothing as large as they exists.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gradient = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for piece in _pieces(student):
            actual = _log_probabilities(student[piece])
            counted = labels[piece] != NOT_COUNTED
            expected = _log_probabilities(teacher[piece])
            probabilities = expected.exp()
            divergences = (expected.sub_(actual)).mul_(probabilities).sum(dim=-1)
            total += torch.where(counted, divergences, 0.0).sum()
            gradient[piece] = actual.exp_().sub_(probabilities).mul_(counted[:, None])
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(gradients[0].to(gradient.dtype)), None, None


def _pieces(logits: torch.Tensor) -> list[slice]:
    maximum = WIDENED_BYTES if logits.device.type == "cpu" else LOGIT_BYTES
    return pieces(len(logits), logits.shape[1], maximum)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return finite log-probabilities in float32. NaN stays NaN."""
    return logits.float().log_softmax(dim=-1).clamp_min_(_LEAST)


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the divergence KL(teacher || student), summed over tokens with a label, in nats: a float32 scalar.

    Args:
        student: logits, [tokens, vocabulary].
        teacher: logits, [tokens, vocabulary], which are overwritten.
        labels: int64[tokens], the next token, or `NOT_COUNTED`.
    """
    result: torch.Tensor = _Loss.apply(student, teacher, labels)
    return result


def predictions(predict: Predict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of all tokens, [rows * tokens, vocabulary].

    Args:
        mask: [rows, tokens], nonzero where a token is real. The model gets none if all are.
    """
    is_full = bool(mask.all())
    logits = predict(ids, None if is_full else mask)
    return logits.flatten(0, 1)


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each token predicts, [rows * tokens]: that of the next one, none for the last of a row."""
    return pad(labels[:, 1:], (0, 1), value=NOT_COUNTED).flatten()


def logits_of(model: nn.Module) -> Predict:
    """Return the function from tokens to the logits of a causal language model, without a key-value cache."""

    def predict(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    return predict


@dataclass(frozen=True)
class LossSums:
    """Sums over the counted tokens of a text.

    Attributes:
        surprise: negative log-likelihood of the text, in nats.
        divergence: divergence of the student from the teacher, in nats; 0 without a teacher.
        tokens: number of counted tokens.
    """

    surprise: float = 0.0
    divergence: float = 0.0
    tokens: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        """Return the sums over the tokens of both operands."""
        return LossSums(
            surprise=self.surprise + other.surprise,
            divergence=self.divergence + other.divergence,
            tokens=self.tokens + other.tokens,
        )


def text_loss(student: Predict, teacher: Predict | None, batch: dict[str, torch.Tensor]) -> LossSums:
    """Measure a batch of text: ``input_ids``, ``attention_mask`` and ``labels``, each [rows, tokens].

    Args:
        teacher: predictions of the teacher; None measures no divergence.
    """
    with torch.no_grad():
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        labels = next_labels(batch["labels"])
        logits = predictions(student, ids, mask)
        surprise = 0.0
        for piece in _pieces(logits):
            loss = cross_entropy(logits[piece].float(), labels[piece], ignore_index=NOT_COUNTED, reduction="sum")
            surprise += loss.item()
        divergence = 0.0
        if teacher is not None:
            divergence = distillation_loss(logits, predictions(teacher, ids, mask), labels).item()
    tokens = int((labels != NOT_COUNTED).sum())
    return LossSums(surprise, divergence, tokens)
