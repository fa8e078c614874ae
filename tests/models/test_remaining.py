"""A model with some of its layers alone: it generates with a cache what it does with layers skipped and without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.causal_lm import opened
from support.families import lively, tiny_config, tiny_model
from support.tiers import all_of

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import (
    THRESHOLD,
    Intervention,
    MapSparsity,
    Removal,
    Sparsity,
    Sublayer,
)
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.remaining import without_modules

CACHED = ("llama", "gemma3_text", "gemma3", "qwen3", "qwen2", "gpt2", "opt", "mixtral", "qwen3_moe", "mamba", "lfm2")
OF_EACH_KIND = ("llama", "gemma3", "qwen3_moe", "mamba", "lfm2")  # of cache: whole, windows, states, and both
UNCACHED = ("gemma3n_text", "jamba")  # families whose layers depend on their place
REMOVED: tuple[tuple[Removal, ...], ...] = ((0,), (1,), (0, 2), (1, Sublayer(2, "attention")))
NEW_TOKENS = 20  # more than a sliding window


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable) -> Callable[[str], LanguageModel]:
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
    config = model.module.config
    return (
        [(name, id(module)) for name, module in model.module.named_modules()],
        config.to_dict(),
        [
            (name, value)
            for name, module in model.module.named_modules()
            for name, value in vars(module).items()
            if type(value) is int
        ],
    )


@pytest.mark.parametrize("family", all_of(CACHED, OF_EACH_KIND))
def test_the_tokens_are_those_of_skipped_layers_without_a_cache(
    family: str, model_of: Callable[[str], LanguageModel], calls: list[int]
) -> None:
    model = model_of(family)
    whole, before = generate(model), described(model)
    assert torch.equal(whole, generate(model, use_cache=False))
    for removed in REMOVED:
        if model.obstacles and any(isinstance(one, Sublayer) for one in removed):
            continue
        with model.without(removed):
            expected = generate(model, use_cache=False)
            assert torch.equal(generate(model), expected)
            with counting(model, calls):
                generate(model)
        assert calls == [9, *[1] * (NEW_TOKENS - 1)]  # tokens of each pass: all but the first read one
        assert not torch.equal(expected, whole)
        assert described(model) == before
    assert torch.equal(generate(model), whole)
    assert not model.notes


@pytest.fixture
def calls() -> list[int]:
    return []


def counting(model: LanguageModel, calls: list[int]) -> ExitStack:
    """Note the number of tokens of each pass."""
    calls.clear()
    stack = ExitStack()
    embedding = model.module.get_input_embeddings()
    note = embedding.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape[1]))
    stack.callback(note.remove)
    return stack


@pytest.mark.parametrize("family", UNCACHED)
def test_a_family_whose_layers_depend_on_their_place_generates_without_a_cache_and_says_so(
    family: str, model_of: Callable[[str], LanguageModel]
) -> None:
    model = model_of(family)
    before = described(model)
    with model.without((0,)):
        assert torch.equal(generate(model), generate(model, use_cache=False))
    (note,) = model.notes
    assert "generates without a key-value cache, which is slow" in note
    assert described(model) == before


def test_a_patch_and_sparse_activations_stay_at_their_layers(model_of: Callable[[str], LanguageModel]) -> None:
    model = model_of("llama")
    path = "mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    patch = {(2, path): torch.randn(model.value(2, path).shape, generator=generator)}
    outputs, inputs = model.value(2, path).shape
    cut = MapSparsity(layer=2, path="mlp.down_proj", outputs=outputs, inputs=inputs, by=THRESHOLD, value=0.5)
    with model.without((0,)):
        plain = generate(model)
    with model.patched(patch), model.without((0,)):
        repaired, expected = generate(model), generate(model, use_cache=False)
    assert torch.equal(repaired, expected) and not torch.equal(repaired, plain)
    intervention = Intervention(removed=(0,), sparsity=Sparsity(maps=(cut,), rule="all"))
    with model.applying(intervention) as counts:
        assert counts is not None
        assert torch.equal(generate(model), generate(model, use_cache=False))
        zeros, elements = counts.values()[0]
    assert 0 < zeros < elements


def test_decoded_tokens_are_sparse_and_half_of_the_prompt(
    model_of: Callable[[str], LanguageModel],
) -> None:
    """Of 9 and 6 prompt tokens, the last 5 and 3. All decoded ones are sparse, as the cache shows."""
    model = model_of("llama")
    outputs, inputs = model.value(2, "mlp.down_proj.weight").shape
    cut = MapSparsity(layer=2, path="mlp.down_proj", outputs=outputs, inputs=inputs, by=THRESHOLD, value=0.5)
    sparsity = Sparsity(maps=(cut,), rule="last-half")
    with model.applying(Intervention(removed=(0,), sparsity=sparsity)) as counts:
        assert counts is not None
        generate(model)
        _, elements = counts.values()[0]
    assert elements == inputs * (5 + 3 + 2 * (NEW_TOKENS - 1))
    assert not model.notes


def test_everything_is_restored_after_an_exception(model_of: Callable[[str], LanguageModel]) -> None:
    model = model_of("gemma3_text")
    before, whole = described(model), generate(model)
    with pytest.raises(KeyboardInterrupt), without_modules(model.module, model.layers, {0}):
        assert model.module.config.layer_types == tiny_config("gemma3_text").layer_types[1:]
        assert [layer.self_attn.layer_idx for layer in model.module.model.layers] == [0, 1]
        raise KeyboardInterrupt
    assert described(model) == before
    assert torch.equal(generate(model), whole)


def test_layers_that_share_a_module_are_refused(model_of: Callable[[str], LanguageModel]) -> None:
    model = model_of("llama")
    twice = (*model.layers, model.layers[0])
    refused = pytest.raises(ModelError, match="the modules of one list, each used once")
    with refused, without_modules(model.module, twice, {1}):
        pass
