"""Damage, gradients and rounding on models of every structure: rows of finite numbers, and no trace left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import opened, random_shard
from support.families import tiny_model

from avss_dist.models.causal_lm import LanguageModel
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.text_loss import TextLoss

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
        assert module is model.module.get_output_embeddings() or "forward" not in vars(module)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_and_no_trace(name: str, save_checkpoint: Callable[[Any, Path], Path], tmp_path: Path) -> None:
    model, shard = opened(save_checkpoint(tiny_model("causal", name), tmp_path / name)), random_shard()
    next(model.module.parameters()).requires_grad_(False)
    required = {key: parameter.requires_grad for key, parameter in model.module.named_parameters()}
    weights = {key: value.clone() for key, value in model.module.state_dict().items()}
    before = TextLoss(shard)(model)[0].samples
    layers = len(model.layers)
    blocks = layers * (layers + 1) // 2
    rounded = [layer for layer in model.layers if layer.projections]
    places = len(rounded) + sum(len(layer.projections) for layer in rounded)
    for measure, number in (
        (Damage(shard=shard, lookahead=2, draws=1), layers * 3 * 6 + 2 * blocks),
        (Gradients(shard), 4 * layers),
        (RoundedLosses(shard, "int4"), 1 + len(rounded)),
    ):
        rows = measure(model)
        assert len(rows) == number
        assert all(np.isfinite(row.samples).all() for row in rows)
        if isinstance(measure, Gradients):
            assert all((row.samples > 0).all() for row in rows)
        assert_no_trace(model, required, weights)
    damage = RoundingDamage(shard=shard, formats=("int4", "fp8"), draws=1)(model)
    assert len({row.rounding for row in damage}) == 2 * places
    assert all(np.isfinite(row.samples).all() for row in damage)
    assert_no_trace(model, required, weights)
    assert np.array_equal(TextLoss(shard)(model)[0].samples, before)
