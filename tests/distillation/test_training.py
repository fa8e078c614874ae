"""The loss against PyTorch's own; rules that end a training, from its history alone; a tracker that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import TrainerCallback

from avss_dist.distillation import loss
from avss_dist.distillation.curve import (
    COMPLETE,
    DIVERGED,
    CurvePoint,
    best,
    ending,
    evaluations,
    is_better,
)
from avss_dist.distillation.loss import NOT_COUNTED, distillation_loss, next_labels, text_loss
from avss_dist.distillation.trainer import TrackerCallback


def history(*losses: float) -> list[dict[str, Any]]:
    """Evaluations with these losses, the first before training, ten steps apart."""
    return [{"eval_loss": loss, "step": 10 * number} for number, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ((1.0, 0.9, 0.8), None),
        ((1.0, 0.9, 0.8, 0.7, 0.6), COMPLETE),
        ((1.0, 0.8, 0.9, 0.85), None),
        ((1.0, 0.8, 0.9, 0.85, 0.9), COMPLETE),
        ((1.0, 1.2, 1.1, 1.0, 0.9), COMPLETE),
        ((1.0, 0.8, 2.1), DIVERGED),
        ((1.0, float("nan")), DIVERGED),
        ((), None),
    ],
)
def test_ending(losses: tuple[float, ...], reason: str | None) -> None:
    assert ending(history(*losses), steps=40) == reason


def test_a_loss_that_is_not_finite_is_divergence() -> None:
    steps = [{"loss": 0.9, "step": 1}, {"loss": float("inf"), "step": 2}]
    assert ending([*history(1.0), *steps], steps=40) == DIVERGED


def test_the_best_evaluation_is_a_trained_one() -> None:
    curve = evaluations(history(0.5, 0.9, 0.8, 0.8))
    lowest = best(curve)
    assert lowest is not None
    assert lowest.step == 20
    assert best(evaluations(history(0.5))) is None


def test_an_evaluation_has_the_mean_loss_of_the_steps_before_it() -> None:
    entries = [
        *history(1.0),
        {"loss": 0.8, "step": 1},
        {"loss": 0.6, "step": 2},
        {"eval_loss": 0.7, "step": 2},
        {"loss": 0.5, "step": 3},
        {"eval_loss": 0.6, "eval_kept/a": 0.9, "step": 3},
    ]
    points = evaluations(entries)
    assert [point.train_loss for point in points] == [None, pytest.approx(0.7), 0.5]
    assert points[2].kept == {"a": 0.9}


def points(*values: tuple[float, float, float]) -> Iterator[CurvePoint]:
    """Evaluations of two texts: divergence, and what is kept of each."""
    for number, (divergence, a, b) in enumerate(values):
        kept = {"a": a, "b": b}
        yield CurvePoint(step=10 * number, loss=divergence, kept=kept, perplexity={}, divergence={})


@pytest.mark.parametrize(
    ("values", "chosen", "better"),
    [
        ([(1.0, 0.5, 0.5), (0.8, 0.6, 0.6), (0.7, 0.4, 0.4)], 10, True),
        ([(1.0, 0.5, 0.5), (0.8, 0.6, 0.6), (0.7, 0.4, 0.6)], 20, True),
        ([(1.0, 0.5, 0.5), (0.8, 0.3, 0.4), (0.7, 0.4, 0.4)], 20, False),
        ([(1.0, 1.3, 1.2), (0.8, 1.1, 1.05)], 10, True),  # a perplexity below the teacher's is not aimed at
        ([(1.0, 0.5, 0.5), (1.1, 0.6, 0.6)], 10, False),
    ],
)
def test_the_best_evaluation_keeps_some_text(
    values: list[tuple[float, float, float]], chosen: int, better: bool
) -> None:
    curve = [*points(*values)]
    before, *_ = curve
    lowest = best(curve)
    assert lowest is not None
    assert lowest.step == chosen
    assert is_better(lowest, before) is better


# Trackers


class FailingTracker(TrainerCallback):
    """Tracker that can be opened, and cannot log."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.heard.append("begin")

    def on_log(self, *_: Any, **__: Any) -> None:
        raise OSError("no network")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.heard.append("end")


