"""Sublayers are measured where they are added to the residual stream, behind norms, convolutions and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.capabilities import YES, read_table
from support.families import tiny_model
from support.tiers import all_of

from avss_dist.models.checkpoint.loading import Backbone, forward_function, open_module, quiet
from avss_dist.models.structure import find as structure
from avss_dist.models.structure.additions import Trace, tap_addition, transforms_outputs
from avss_dist.models.structure.layers import PROBE_SHAPE, Layer, Tap, as_rows, probe_tokens
from avss_dist.models.watching import captured

SCALE = 0.22
TRANSFORMING = [
    ("causal", "afmoe"),
    ("causal", "exaone4"),
    ("causal", "flex_olmo"),
    ("causal", "gemma2"),
    ("causal", "gemma3_text"),
    ("causal", "gemma4_text"),
    ("causal", "glm4"),
    ("causal", "inkling_text"),
    ("causal", "kolibri1"),
    ("causal", "lfm3"),
    ("causal", "minicpm3"),
    ("causal", "olmo2"),
    ("causal", "olmo3"),
    ("causal", "olmo_hybrid"),
    ("image-text", "exaone4_5"),
    ("image-text", "gemma3"),
    ("image-text", "glm4v"),
    ("image-text", "glm_ocr"),
    ("image-text", "granite_docling"),
    ("image-text", "muse_glimmer"),
    ("masked", "esmc"),
]
"""Families that add the transformed outputs of one attention and one MLP, and nothing else."""
CONFIGURED: list[tuple[str, str, dict[str, Any]]] = [
    ("causal", "granite", {"residual_multiplier": SCALE}),
    ("causal", "granitemoe", {"residual_multiplier": SCALE}),
    ("causal", "hyperclovax", {"residual_multiplier": SCALE}),
    ("causal", "hyperclovax", {"use_post_norm": False}),
    ("image-text", "chameleon", {"swin_norm": True}),
    ("image-text", "granite4_vision", {"residual_multiplier": SCALE}),
    ("image-text", "molmo2", {"norm_after": True}),
    ("masked", "esmc", {"num_hidden_layers": 36}),
]
"""Settings of families that transform outputs by some of them, or by others do not."""
TRANSFORMING_CASES: list[tuple[str, str, dict[str, Any]]] = [(kind, family, {}) for kind, family in TRANSFORMING]
CASES = TRANSFORMING_CASES + CONFIGURED
IN_THE_DEFAULT_TIER = ("gemma2", "olmo2", "minicpm3", "esmc")
DEFAULT_CASES = [case for case in TRANSFORMING_CASES if case[1] in IN_THE_DEFAULT_TIER] + CONFIGURED[:1]


def opened(kind: str, family: str, **changes: Any) -> Backbone:
    with quiet():
        return open_module(tiny_model(kind, family, **changes))


def added(layer: Layer, call: dict[str, Any]) -> torch.Tensor:
    """Sum of what the sites of a layer say that its sublayers add."""
    taps = {site: layer.taps[site] for site in ("attention", "mlp")}
    return sum(rows(tap, tap.scaled(call[site].output)) for site, tap in taps.items())  # type: ignore[return-value]


def rows(place: Tap | Layer, x: torch.Tensor) -> torch.Tensor:
    return as_rows(x, place.axes, *PROBE_SHAPE).double()


@pytest.mark.parametrize(("kind", "family", "changes"), all_of(CASES, DEFAULT_CASES))
def test_sublayers_add_what_the_layer_adds(kind: str, family: str, changes: dict[str, Any]) -> None:
    backbone = opened(kind, family, **changes)
    for layer in backbone.layers:
        modules = {site: layer.taps[site].module for site in ("attention", "mlp")}
        with torch.no_grad(), captured({**modules, "block": layer.module}) as calls:
            forward_function(backbone.module)(probe_tokens(), None)
        update = rows(layer, calls["block"].output) - rows(layer, calls["block"].input)
        error = (added(layer, calls) - update).norm() / update.norm()
        assert error < 1e-5, layer.name


Place = tuple[str, float]
PLACES: list[tuple[str, Place, Place, dict[str, Any]]] = [
    ("llama", ("self_attn", 1), ("mlp", 1), {}),
    ("bert", ("attention.output.dense", 1), ("output.dense", 1), {}),
    ("gpt_neox", ("attention", 1), ("mlp", 1), {}),
    ("beam", ("post_attention_layernorm", 4**-0.5), ("post_feedforward_layernorm", 5**-0.5), {}),
    ("falcon_h1", ("mamba", SCALE), ("feed_forward", 1), {"ssm_out_multiplier": SCALE}),
    ("gemma3n_text", ("post_attention_layernorm", 1), ("post_feedforward_layernorm", 1), {}),
    ("granitemoehybrid", ("self_attn", SCALE), ("block_sparse_moe", SCALE), {"residual_multiplier": SCALE}),
    ("inkling2_text", ("post_attention_convolution", 1), ("post_mlp_convolution", 1), {}),
    ("minimax", ("self_attn", 1), ("mlp", SCALE), {"mlp_beta_factor": SCALE}),
    ("zamba2", ("shared_transformer.self_attn", 1), ("shared_transformer.feed_forward", 1), {}),
]
"""Families whose layers add more than the outputs of two sublayers, or scale the stream, and others that add them as
they are: places and scales of the attention and of the MLP of layer 1, and settings."""


@pytest.mark.parametrize(("family", "attention", "mlp", "changes"), all_of(PLACES, [*PLACES[:2], PLACES[-3]]))
def test_where_and_how_much_of_an_output_is_added(
    family: str, attention: Place, mlp: Place, changes: dict[str, Any]
) -> None:
    layer = opened("causal", family, **changes).layers[1]
    paths = {module: path for path, module in layer.module.named_modules()}
    for site, (path, scale) in (("attention", attention), ("mlp", mlp)):
        tap = layer.taps[site]
        assert paths[tap.module] == path
        assert float(tap.scaled(torch.ones(()))) == pytest.approx(scale)


def moved_taps(monkeypatch: pytest.MonkeyPatch, kind: str, family: str, **changes: Any) -> bool:
    """Whether a tap of the model is elsewhere than at the output of a sublayer, or scaled."""
    moved = []

    def note(trace: Trace, tap: Tap) -> Tap:
        moved.append(tap_addition(trace, tap) is not tap)
        return tap

    monkeypatch.setattr(structure, "tap_addition", note)
    opened(kind, family, **changes)
    return any(moved)


EVERY = [(row.kind, row.family, {}) for row in read_table() if row.scored == YES]


@pytest.mark.parametrize(
    ("kind", "family", "changes"),
    all_of(
        [*EVERY, *CONFIGURED, *((("causal", family, changes)) for family, _, _, changes in PLACES if changes)],
        [("causal", "llama", {}), ("causal", "granite", {}), ("causal", "gemma2", {}), CONFIGURED[0]],
    ),
)
def test_ids_know_which_families_are_measured_elsewhere(
    kind: str, family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_model(kind, family, **changes).config
    assert transforms_outputs(config) == moved_taps(monkeypatch, kind, family, **changes)
