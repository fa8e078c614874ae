"""Damage and gradients: against plain passes without a layer and plain autograd, label by label.

On models of every structure: rows of finite numbers, and no trace left, of rounding neither.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import opened, random_shard
from support.families import tiny_model
from support.waiting import NoWaiting
from torch.nn.functional import cross_entropy

from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.predictions import predicted
from avss_dist.models.structure.head import draw_labels, uniform_numbers
from avss_dist.models.structure.layers import first_tensor, input_tensor
from avss_dist.tasks import backward as gradient_pass
from avss_dist.tasks.backward import Gradients, matrices
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.task import MetricRow
from avss_dist.tasks.text_loss import TextLoss

RowsByMetric = dict[tuple[Any, ...], MetricRow]
Seen = tuple[LanguageModel, RowsByMetric, list[Batch]]


def by_metric(rows: list[MetricRow]) -> RowsByMetric:
    return {(row.metric, row.layer, row.removed): row for row in rows}


def traced(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the head is given, and the hidden states before the first layer and after each, with autograd's graph."""
    states: list[torch.Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        states.append(input_tensor(args, kwargs))

    def leave(module: Any, args: Any, output: Any) -> None:
        states.append(first_tensor(output))

    hooks = [model.layers[0].module.register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [layer.module.register_forward_hook(leave) for layer in model.layers]
    last = model.hidden_states(batch)
    for hook in hooks:
        hook.remove()
    return last, states


@pytest.fixture(scope="module", params=[0, 4], ids=["every token", "skipped tokens"])
def seen(request: pytest.FixtureRequest, tiny_llama: Path) -> Seen:
    """What damage says of rows in batches of two, and the same rows one by one."""
    model = opened(tiny_llama, dtype="float32")
    shard = random_shard(skip=request.param)
    rows = by_metric(Damage(shard=shard, lookahead=1, draws=3, seed=5)(model))
    return model, rows, list(shard.batches(1))


def without(model: LanguageModel, batch: Batch) -> dict[int, list[torch.Tensor]]:
    states = {}
    for layer in range(3):
        with model.without((layer,)):
            states[layer] = traced(model, batch)[1]
    return states


@torch.no_grad()
def test_distances_are_those_of_passes_without_a_layer(seen: Seen) -> None:
    model, rows, batches = seen
    for row, batch in enumerate(batches):
        observed = torch.from_numpy(batch.observed[0])
        whole = traced(model, batch)[1]
        changed = without(model, batch)
        for layer in range(3):
            for m in (0, 1):
                at = min(layer + m, 2) + 1
                x = whole[at][0]
                other = changed[layer][at][0]
                distances = {
                    f"propagated_{m}": (other - x).norm(dim=-1) / x.norm(dim=-1),
                    f"propagated_cosine_{m}": 1 - torch.cosine_similarity(other, x, dim=-1),
                }
                for metric, values in distances.items():
                    measured = rows[metric, layer, None]
                    assert measured.samples[row] == pytest.approx(values[observed].sum().item(), rel=1e-3)
                    assert measured.weights[row] == observed.sum()


@torch.no_grad()
def test_blocks_are_all_that_layers_can_form(seen: Seen) -> None:
    model, rows, batches = seen
    blocks = [key for key in rows if key[0] == "block_distance"]
    assert len(blocks) == 6
    for row, batch in enumerate(batches):
        whole = traced(model, batch)[1]
        observed = torch.from_numpy(batch.observed[0])
        for start, end in combinations(range(4), 2):
            cosine = torch.cosine_similarity(whole[start][0], whole[end][0], dim=-1)[observed].double()
            cosine_distance = (1 - cosine).sum().item()
            angle = (cosine.arccos() / torch.pi).sum().item()
            block = tuple(range(start, end))
            assert rows["block_cosine", start, block].samples[row] == pytest.approx(cosine_distance, abs=1e-4)
            assert rows["block_distance", start, block].samples[row] == pytest.approx(angle, rel=1e-3)


def test_projections_are_those_of_autograd(seen: Seen) -> None:
    model, rows, batches = seen
    for row, batch in enumerate(batches):
        with torch.no_grad():
            changed = without(model, batch)
        last, whole = traced(model, batch)
        seeds = model.loss_gradients(last.detach(), batch, draws=3, seed=5)
        gradients = [torch.autograd.grad(last, whole, seed, retain_graph=True) for seed in seeds]
        for layer in range(3):
            for m in (0, 1):
                at = min(layer + m, 2) + 1
                change = changed[layer][at] - whole[at]
                products = [(gradient[at] * change)[0].sum(dim=-1).double() for gradient in gradients]
                second = sum(product.square().sum().item() for product in products[1:]) / 6
                expected = {
                    "taylor": products[0].abs().sum().item(),
                    "taylor_signed": products[0].sum().item(),
                    "fisher": second,
                    "predicted": products[0].sum().item() + second,
                }
                size = expected["taylor"]
                for metric, value in expected.items():
                    measured = rows[f"{metric}_{m}", layer, None]
                    assert measured.samples[row] == pytest.approx(value, rel=1e-3, abs=1e-3 * size)
                    assert measured.weights[row] == predicted(batch).sum()


def test_the_gradients_are_those_of_the_loss(tiny_llama: Path) -> None:
    model = opened(tiny_llama, dtype="float32")
    for batch in random_shard(skip=2).batches(2):
        hidden = model.hidden_states(batch).detach().requires_grad_()
        logits = model.module.lm_head(hidden)[:, :-1].transpose(1, 2)
        labels = torch.from_numpy(batch.input_ids[:, 1:]).long()
        counted = torch.from_numpy(predicted(batch))
        (cross_entropy(logits, labels, reduction="none") * counted).sum().backward()
        (gradient,) = model.loss_gradients(hidden.detach(), batch)
        assert hidden.grad is not None
        torch.testing.assert_close(gradient, hidden.grad)


def test_labels_are_drawn_from_the_prediction() -> None:
    """Of a model that knows two tokens alone."""
    logits = torch.full((1, 100), -30.0)
    logits[0, 7] = np.log(0.25)
    logits[0, 50] = np.log(0.75)
    batch = Batch(
        input_ids=np.array([[1, 2]], np.int32),
        attention_mask=np.ones((1, 2), np.bool_),
        observed=np.ones((1, 2), np.bool_),
    )
    drawn = draw_labels(logits, torch.from_numpy(uniform_numbers(batch, 2000, seed=0))[:, 0])
    share = (drawn == 50).double().mean().item()
    assert share == pytest.approx(0.75, abs=0.05)  # 5 standard errors
    assert (drawn == 7).double().mean().item() == pytest.approx(1 - share)


def test_draws_depend_on_the_row_and_the_seed_alone() -> None:
    shard = random_shard()
    alone = [uniform_numbers(batch, 2, 9) for batch in shard.batches(1)]
    (together,) = [uniform_numbers(batch, 2, 9) for batch in shard.batches(5)]
    for row, numbers in enumerate(alone):
        assert np.array_equal(together[:, row, : numbers.shape[2]], numbers[:, 0])
        assert not together[:, row, numbers.shape[2] :].any()
    assert not np.array_equal(together, uniform_numbers(next(shard.batches(5)), 2, 10))
    assert not np.array_equal(together[0], together[1])


def test_layers_that_are_left_out_take_no_part(tiny_llama: Path) -> None:
    model = opened(tiny_llama, dtype="float32")
    shard = random_shard()
    assert {row.layer for row in Gradients(shard)(model, NO_INTERVENTION.without(1))} == {0, 2}
    rows = by_metric(Damage(shard=shard, lookahead=1, draws=1)(model, NO_INTERVENTION.without(1)))
    assert {layer for _, layer, _ in rows} == {0, 2}
    assert {block for metric, _, block in rows if metric == "block_distance"} == {(0,), (2,), (0, 2)}
    (batch, *_) = shard.batches(2)
    with torch.no_grad(), model.without((1,)):
        whole = traced(model, batch)[1]
        with model.without((0,)):
            changed = traced(model, batch)[1]
    relative = (changed[3] - whole[3]).norm(dim=-1) / whole[3].norm(dim=-1)
    assert rows["propagated_1", 0, None].samples[:2] == pytest.approx(relative.sum(dim=1).tolist(), rel=1e-3)


def test_the_prediction_is_the_loss_of_a_small_change(tiny_llama: Path) -> None:
    """A layer that hardly does anything: its removal is what the first and second order say."""
    model = opened(tiny_llama, dtype="float32")
    shard = random_shard()
    layer = model.layers[1].module
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(1e-2)
        layer.mlp.down_proj.weight.mul_(1e-2)
    rows = by_metric(Damage(shard=shard, draws=4)(model))
    whole = TextLoss(shard)(model)[0].samples
    left_out = TextLoss(shard)(model, NO_INTERVENTION.without(1))[0].samples
    predicted_nats = rows["predicted_0", 1, None].samples
    assert predicted_nats.sum() == pytest.approx((left_out - whole).sum(), rel=0.1, abs=1e-4)


def test_the_estimate_is_that_of_plain_autograd(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    shard = random_shard()
    rows = by_metric(Gradients(shard)(model))
    for row, batch in enumerate(shard.batches(1)):
        last, states = traced(model, batch)
        logits = model.module.lm_head(last)[0, :-1]
        labels = torch.from_numpy(batch.input_ids[0, 1:]).long()
        loss = cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, states[1:])
        for layer, gradient in enumerate(gradients):
            update = states[layer + 1] - states[layer]
            expected = (gradient * update).sum(dim=-1).abs().sum().item()
            assert rows["taylor", layer, None].samples[row] == pytest.approx(expected, rel=1e-4)
            assert rows["taylor", layer, None].weights[row] == len(labels)


def test_norms_are_those_of_the_mean_loss(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    shard = random_shard(rows=2)
    rows = by_metric(Gradients(shard)(model))
    ids = torch.from_numpy(shard.input_ids).long()
    model.module(input_ids=ids, labels=ids).loss.backward()
    for layer in model.layers:
        weights = [weight for weight in layer.module.parameters() if weight.dim() == 2]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert len(gradients) == len(weights) == len(matrices(layer.module)) == 7
        norms = {
            "gradient_l1": [gradient.abs().sum() for gradient in gradients],
            "gradient_l2": [gradient.square().sum().sqrt() for gradient in gradients],
            "weight_frobenius": [torch.linalg.matrix_norm(weight) for weight in weights],
        }
        for metric, values in norms.items():
            row = rows[metric, layer.index, None]
            assert row.samples == pytest.approx([sum(value.item() for value in values)], rel=1e-4)
            assert row.weights.tolist() == [1]


def test_hooks_of_both_passes_ask_no_device_for_a_value(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value for each matrix would be hundreds of waits a batch."""
    expected = [row.samples.tolist() for row in Gradients(random_shard())(opened(tiny_llama))]
    for name in ("call", "_remove", "accumulate"):
        hook = getattr(gradient_pass.LayerGradients, name)

        def guarded(*args: Any, _hook: Callable[..., Any] = hook) -> Any:
            with NoWaiting():
                return _hook(*args)

        monkeypatch.setattr(gradient_pass.LayerGradients, name, guarded)
    assert [row.samples.tolist() for row in Gradients(random_shard())(opened(tiny_llama))] == expected


FAMILIES = ("llama", "gemma3_text", "qwen2_moe", "gpt2", "falcon", "opt", "mamba", "bloom")


def assert_no_trace(model: LanguageModel, required: dict[str, bool], weights: dict[str, torch.Tensor]) -> None:
    """The same weights require gradients, none has one or has changed, and no hook is left."""
    for name, parameter in model.module.named_parameters():
        assert parameter.requires_grad == required[name]
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, weights[name])
    for module in model.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        if module is not model.module.get_output_embeddings():
            assert "forward" not in vars(module)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_and_no_trace(name: str, save_checkpoint: Callable[[Any, Path], Path], tmp_path: Path) -> None:
    model = opened(save_checkpoint(tiny_model("causal", name), tmp_path / name))
    shard = random_shard()
    next(model.module.parameters()).requires_grad_(False)
    required = {key: parameter.requires_grad for key, parameter in model.module.named_parameters()}
    weights = {key: value.clone() for key, value in model.module.state_dict().items()}
    before = TextLoss(shard)(model)[0].samples
    layers = len(model.layers)
    blocks = layers * (layers + 1) // 2
    rounded = [layer for layer in model.layers if layer.projections]
    places = len(rounded) + sum(len(layer.projections) for layer in rounded)
    measures_and_rows = (
        (Damage(shard=shard, lookahead=2, draws=1), layers * 3 * 6 + 2 * blocks),
        (Gradients(shard), 4 * layers),
        (RoundedLosses(shard, "int4"), 1 + len(rounded)),
    )
    for measure, number in measures_and_rows:
        rows = measure(model)
        assert len(rows) == number
        for row in rows:
            assert np.isfinite(row.samples).all()
        if isinstance(measure, Gradients):
            for row in rows:
                assert (row.samples > 0).all()
        assert_no_trace(model, required, weights)
    damage = RoundingDamage(shard=shard, formats=("int4", "fp8"), draws=1)(model)
    assert len({row.rounding for row in damage}) == 2 * places
    for row in damage:
        assert np.isfinite(row.samples).all()
    assert_no_trace(model, required, weights)
    assert np.array_equal(TextLoss(shard)(model)[0].samples, before)
