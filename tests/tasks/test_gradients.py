"""Gradients: removal estimates and norms against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import opened, random_shard
from support.waiting import NoWaiting

from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.tasks import backward as gradient_pass
from avss_dist.tasks.backward import Gradients, matrices
from avss_dist.tasks.task import Row


def by_metric(rows: list[Row]) -> dict[tuple[str, int | None], Row]:
    return {(row.metric, row.layer): row for row in rows}


def traced(model: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The summed loss of one row, with autograd's graph, and the hidden states between layers."""
    hidden = model.module(input_ids=ids[None], output_hidden_states=True).hidden_states
    states: list[torch.Tensor] = [hidden[0]]
    hooks = [
        layer.module.register_forward_hook(lambda module, args, output: states.append(output)) for layer in model.layers
    ]
    logits = model.module(input_ids=ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return loss, states


def test_the_estimate_is_that_of_plain_autograd(tiny_llama: Path) -> None:
    model, shard = opened(tiny_llama), random_shard()
    found = by_metric(Gradients(shard)(model))
    for row, length in enumerate(shard.lengths):
        loss, states = traced(model, torch.from_numpy(shard.input_ids[row, :length]).long())
        gradients = torch.autograd.grad(loss, states[1:])
        for layer, gradient in enumerate(gradients):
            update = states[layer + 1] - states[layer]
            expected = (gradient * update).sum(dim=-1).abs().sum().item()
            assert found["taylor", layer].samples[row] == pytest.approx(expected, rel=1e-4)
            assert found["taylor", layer].weights[row] == length - 1


def test_norms_are_those_of_the_mean_loss(tiny_llama: Path) -> None:
    model, shard = opened(tiny_llama), random_shard(rows=2)
    found = by_metric(Gradients(shard)(model))
    ids = torch.from_numpy(shard.input_ids).long()
    model.module(input_ids=ids, labels=ids).loss.backward()
    for layer in model.layers:
        weights = [weight for weight in layer.module.parameters() if weight.dim() == 2]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        assert len(gradients) == len(weights) == len(matrices(layer.module)) == 7
        for metric, values in {
            "gradient_l1": [gradient.abs().sum() for gradient in gradients],
            "gradient_l2": [gradient.square().sum().sqrt() for gradient in gradients],
            "weight_frobenius": [torch.linalg.matrix_norm(weight) for weight in weights],
        }.items():
            row = found[metric, layer.index]
            assert row.samples == pytest.approx([sum(value.item() for value in values)], rel=1e-4)
            assert row.weights.tolist() == [1]


def test_a_layer_left_out_has_no_rows(tiny_llama: Path) -> None:
    rows = Gradients(random_shard())(opened(tiny_llama), NO_INTERVENTION.without(1))
    assert {row.layer for row in rows} == {0, 2}


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
