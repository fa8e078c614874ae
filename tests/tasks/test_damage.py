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
from support.tiers import all_of
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


def states_of(model: LanguageModel, batch: Batch) -> list[torch.Tensor]:
    """Return the hidden states before the first layer and after each."""
    _, states = traced(model, batch)
    return states


def reached_by(layer: int, lookahead: int) -> int:
    """Return the state in which the removal of a layer is looked at: some layers later, or after the last one."""
    return min(layer + lookahead, 2) + 1


@pytest.fixture(scope="module", params=[0, 4], ids=["every token", "skipped tokens"])
def seen(request: pytest.FixtureRequest, tiny_llama: Path) -> Seen:
    """What damage says of rows in batches of two, and the same rows one by one."""
    model = opened(tiny_llama, dtype="float32")
    shard = random_shard(skip=request.param)
    rows = by_metric(Damage(shard=shard, lookahead=1, draws=3, seed=5)(model))
    return model, rows, list(shard.batches(1))


def without(model: LanguageModel, batch: Batch) -> dict[int, list[torch.Tensor]]:
    states = {}
    """Return the hidden states without each layer."""
    for layer in range(3):
        with model.without((layer,)):
            states[layer] = states_of(model, batch)
    return states


@torch.no_grad()
def test_distances_are_those_of_passes_without_a_layer(seen: Seen) -> None:
    model, rows, batches = seen
    for row, batch in enumerate(batches):
        observed = torch.from_numpy(batch.observed[0])
        whole = states_of(model, batch)
        changed = without(model, batch)
        for layer in range(3):
            for lookahead in (0, 1):
                state = reached_by(layer, lookahead)
                x = whole[state][0, observed]
                other = changed[layer][state][0, observed]
                relative = (other - x).norm(dim=-1) / x.norm(dim=-1)
                similarity = torch.cosine_similarity(other, x, dim=-1)
                propagated = rows[f"propagated_{lookahead}", layer, None]
                propagated_cosine = rows[f"propagated_cosine_{lookahead}", layer, None]
                assert propagated.samples[row] == pytest.approx(relative.sum().item(), rel=1e-3)
                assert propagated_cosine.samples[row] == pytest.approx((1 - similarity).sum().item(), rel=1e-3)
                assert propagated.weights[row] == observed.sum()
                assert propagated_cosine.weights[row] == observed.sum()


@torch.no_grad()
def test_blocks_are_all_that_layers_can_form(seen: Seen) -> None:
    model, rows, batches = seen
    blocks = [key for key in rows if key[0] == "block_distance"]
    assert len(blocks) == 6
    for row, batch in enumerate(batches):
        observed = torch.from_numpy(batch.observed[0])
        whole = [state[0, observed] for state in states_of(model, batch)]
        for start, end in combinations(range(4), 2):
            cosine = torch.cosine_similarity(whole[start], whole[end], dim=-1).double()
            cosine_distance = (1 - cosine).sum()
            angle = cosine.arccos().sum() / torch.pi
            block = tuple(range(start, end))
            block_cosine = rows["block_cosine", start, block]
            block_distance = rows["block_distance", start, block]
            assert block_cosine.samples[row] == pytest.approx(cosine_distance.item(), abs=1e-4)
            assert block_distance.samples[row] == pytest.approx(angle.item(), rel=1e-3)


def test_projections_are_those_of_autograd(seen: Seen) -> None:
    model, rows, batches = seen
    for row, batch in enumerate(batches):
        with torch.no_grad():
            changed = without(model, batch)
        last, whole = traced(model, batch)
        seeds = model.loss_gradients(last.detach(), batch, draws=3, seed=5)
        gradients = [torch.autograd.grad(last, whole, seed, retain_graph=True) for seed in seeds]
        for layer in range(3):
            for lookahead in (0, 1):
                state = reached_by(layer, lookahead)
                change = changed[layer][state] - whole[state]
                of_loss, *of_draws = [(gradient[state] * change)[0].sum(dim=-1).double() for gradient in gradients]
                first = of_loss.sum().item()
                second = torch.stack(of_draws).square().sum().item() / 6
                size = of_loss.abs().sum().item()
                expected = {"taylor": size, "taylor_signed": first, "fisher": second, "predicted": first + second}
                for metric, value in expected.items():
                    measured = rows[f"{metric}_{lookahead}", layer, None]
                    assert measured.samples[row] == pytest.approx(value, rel=1e-3, abs=1e-3 * size)
                    assert measured.weights[row] == predicted(batch).sum()


def test_the_gradients_are_those_of_the_loss(tiny_llama: Path) -> None:
    model = opened(tiny_llama, dtype="float32")
    for batch in random_shard(skip=2).batches(2):
        hidden = model.hidden_states(batch).detach().requires_grad_()
        logits = model.module.lm_head(hidden)[:, :-1].transpose(1, 2)
        labels = torch.from_numpy(batch.input_ids[:, 1:]).long()
        is_predicted = torch.from_numpy(predicted(batch))
        losses = cross_entropy(logits, labels, reduction="none")
        (losses * is_predicted).sum().backward()
        (gradient,) = model.loss_gradients(hidden.detach(), batch)
        assert hidden.grad is not None
        torch.testing.assert_close(gradient, hidden.grad)