def test_training_goes_on_without_a_tracker_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = FailingTracker()
    callback = TrackerCallback(tracker)
    for event in ("on_train_begin", "on_log", "on_log", "on_train_end"):
        getattr(callback, event)(None, None, None)
    assert tracker.heard == ["begin"], "nothing is passed on after a failure"
    said = capsys.readouterr().err
    assert said.count("No further reports to the tracker, training goes on: no network") == 1


def some_labels(tokens: int, vocabulary: int) -> torch.Tensor:
    """Labels of which about a third do not count."""
    counted = torch.rand(tokens) < 0.7
    labels = torch.randint(vocabulary, (tokens,))
    return torch.where(counted, labels, NOT_COUNTED)


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The divergence of the student's predictions from the teacher's, at each token."""
    targets = teacher.log_softmax(-1)
    return kl_div(student.log_softmax(-1), targets, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [4 * 50, 16 << 20])
def test_value_and_gradient_are_those_of_autograd(
    dtype: torch.dtype, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "WIDENED_BYTES", piece_bytes)
    torch.manual_seed(0)
    student = (3 * torch.randn(23, 50)).requires_grad_()
    teacher = (3 * torch.randn(23, 50)).to(dtype)
    labels = some_labels(23, 50)
    counted = labels != NOT_COUNTED
    whole = divergence(student.double(), teacher.double())[counted].sum()
    (expected,) = torch.autograd.grad(2.5 * whole, student, retain_graph=True)
    value = distillation_loss(student, teacher.clone(), labels)
    (gradient,) = torch.autograd.grad(2.5 * value, student)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert not gradient[~counted].any()


def test_the_gradient_is_stored_in_the_memory_of_the_teacher() -> None:
    student = torch.randn(4, 10, requires_grad=True)
    teacher = torch.randn(4, 10)
    value = distillation_loss(student, teacher, torch.ones(4, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.data_ptr() == teacher.data_ptr()


def test_impossible_tokens_count_nothing() -> None:
    """Models mask the logits of padding tokens with minus infinity."""
    masked = torch.tensor([[0.0, 1.0, -torch.inf]])
    unmasked = torch.tensor([[0.0, 1.0, -5.0]])
    label = torch.tensor([1])
    same = distillation_loss(masked.clone(), masked.clone(), label)
    assert same.item() == pytest.approx(0, abs=1e-7)
    different = distillation_loss(unmasked, masked.clone(), label)
    assert 0 < different.item() < 0.01


def test_a_student_that_is_not_a_number_is_noticed() -> None:
    student = torch.full((1, 3), torch.nan)
    teacher = torch.zeros(1, 3)
    assert distillation_loss(student, teacher, torch.tensor([1])).isnan()


LABELS = torch.tensor([[NOT_COUNTED, 5, 6], [NOT_COUNTED, 7, NOT_COUNTED]])


def test_a_token_predicts_the_label_of_the_next_one() -> None:
    assert next_labels(LABELS).tolist() == [5, 6, NOT_COUNTED, 7, NOT_COUNTED, NOT_COUNTED]


def test_loss_of_text_counts_labelled_tokens() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 3, 8)
    teacher = torch.randn(2, 3, 8)
    batch = {"input_ids": LABELS, "attention_mask": torch.ones_like(LABELS), "labels": LABELS}
    measured = text_loss(lambda *_: student.clone(), lambda *_: teacher.clone(), batch)
    rows = [0, 0, 1]
    places = [0, 1, 0]  # of the tokens that predict a label
    labels = [5, 6, 7]
    surprise = -student.log_softmax(-1)[rows, places, labels]
    expected = divergence(student, teacher)[rows, places]
    assert measured.tokens == 3
    assert measured.surprise == pytest.approx(float(surprise.sum()), rel=1e-5)
    assert measured.divergence == pytest.approx(float(expected.sum()), rel=1e-5)
