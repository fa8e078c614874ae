"""The losses, against PyTorch's own with autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from avss_dist.distillation import loss
from avss_dist.distillation.loss import NOT_COUNTED, TopTokens, distillation_loss, next_labels, text_loss
from avss_dist.models.labels import top_tokens


def some_labels(tokens: int, vocabulary: int) -> torch.Tensor:
    """Labels of which about a third do not count."""
    return torch.where(torch.rand(tokens) < 0.7, torch.randint(vocabulary, (tokens,)), NOT_COUNTED)


def top_of(teacher: torch.Tensor, top: int, draws: int = 0) -> TopTokens:
    uniform = torch.rand((draws, len(teacher)), dtype=torch.float64)
    return TopTokens(*top_tokens(teacher.float(), top, uniform))


def bucketed(student: torch.Tensor, teacher: torch.Tensor, top: int) -> torch.Tensor:
    """The divergence of the top tokens and of all others as one outcome, by token, in float64."""
    ids = teacher.topk(top, dim=-1).indices

    def outcomes(logits: torch.Tensor) -> torch.Tensor:
        probabilities = logits.double().softmax(-1)
        chosen = probabilities.gather(1, ids)
        if top == logits.shape[1]:
            return chosen
        return torch.cat([chosen, probabilities.scatter(1, ids, 0.0).sum(-1, keepdim=True)], dim=1)

    return kl_div(outcomes(student).log(), outcomes(teacher), reduction="none").sum(-1)


@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [4 * 50, 16 << 20])
def test_value_and_gradient_are_those_of_autograd(
    dtype: torch.dtype, piece_bytes: int, text_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "WIDENED_BYTES", piece_bytes)
    torch.manual_seed(0)
    student = (3 * torch.randn(23, 50)).requires_grad_()
    teacher, labels = (3 * torch.randn(23, 50)).to(dtype), some_labels(23, 50)
    counted = labels != NOT_COUNTED
    targets = teacher.double().log_softmax(-1)
    diverged = kl_div(student.double().log_softmax(-1), targets, log_target=True, reduction="none").sum(-1)[counted]
    whole = diverged.sum() + text_weight * cross_entropy(student.double(), labels, reduction="sum")
    (expected,) = torch.autograd.grad(2.5 * whole, student, retain_graph=True)
    value, divergence = distillation_loss(student, teacher.clone(), labels, text_weight)
    (gradient,) = torch.autograd.grad(2.5 * value, student)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    assert divergence.item() == pytest.approx(diverged.sum().item(), rel=1e-5) and not divergence.requires_grad
    assert torch.allclose(gradient, expected, atol=1e-5) and not gradient[~counted].any()


@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize("top", [1, 7, 49, 50])
def test_the_most_probable_tokens_and_all_others_as_one(
    top: int, text_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "WIDENED_BYTES", 4 * 50 * 5)
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(23, 50)).requires_grad_(), 3 * torch.randn(23, 50)
    labels = some_labels(23, 50)
    counted = labels != NOT_COUNTED
    diverged = bucketed(student, teacher, top)[counted].sum()
    whole = diverged + text_weight * cross_entropy(student.double(), labels, reduction="sum")
    (expected,) = torch.autograd.grad(whole, student, retain_graph=True)
    value, divergence = distillation_loss(student, top_of(teacher, top), labels, text_weight)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)
    assert divergence.item() == pytest.approx(diverged.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5) and not gradient[~counted].any()


def test_the_most_probable_tokens_give_a_lower_bound_whose_error_is_estimated() -> None:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(400, 50), 3 * torch.randn(400, 50)
    labels = torch.ones(400, dtype=torch.int64)
    whole = distillation_loss(student, teacher.clone(), labels)[1].item()
    values = [distillation_loss(student, top_of(teacher, top), labels)[1].item() for top in (1, 5, 20, 50)]
    assert values == sorted(values) and values[0] < 0.9 * whole and values[-1] == pytest.approx(whole, rel=1e-5)
    for top, value in zip((1, 5, 20, 50), values, strict=True):
        estimate = top_of(teacher, top, 400 if top < 50 else 0).missed(student, labels == 1)
        assert estimate == pytest.approx(whole - value, rel=0.03, abs=1e-3 * whole)


def test_the_gradient_is_stored_in_the_memory_of_the_teacher() -> None:
    student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    value, _ = distillation_loss(student, teacher, torch.ones(4, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.data_ptr() == teacher.data_ptr()


def test_impossible_tokens_count_nothing() -> None:
    """Models mask the logits of padding tokens with minus infinity."""
    logits, label = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([1])
    for teacher in (logits.clone(), top_of(logits, 2)):
        same = distillation_loss(logits.clone(), teacher, label)[1]
        assert same.item() == pytest.approx(0, abs=1e-7)
    for teacher in (logits.clone(), top_of(logits, 2)):
        other = distillation_loss(torch.tensor([[0.0, 1.0, -5.0]]), teacher, label)[1]
        assert 0 < other.item() < 0.01


@pytest.mark.parametrize("teacher", [torch.zeros(1, 3), top_of(torch.zeros(1, 3), 1)])
def test_a_student_that_is_not_a_number_is_noticed(teacher: torch.Tensor | TopTokens) -> None:
    assert distillation_loss(torch.full((1, 3), torch.nan), teacher, torch.tensor([1]))[1].isnan()


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
