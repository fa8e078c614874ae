"""Leaving out the attention or the MLP of a layer alone: what is computed then, and which families refuse it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.causal_lm import opened, random_shard
from support.families import lively, tiny_model
from support.tiers import all_of, nightly

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, joined, layer_of, sublayers_of
from avss_dist.models.layers import first_tensor
from avss_dist.tasks.text_loss import LeaveOneOut, TextLoss

Save = Callable[[Any, Path], Path]
ATTENTION, MLP = sublayers_of([1])
SEQUENTIAL = {
    "llama": ("self_attn", "mlp"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "granite": ("self_attn", "mlp"),
    "qwen3_moe": ("self_attn", "mlp"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}
"""What a layer adds to the stream, by the path of the module that gives it."""


def nothing(_module: Any, _args: Any, output: Any) -> Any:
    added = first_tensor(output)
    assert added is not None
    return torch.zeros_like(added) if output is added else (torch.zeros_like(added), *output[1:])


@pytest.mark.parametrize("family", all_of(SEQUENTIAL, ["llama", "gemma3_text", "opt", "qwen3_moe", "bloom"]))
def test_the_branch_adds_nothing(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """As if its last module gave zeros, to the bit; both are the whole layer; and no trace is left."""
    model, shard = opened(save_checkpoint(lively(tiny_model("causal", family)), tmp_path / family)), random_shard()
    whole, without_layer = (TextLoss(shard)(model, NO_INTERVENTION.without(*drop))[0].samples for drop in ((), (1,)))
    assert not model.obstacles
    for removed, path in zip((ATTENTION, MLP), SEQUENTIAL[family], strict=True):
        hook = model.layers[1].module.get_submodule(path).register_forward_hook(nothing)
        expected = TextLoss(shard)(model)[0].samples
        hook.remove()
        found = TextLoss(shard)(model, NO_INTERVENTION.without(removed))[0].samples
        assert (found == expected).all() and (found != whole).any() and (found != without_layer).any()
    both = TextLoss(shard)(model, Intervention(removed=(ATTENTION, MLP)))[0].samples
    assert (both == without_layer).all() and (TextLoss(shard)(model)[0].samples == whole).all()


@pytest.mark.parametrize("family", ["llama", "bloom", *nightly("gemma2")])
def test_each_in_turn_is_what_leaving_it_out_is(family: str, tmp_path: Path, save_checkpoint: Save) -> None:
    """From kept hidden states, where the family has no more than them, and beside others that are left out."""
    model, shard = opened(save_checkpoint(tiny_model("causal", family), tmp_path / family)), random_shard()
    assert model.resumes == (family != "bloom")
    for drop in ((), (ATTENTION,), (0, MLP)):
        for row in LeaveOneOut(shard, sublayers=True)(model, NO_INTERVENTION.without(*drop)):
            assert row.removed is not None and set(drop) <= {*row.removed, *sublayers_of(map(layer_of, row.removed))}
            assert (row.samples == TextLoss(shard)(model, Intervention(removed=row.removed))[0].samples).all(), (
                drop,
                row.removed,
            )
    assert joined([ATTENTION, MLP]) in [
        row.removed for row in LeaveOneOut(shard, sublayers=True)(model, NO_INTERVENTION.without(ATTENTION))
    ]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        *(("falcon", "side by side"), ("gpt_neox", "side by side")),
        *nightly(*((family, "side by side") for family in ("gptj", "phi", "cohere2"))),
        ("mamba", "no module of the layer is its mlp"),
        ("gemma3n_text", "what layers give on|would still change what it is given"),
    ],
)
def test_families_that_are_refused(family: str, why: str, tmp_path: Path, save_checkpoint: Save) -> None:
    model = opened(save_checkpoint(tiny_model("causal", family), tmp_path / family))
    for removed, named in ((ATTENTION, r"attention\.1"), (MLP, r"mlp\.1")):
        with pytest.raises(ModelError, match=f"{named} cannot be left out alone: .*({why})"):
            TextLoss(random_shard())(model, NO_INTERVENTION.without(removed))
