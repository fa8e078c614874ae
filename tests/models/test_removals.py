"""Leaving out layers: what is computed and generated then, and which families refuse it of a sublayer alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.causal_lm import opened, random_shard
from support.families import lively, tiny_config, tiny_model
from support.tiers import all_of, nightly

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    THRESHOLD,
    Intervention,
    MapSparsity,
    Removal,
    Sparsity,
    Sublayer,
    joined,
    layer_of,
    sublayers_of,
)
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.remaining import remaining_modules
from avss_dist.models.checkpoint.layer_settings import settings_by_layer
from avss_dist.models.forward import RunThrough, changing
from avss_dist.models.structure.layers import first_tensor
from avss_dist.tasks.text_loss import LeaveOneOut, TextLoss

ModelOf = Callable[[str], LanguageModel]
CACHED = ("llama", "gemma3_text", "gemma3", "qwen3", "qwen2", "gpt2", "opt", "mixtral", "qwen3_moe", "mamba", "lfm2")
UNCACHED = ("gemma3n_text", "jamba")  # families whose layers depend on their place
REMOVED: tuple[tuple[Removal, ...], ...] = ((0,), (1,), (0, 2), (1, Sublayer(2, "attention")))
NEW_TOKENS = 20  # more than a sliding window


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable) -> ModelOf:
    models: dict[str, LanguageModel] = {}

    def of_family(family: str) -> LanguageModel:
        if family not in models:
            kind = "image-text" if family == "gemma3" else "causal"
            folder = save_checkpoint(lively(tiny_model(kind, family)), tmp_path_factory.mktemp("models") / family)
            models[family] = opened(folder, dtype="float32")
        return models[family]

    return of_family


def generate(model: LanguageModel, **options: Any) -> torch.Tensor:
    """Greedy continuations of two prompts, the second of which is padded."""
    ids = torch.randint(10, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    tokens: torch.Tensor = model.generate(
        inputs=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    return tokens[:, ids.shape[1] :]


def described(model: LanguageModel) -> Any:
    """All that an intervention could leave behind."""
    modules = []
    integers: list[tuple[str, int]] = []
    for path, module in model.module.named_modules():
        modules.append((path, id(module)))
        integers += [(name, value) for name, value in vars(module).items() if type(value) is int]
    return modules, model.module.config.to_dict(), integers


@pytest.mark.parametrize("family", all_of(CACHED, ["gemma3"]))
def test_the_tokens_are_those_of_skipped_layers_without_a_cache(family: str, model_of: ModelOf) -> None:
    model = model_of(family)
    whole = generate(model)
    before = described(model)
    assert torch.equal(whole, generate(model, use_cache=False))
    for removed in REMOVED:
        if model.obstacles and any(isinstance(part, Sublayer) for part in removed):
            continue
        with model.without(removed):
            expected = generate(model, use_cache=False)
            assert torch.equal(generate(model), expected)
            assert passes(model) == [9, *[1] * (NEW_TOKENS - 1)]  # all but the first read one token
        assert not torch.equal(expected, whole)
        assert described(model) == before
    assert torch.equal(generate(model), whole)
    assert not model.notes


def passes(model: LanguageModel) -> list[int]:
    """The number of tokens of each pass of a generation."""
    calls: list[int] = []
    embedding = model.module.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[1]))
    generate(model)
    hook.remove()
    return calls


@pytest.mark.parametrize("family", UNCACHED)
def test_a_family_whose_layers_depend_on_their_place_generates_without_a_cache_and_says_so(
    family: str, model_of: ModelOf
) -> None:
    model = model_of(family)
    before = described(model)
    with model.without((0,)):
        assert torch.equal(generate(model), generate(model, use_cache=False))
    (note,) = model.notes
    assert "generates without a key-value cache, which is slow" in note
    assert described(model) == before


def test_a_patch_and_sparse_activations_stay_at_their_layers(model_of: ModelOf) -> None:
    model = model_of("llama")
    path = "mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    patch = {(2, path): torch.randn(model.value(2, path).shape, generator=generator)}
    outputs, inputs = model.value(2, path).shape
    cut = MapSparsity(layer=2, path="mlp.down_proj", outputs=outputs, inputs=inputs, by=THRESHOLD, value=0.5)
    with model.without((0,)):
        plain = generate(model)
    with model.patched(patch), model.without((0,)):
        repaired = generate(model)
        expected = generate(model, use_cache=False)
    assert torch.equal(repaired, expected)
    assert not torch.equal(repaired, plain)
    intervention = Intervention(removed=(0,), sparsity=Sparsity(maps=(cut,), rule="all"))
    with model.applying(intervention) as counts:
        assert counts is not None
        assert torch.equal(generate(model), generate(model, use_cache=False))
        zeros, elements = counts.by_map()[0]
    assert 0 < zeros < elements


def test_decoded_tokens_are_sparse_and_half_of_the_prompt(model_of: ModelOf) -> None:
    """Of 9 and 6 prompt tokens, the last 5 and 3. All decoded ones are sparse, as the cache shows."""
    model = model_of("llama")
    outputs, inputs = model.value(2, "mlp.down_proj.weight").shape
    cut = MapSparsity(layer=2, path="mlp.down_proj", outputs=outputs, inputs=inputs, by=THRESHOLD, value=0.5)
    sparsity = Sparsity(maps=(cut,), rule="last-half")
    with model.applying(Intervention(removed=(0,), sparsity=sparsity)) as counts:
        assert counts is not None
        generate(model)
        _, elements = counts.by_map()[0]
    assert elements == inputs * (5 + 3 + 2 * (NEW_TOKENS - 1))
    assert not model.notes


def test_everything_is_restored_after_an_exception(model_of: ModelOf) -> None:
    model = model_of("gemma3_text")
    before = described(model)
    whole = generate(model)
    with pytest.raises(KeyboardInterrupt), changing(remaining_modules(model.module, model.layers, {0})):
        assert model.module.config.layer_types == tiny_config("gemma3_text").layer_types[1:]
        assert [layer.self_attn.layer_idx for layer in model.module.model.layers] == [0, 1]
        raise KeyboardInterrupt
    assert described(model) == before
    assert torch.equal(generate(model), whole)


def test_what_the_model_does_not_compute_without_a_layer_is_named(model_of: ModelOf) -> None:
    model = model_of("gemma3n_text")
    with pytest.raises(ModelError, match=r"left out: 1\. KeyError: 'sliding_attention'"):
        TextLoss(random_shard())(model, NO_INTERVENTION.without(1))


def test_an_error_of_the_caller_stays_as_it_is(model_of: ModelOf) -> None:
    model = model_of("llama")
    with pytest.raises(KeyError, match="mine"), model.without((1,)):
        model.losses(next(random_shard().batches(2)))
        raise KeyError("mine")


def test_an_error_of_an_action_in_a_pass_stays_as_it_is(model_of: ModelOf) -> None:
    """It runs inside of the model's forward, and is not the model's."""

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise KeyError("mine")

    model = model_of("llama")
    failing = changing([RunThrough(model.layers[2].module, fail)])
    with pytest.raises(KeyError, match="mine"), model.without((1,)), failing:
        model.losses(next(random_shard().batches(2)))


def test_layers_that_share_a_module_are_refused(model_of: ModelOf) -> None:
    model = model_of("llama")
    twice = (*model.layers, model.layers[0])
    with pytest.raises(ModelError, match="the modules of one list, each used once"):
        remaining_modules(model.module, twice, {1})


@pytest.mark.parametrize(
    ("name", "value", "shortened"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "c", "d"]),
        ("no_rope_layers", [1, 0, 1, 1], [1, 1, 1]),
        ("layer_rope_theta", [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 4.0]),
        ("mlp_only_layers", [1, 2], [1]),
        ("moe_layers", [0, 1, 2, 3], [0, 1, 2]),
        ("full_attn_idxs", [3], [2]),
        ("num_key_value_heads", [4, 3, 2, 1], [4, 2, 1]),
        ("per_layer_config", {"1": {"a": 1}, "3": {"a": 3}}, {"2": {"a": 3}}),
        ("first_k_dense_replace", 2, 1),
        ("max_window_layers", 4, None),
        ("num_key_value_heads", 4, None),
        ("id2label", {"0": "a", "1": "b"}, None),
        ("task_specific_params", {"1": {}}, None),
        ("architectures", ["a", "b", "c", "d"], None),
        ("eos_token_id", [1, 2, 3, 0], None),
        ("moe_intermediate_size", [1, 2, 3, 4], None),
        ("mtp_layer_types", ["a", "b", "c", "d"], None),
        ("vision_feature_layer", [0, 1], None),
    ],
)
def test_settings_by_layer_are_told_by_their_names(name: str, value: Any, shortened: Any) -> None:
    expected = {} if shortened is None else {name: shortened}
    assert settings_by_layer({name: value}, 4, [0, 2, 3]) == expected


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
def test_the_branch_adds_nothing(family: str, model_of: ModelOf) -> None:
    """As if its last module gave zeros, to the bit; both are the whole layer; and no trace is left."""
    model = model_of(family)
    shard = random_shard()
    whole = TextLoss(shard)(model)[0].samples
    without_layer = TextLoss(shard)(model, NO_INTERVENTION.without(1))[0].samples
    assert not model.obstacles
    for removed, path in zip((ATTENTION, MLP), SEQUENTIAL[family], strict=True):
        hook = model.layers[1].module.get_submodule(path).register_forward_hook(nothing)
        expected = TextLoss(shard)(model)[0].samples
        hook.remove()
        losses = TextLoss(shard)(model, NO_INTERVENTION.without(removed))[0].samples
        assert (losses == expected).all()
        assert (losses != whole).any()
        assert (losses != without_layer).any()
    both = TextLoss(shard)(model, Intervention(removed=(ATTENTION, MLP)))[0].samples
    assert (both == without_layer).all()
    assert (TextLoss(shard)(model)[0].samples == whole).all()


@pytest.mark.parametrize("family", ["llama", "bloom", *nightly("gemma2")])
def test_each_in_turn_is_what_leaving_it_out_is(family: str, model_of: ModelOf) -> None:
    """From kept hidden states, where the family has no more than them, and beside others that are left out."""
    model = model_of(family)
    shard = random_shard()
    assert model.resumes == (family != "bloom")
    for drop in ((), (ATTENTION,), (0, MLP)):
        for row in LeaveOneOut(shard, sublayers=True)(model, NO_INTERVENTION.without(*drop)):
            assert row.removed is not None
            assert set(drop) <= {*row.removed, *sublayers_of(map(layer_of, row.removed))}
            expected = TextLoss(shard)(model, Intervention(removed=row.removed))[0].samples
            assert (row.samples == expected).all(), (drop, row.removed)
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
def test_families_that_are_refused(family: str, why: str, model_of: ModelOf) -> None:
    model = model_of(family)
    for removed, named in ((ATTENTION, r"attention\.1"), (MLP, r"mlp\.1")):
        with pytest.raises(ModelError, match=f"{named} cannot be left out alone: .*({why})"):
            TextLoss(random_shard())(model, NO_INTERVENTION.without(removed))
