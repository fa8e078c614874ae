"""The loss, against PyTorch's own with autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from avss_dist.distillation import loss
from avss_dist.distillation.loss import NOT_COUNTED, distillation_loss, next_labels, text_loss


def some_labels(tokens: int, vocabulary: int) -> torch.Tensor:
    """Labels of which about a third do not count."""
    return torch.where(torch.rand(tokens) < 0.7, torch.randint(vocabulary, (tokens,)), NOT_COUNTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [4 * 50, 16 << 20])
def test_value_and_gradient_are_those_of_autograd(
    dtype: torch.dtype, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "WIDENED_BYTES", piece_bytes)
    torch.manual_seed(0)
    student = (3 * torch.randn(23, 50)).requires_grad_()
    teacher, labels = (3 * torch.randn(23, 50)).to(dtype), some_labels(23, 50)
    counted = labels != NOT_COUNTED
    targets = teacher.double().log_softmax(-1)
    divergences = kl_div(student.double().log_softmax(-1), targets, log_target=True, reduction="none").sum(-1)
    whole = divergences[counted].sum()
    (expected,) = torch.autograd.grad(2.5 * whole, student, retain_graph=True)
    value = distillation_loss(student, teacher.clone(), labels)
    (gradient,) = torch.autograd.grad(2.5 * value, student)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5) and not gradient[~counted].any()


def test_the_gradient_is_stored_in_the_memory_of_the_teacher() -> None:
    student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    value = distillation_loss(student, teacher, torch.ones(4, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.data_ptr() == teacher.data_ptr()


def test_impossible_tokens_count_nothing() -> None:
    """Models mask the logits of padding tokens with minus infinity."""
    logits, label = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([1])
    assert distillation_loss(logits.clone(), logits.clone(), label).item() == pytest.approx(0, abs=1e-7)
    assert 0 < distillation_loss(torch.tensor([[0.0, 1.0, -5.0]]), logits.clone(), label).item() < 0.01


def test_a_student_that_is_not_a_number_is_noticed() -> None:
    assert distillation_loss(torch.full((1, 3), torch.nan), torch.zeros(1, 3), torch.tensor([1])).isnan()


def test_a_token_predicts_the_label_of_the_next_one() -> None:
    labels = torch.tensor([[NOT_COUNTED, 5, 6], [NOT_COUNTED, 7, NOT_COUNTED]])
    assert next_labels(labels).tolist() == [5, 6, NOT_COUNTED, 7, NOT_COUNTED, NOT_COUNTED]


def test_loss_of_text_counts_labelled_tokens() -> None:
    torch.manual_seed(0)
    logits = {"student": torch.randn(2, 3, 8), "teacher": torch.randn(2, 3, 8)}
    labels = torch.tensor([[NOT_COUNTED, 5, 6], [NOT_COUNTED, 7, NOT_COUNTED]])
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    measured = text_loss(lambda *_: logits["student"].clone(), lambda *_: logits["teacher"].clone(), batch)
    log = {name: values.log_softmax(-1) for name, values in logits.items()}
    places = [(0, 0, 5), (0, 1, 6), (1, 0, 7)]
    assert measured.tokens == 3
    assert measured.surprise == pytest.approx(-sum(log["student"][place].item() for place in places), rel=1e-5)
    expected = sum(
        (log["teacher"][r, t].exp() * (log["teacher"][r, t] - log["student"][r, t])).sum() for r, t, _ in places
    )
    assert measured.divergence == pytest.approx(float(expected), rel=1e-5)