def test_labels_are_drawn_from_the_prediction() -> None:
    """Of a model that knows two tokens alone."""
    logits = torch.full((1, 100), -30.0)
    logits[0, 7] = np.log(0.25)
    logits[0, 50] = np.log(0.75)
    every_token = np.ones((1, 2), np.bool_)
    batch = Batch(input_ids=np.array([[1, 2]], np.int32), attention_mask=every_token, observed=every_token)
    numbers = torch.from_numpy(uniform_numbers(batch, 2000, seed=0))
    drawn = draw_labels(logits, numbers[:, 0]).flatten().tolist()
    share = drawn.count(50) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.05)  # 5 standard errors
    assert drawn.count(7) == len(drawn) - drawn.count(50)


def test_draws_depend_on_the_row_and_the_seed_alone() -> None:
    shard = random_shard()
    alone = [uniform_numbers(batch, 2, 9) for batch in shard.batches(1)]
    (together,) = [uniform_numbers(batch, 2, 9) for batch in shard.batches(5)]
    for row, numbers in enumerate(alone):
        assert np.array_equal(together[:, row, : numbers.shape[2]], numbers[:, 0])
        assert not together[:, row, numbers.shape[2] :].any()
    (of_another_seed,) = [uniform_numbers(batch, 2, 10) for batch in shard.batches(5)]
    assert not np.array_equal(together, of_another_seed)
    assert not np.array_equal(together[0], together[1])


def test_layers_that_are_left_out_take_no_part(tiny_llama: Path) -> None:
    model = opened(tiny_llama, dtype="float32")
    shard = random_shard()
    without_one = NO_INTERVENTION.without(1)
    gradients = Gradients(shard)(model, without_one)
    assert {row.layer for row in gradients} == {0, 2}
    rows = by_metric(Damage(shard=shard, lookahead=1, draws=1)(model, without_one))
    assert {layer for _, layer, _ in rows} == {0, 2}
    assert {block for metric, _, block in rows if metric == "block_distance"} == {(0,), (2,), (0, 2)}
    (batch, *_) = shard.batches(2)
    with torch.no_grad(), model.without((1,)):
        *_, whole = states_of(model, batch)
        with model.without((0,)):
            *_, changed = states_of(model, batch)
    relative = (changed - whole).norm(dim=-1) / whole.norm(dim=-1)
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
    whole, *_ = TextLoss(shard)(model)
    left_out, *_ = TextLoss(shard)(model, NO_INTERVENTION.without(1))
    increase = (left_out.samples - whole.samples).sum()
    assert rows["predicted_0", 1, None].samples.sum() == pytest.approx(increase, rel=0.1, abs=1e-4)


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
            products = (gradient * update).sum(dim=-1)
            measured = rows["taylor", layer, None]
            assert measured.samples[row] == pytest.approx(products.abs().sum().item(), rel=1e-4)
            assert measured.weights[row] == len(labels)


def test_norms_are_those_of_the_mean_loss(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    shard = random_shard(rows=2)
    rows = by_metric(Gradients(shard)(model))
    ids = torch.from_numpy(shard.input_ids).long()
    model.module(input_ids=ids, labels=ids).loss.backward()
    for layer in model.layers:
        weights = [weight for weight in layer.module.parameters() if weight.dim() == 2]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert len(gradients) == 7
        assert len(weights) == 7
        assert len(matrices(layer.module)) == 7
        sums = {
            "gradient_l1": sum(gradient.abs().sum().item() for gradient in gradients),
            "gradient_l2": sum(gradient.norm().item() for gradient in gradients),
            "weight_frobenius": sum(weight.norm().item() for weight in weights),
        }
        for metric, expected in sums.items():
            row = rows[metric, layer.index, None]
            assert row.samples == pytest.approx([expected], rel=1e-4)
            assert row.weights.tolist() == [1]


def test_hooks_of_both_passes_ask_no_device_for_a_value(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value for each matrix would be hundreds of waits a batch."""
    expected = samples_of_gradients(opened(tiny_llama))
    for name in ("call", "_remove", "accumulate"):
        hook = getattr(gradient_pass.LayerGradients, name)

        def guarded(*args: Any, _hook: Callable[..., Any] = hook) -> Any:
            with NoWaiting():
                return _hook(*args)

        monkeypatch.setattr(gradient_pass.LayerGradients, name, guarded)
    assert samples_of_gradients(opened(tiny_llama)) == expected


def samples_of_gradients(model: LanguageModel) -> list[list[float]]:
    """Return what gradients say of each row of a shard."""
    return [row.samples.tolist() for row in Gradients(random_shard())(model)]


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


@pytest.mark.parametrize("name", all_of(FAMILIES, ["llama", "qwen2_moe", "mamba"]))
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
    maps = sum(len(layer.projections) for layer in rounded)
    places = len(rounded) + maps
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
