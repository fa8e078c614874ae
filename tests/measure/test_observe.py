"""Observation: every field against numpy over captured activations; no trace left; masked tokens count for nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama
from support.families import tiny_model
from support.observing import observe
from support.oracle import assert_close, counted_by, oracle_stats
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.sites import INPUTS, SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.models.checkpoint.loading import Backbone, forward_function, open_module
from avss_dist.models.structure.layers import Layer
from avss_dist.stats.layer_stats import LayerKey, LayerStats, merge_strata, share_of_m2

GRID = np.array(THRESHOLDS)
ROWS = 3
TOKENS = 11
FULL = torch.ones(ROWS, TOKENS, dtype=torch.bool)


# By family: its layers, and inside a layer which module's output is the attention's and the MLP's update.
FAMILIES = {
    "llama": ("layers", "self_attn", "mlp", "mlp.down_proj"),
    "gpt2": ("h", "attn", "mlp", "mlp.c_proj"),
    "bert": ("encoder.layer", "attention.output.dense", "output.dense", "output.dense"),
    "bloom": ("h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),  # sublayers add the residual
    "opt": ("decoder.layers", "self_attn", "fc2", "fc2"),  # two linear maps of the layer, on flattened tokens
    "gemma2": ("layers", "post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj"),
}


def build(family: str) -> Any:
    return llama() if family == "llama" else tiny_model("masked" if family == "bert" else "causal", family)


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 120, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def opened(model: Any, dtype: torch.dtype = torch.float32) -> Backbone:
    return open_module(model.eval().to(dtype))


def observed(
    backbone: Backbone, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], sites: Sequence[str] = SITES
) -> dict[LayerKey, LayerStats]:
    """Statistics of (token ids, mask) batches."""
    run = forward_function(backbone.module)
    with observe(backbone.layers, sites, THRESHOLDS) as observer, torch.no_grad():
        for ids, mask in batches:
            with observer.batch(mask.numpy()):
                run(ids, mask.long())
    return merge_strata(observer.strata())


def captured(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor, *paths: str) -> dict[LayerKey, dict[str, Any]]:
    """The raw activations of one pass as oracle arguments, taken with hooks of the test's own."""
    list_path, attention, mlp, down = paths
    layers = backbone.module.get_submodule(list_path)
    taken: dict[LayerKey, dict[str, torch.Tensor]] = {}
    handles = []

    def first(value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else value[0]

    def take(key: LayerKey, part: str, which: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = first(args) if args else kwargs["hidden_states"]
            value = (given if which == "input" else first(output)).detach().clone()
            taken.setdefault(key, {})[part] = value.reshape(ROWS, TOKENS, -1)

        return hook

    for i, layer in enumerate(layers):
        points = (
            (layer, "block", "before", "input"),
            (layer, "block", "x", "output"),
            (layer.get_submodule(attention), "attention", "x", "output"),
            (layer.get_submodule(mlp), "mlp", "x", "output"),
            (layer.get_submodule(down), "neuron", "x", "input"),
        )
        for module, site, part, which in points:
            handles.append(module.register_forward_hook(take((i, site), part, which), with_kwargs=True))
    with torch.no_grad():
        forward_function(backbone.module)(ids, mask.long())
    for handle in handles:
        handle.remove()
    for i in range(len(layers)):
        update = taken[i, "block"]["x"] - taken[i, "block"]["before"]
        taken[i, "update"] = {"x": update}
    arrays = {}
    for key, parts in taken.items():
        arrays[key] = {name: tensor.double().numpy() for name, tensor in parts.items()}
    return arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_every_site_equals_numpy(family: str, dtype: torch.dtype) -> None:
    backbone = opened(build(family), dtype)
    stats = observed(backbone, [(token_ids(), FULL)])
    raw = captured(backbone, token_ids(), FULL, *FAMILIES[family])
    assert stats.keys() == raw.keys()
    for (layer, site), activations in raw.items():
        units = site in ("block", "update")
        activations |= {"units": units, "by": counted_by(dtype), "first_tokens": site == "block"}
        expected = oracle_stats(mask=FULL.numpy(), thresholds=GRID, **activations)
        assert_close(stats[layer, site], expected, rtol=1e-9, angle_atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_is_counted_as_it_is_multiplied_and_added(dtype: torch.dtype) -> None:
    multiplier = 0.22
    backbone = opened(tiny_model("causal", "granite", residual_multiplier=multiplier), dtype)
    mlp = observed(backbone, [(token_ids(), FULL)], ["mlp"])[1, "mlp"]
    output = captured(backbone, token_ids(), FULL, "layers", "self_attn", "mlp", "mlp.down_proj")[1, "mlp"]["x"]
    added = (torch.from_numpy(output).to(dtype) * multiplier).double().numpy()
    expected = oracle_stats(added, mask=FULL.numpy(), thresholds=GRID, by=counted_by(dtype))
    assert_close(mlp, expected, rtol=1e-9, angle_atol=1e-7)


def test_first_tokens_are_the_first_that_count_in_each_row_of_each_batch() -> None:
    backbone = opened(llama())
    masks = [FULL.clone(), FULL]
    masks[0][0, :2] = masks[0][1, :5] = masks[0][2] = False
    batches = [(token_ids(seed), mask) for seed, mask in enumerate(masks)]
    stats = observed(backbone, batches, ["block"])
    for layer in range(3):
        x = [captured(backbone, ids, mask, *FAMILIES["llama"])[layer, "block"]["x"] for ids, mask in batches]
        first = np.concatenate([x[0][0, 2], x[0][1, 5], *x[1][:, 0]])
        block = stats[layer, "block"]
        assert block.first_count == first.size
        assert block.first_mean == pytest.approx(first.mean(), rel=1e-6)
        share = ((first - block.mean) ** 2).sum() / block.m2
        part = block.first_count, block.first_mean, block.first_m2
        assert share_of_m2(part, block.mean, block.m2) == pytest.approx(share, rel=1e-6)
        assert 0 < share < 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    """Whatever stands in the padding, the statistics are those of the tokens that are real, on either side."""
    backbone = opened(llama())
    mask = FULL.clone()
    mask[1, : TOKENS // 2] = mask[2, : TOKENS - 2] = False
    mask = mask if side == "left" else mask.flip(1)
    first = token_ids()
    second = torch.where(mask, token_ids(), token_ids(1))
    stats = observed(backbone, [(first, mask)])
    for key, expected in observed(backbone, [(second, mask)]).items():
        assert stats[key].equals(expected)
    assert stats[0, "block"].count == int(mask.sum()) * 32
    raw = captured(backbone, first, mask, *FAMILIES["llama"])
    expected = oracle_stats(mask=mask.numpy(), thresholds=GRID, units=True, first_tokens=True, **raw[1, "block"])
    assert_close(stats[1, "block"], expected, rtol=1e-9, angle_atol=1e-7)


def test_a_fully_masked_batch_and_passes_outside_add_nothing() -> None:
    backbone = opened(llama())
    empty = torch.zeros_like(FULL)
    once = observed(backbone, [(token_ids(), FULL)])
    with observe(backbone.layers, SITES, THRESHOLDS) as observer, torch.no_grad():
        run = forward_function(backbone.module)
        run(token_ids(2), None)
        with observer.batch(empty.numpy()):
            run(token_ids(1), None)
        with observer.batch(FULL.numpy()):
            run(token_ids(), FULL.long())
            backbone.layers[0].taps["mlp"].module(torch.ones(ROWS, TOKENS, 32))
        run(token_ids(3), None)
    for key, stats in merge_strata(observer.strata()).items():
        assert once[key].equals(stats)
    assert observed(backbone, [(token_ids(), empty)]) == {}


def test_batches_add_up() -> None:
    """Two batches in one observation are the two observations merged."""
    backbone = opened(llama(), torch.bfloat16)
    both = observed(backbone, [(token_ids(0), FULL), (token_ids(1), FULL)])
    first = observed(backbone, [(token_ids(0), FULL)])
    second = observed(backbone, [(token_ids(1), FULL)])
    for key, stats in both.items():
        assert_close(stats, first[key].merge(second[key]), rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_leave_no_trace(family: str) -> None:
    """Logits are bit-identical; no hook, no gradient and no changed weight is left, after a failure neither."""
    model = build(family).eval()
    weights = copy.deepcopy(model.state_dict())
    ids = token_ids()

    def output() -> torch.Tensor:
        with torch.no_grad():
            return model(ids)[0]

    before = output()
    backbone = open_module(model)
    with observe(backbone.layers, SITES, THRESHOLDS) as observer, observer.batch(np.ones(ids.shape, bool)):
        assert torch.equal(output(), before)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        observe(backbone.layers, SITES, THRESHOLDS) as failing,
        failing.batch(np.ones(ids.shape, bool)),
    ):
        output()
        raise RuntimeError("on purpose")
    assert torch.equal(output(), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert parameter.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_hooks_of_others_stay() -> None:
    backbone = opened(llama())
    calls: list[str] = []
    layer = backbone.layers[0].module
    layer.register_forward_hook(lambda *_: calls.append("theirs"))
    observed(backbone, [(token_ids(), FULL)])
    assert calls == ["theirs"]
    assert len(layer._forward_hooks) == 1


def test_observers_nest() -> None:
    backbone = opened(llama())
    alone = observed(backbone, [(token_ids(), FULL)])
    with observe(backbone.layers, SITES, THRESHOLDS) as outer, outer.batch(FULL.numpy()):
        inner = observed(backbone, [(token_ids(), FULL)])
    for key, stats in alone.items():
        assert stats.equals(inner[key])
    for key, stats in alone.items():
        assert stats.equals(merge_strata(outer.strata())[key])


def test_a_layer_is_concluded_after_its_last_pass() -> None:
    """Its accumulators are given up when no pass is to come, and its statistics are what they are without."""
    backbone = opened(llama())
    run = forward_function(backbone.module)
    accumulators_left = []
    with observe(backbone.layers, SITES, THRESHOLDS, passes=2) as observer, torch.no_grad():
        for seed in range(2):
            with observer.batch(FULL.numpy()):
                run(token_ids(seed), FULL.long())
            accumulators_left.append(len(observer._accumulators))
    assert accumulators_left == [3 * len(SITES), 0]
    expected = observed(backbone, [(token_ids(seed), FULL) for seed in range(2)])
    got = merge_strata(observer.strata())
    assert list(got) == list(expected)
    for key in expected:
        assert got[key].equals(expected[key])


def test_only_the_wanted_sites_are_measured() -> None:
    backbone = opened(llama())
    everything = observed(backbone, [(token_ids(), FULL)])
    for site in SITES:
        alone = observed(backbone, [(token_ids(), FULL)], [site])
        assert set(alone) == {(layer, site) for layer in range(3)}
        for key, stats in alone.items():
            assert stats.equals(everything[key])


def test_the_inputs_of_linear_maps_are_counted_and_summed_by_unit() -> None:
    backbone = opened(llama())
    taken: dict[LayerKey, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in backbone.layers:
            for site, path in (("query_input", "self_attn.v_proj"), ("output_input", "self_attn.o_proj"),
                               ("up_input", "mlp.up_proj"), ("neuron", "mlp.down_proj")):  # fmt: skip
                hook = lambda _m, args, key=(layer.index, site): taken.update({key: args[0].clone()})  # noqa: E731
                stack.callback(layer.module.get_submodule(path).register_forward_pre_hook(hook).remove)
        mask = FULL.clone()
        mask[0, 9:] = False
        stats_of_inputs = observed(backbone, [(token_ids(), mask)], INPUTS)
    assert set(stats_of_inputs) == set(product(range(3), INPUTS))
    for key, stats in stats_of_inputs.items():
        x = taken[key][mask].double().numpy()
        assert stats.count == x.size
        assert stats.unit_sum_sq == pytest.approx((x**2).sum(axis=0), rel=1e-6)
        _, low, high = stats.below(0.5)
        assert low <= (np.abs(x) < 0.5).sum() <= high


class Misbehaving(nn.Module):
    """A stand-in layer that misbehaves in a chosen way."""

    def __init__(self, misbehaviour: str) -> None:
        super().__init__()
        self.misbehaviour = misbehaviour

    def forward(self, x: torch.Tensor) -> Any:
        if self.misbehaviour == "in place":
            x.add_(1)
        changed = {"pads": torch.cat([x, x], 1), "widens": torch.cat([x, x], 2), "nothing": "text"}
        return changed.get(self.misbehaviour, x + 1)


def misbehave(misbehaviour: str) -> dict[LayerKey, LayerStats]:
    """Statistics of a layer that misbehaves; no hook stays."""
    layer = Layer(0, "layers.0", Misbehaving(misbehaviour), 0, "rows", {})
    try:
        with observe([layer], SITES, THRESHOLDS) as observer, observer.batch(np.ones((2, 3), bool)):
            layer.module(torch.ones(2, 3, 4, dtype=torch.float64 if misbehaviour == "float64" else None))
    finally:
        assert not layer.module._forward_hooks
        assert not layer.module._forward_pre_hooks
    return merge_strata(observer.strata())


@pytest.mark.parametrize(
    ("misbehaviour", "said"),
    [
        ("in place", "changes its input in place"),
        ("pads", "pads, pools or extends its rows"),
        ("nothing", "returns a str, no hidden states"),
        ("float64", "computes in torch.float64"),
    ],
)
def test_a_layer_that_cannot_be_counted_is_named(misbehaviour: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        misbehave(misbehaviour)
    assert "layers.0" in str(raised.value)


def test_a_layer_that_widens_its_input_has_no_update() -> None:
    ((key, stats),) = misbehave("widens").items()
    assert key == (0, "block")
    assert stats.count == 2 * 3 * 8
    assert stats.token_count == 0


def test_nonfinite_activations_are_counted_apart() -> None:
    """One weight of a late layer is NaN: its outputs count as non-finite, and in nothing else."""
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 3] = torch.nan
    stats = observed(opened(model), [(token_ids(), FULL)])
    assert stats[0, "block"].nonfinite_count == 0
    broken = stats[1, "mlp"]
    assert broken.nonfinite_count == ROWS * TOKENS
    assert broken.count == ROWS * TOKENS * 31
    assert broken.sequence_count == 0
    assert np.isfinite([broken.mean, broken.m2, broken.max_abs]).all()
    assert stats[1, "block"].token_count == 0
    assert stats[2, "neuron"].count == 0
