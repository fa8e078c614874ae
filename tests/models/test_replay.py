"""Gradients layer by layer: the numbers of a backward pass through the whole model, with less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.activations import peak_of_saved_bytes
from support.capabilities import YES, read_table
from support.causal_lm import opened, packed_or_padded
from support.checkpoints import llama, one_thread
from support.families import tiny_model
from support.tiers import all_of

from avss_dist.core.intervention import NO_INTERVENTION, Intervention, round_place
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import quiet
from avss_dist.tasks.map_damage import RoundingDamage
from avss_dist.tasks.task import MetricRow

UNSEEN = "zaya"  # its maps see more tokens than the batch has, so that nothing is predicted of them
EVALUATED = [
    row.family for row in read_table() if row.kind == "causal" and row.evaluated == YES and row.family != UNSEEN
]
CASES = [
    (family, dtype)
    for family, dtype in product(EVALUATED, ["float32", "bfloat16"])
    if (family, dtype) != ("xlstm", "bfloat16")  # transformers cannot run it
]
COMMON = ["llama", "gemma3_text", "gpt2", "opt", "qwen3_moe", "doge"]
SHARING = ("zamba", "zamba2")  # two layers have the same weights, so that a rounding of one is that of both
BY_LAYER = [*COMMON, "bailing_hybrid", "inkling_text", "mamba", "phi3", "mixtral", "gpt_neox", "qwen3_next"]
SHARD = packed_or_padded(padded=True, tokens=16)


class WholePass(RoundingDamage.new_pass):  # type: ignore[name-defined, misc]
    """A pass that does not let layers run again."""

    runs_by_layer = False


class WholeDamage(RoundingDamage):
    """The same measure, in backward passes through the whole model."""

    new_pass = WholePass


@pytest.fixture(scope="module", autouse=True)
def same_bytes() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def open_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LanguageModel]:
    root = tmp_path_factory.mktemp("families")

    def open_(family: str, dtype: str = "float32") -> LanguageModel:
        with quiet():
            if not (root / family).exists():
                tiny_model("causal", family).save_pretrained(root / family)
            return opened(root / family, dtype=dtype)

    return open_


@pytest.fixture
def layers_of_six(tmp_path: Path, save_checkpoint: Callable[[Any, Path], Path]) -> LanguageModel:
    return opened(save_checkpoint(llama(num_hidden_layers=6, initializer_range=0.2), tmp_path), dtype="float32")


def damage(*, by_layer: bool) -> RoundingDamage:
    kind = RoundingDamage if by_layer else WholeDamage
    return kind(shard=SHARD, formats=("int4", "fp8"), draws=2)


def samples(rows: list[MetricRow]) -> dict[Any, bytes]:
    """The bytes of the samples of each row, so that NaN equals itself."""
    return {(row.metric, row.layer, row.rounding): row.samples.tobytes() for row in rows}


def count_runs(model: LanguageModel, layer: int = 0) -> list[bool]:
    """A list that gets, at each run of a layer, whether gradients are enabled."""
    runs: list[bool] = []
    model.layers[layer].module.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    return runs


@pytest.mark.parametrize(
    ("family", "dtype"),
    all_of(CASES, [("llama", "bfloat16"), *product(("qwen3_moe", "doge"), ["float32"])]),
)
def test_predictions_by_layer_are_those_of_the_whole_model(family: str, dtype: str, open_family: Any) -> None:
    model = open_family(family, dtype)
    assert samples(damage(by_layer=True)(model)) == samples(damage(by_layer=False)(model))


@pytest.mark.parametrize("family", all_of([name for name in EVALUATED if name not in SHARING], ["doge", "qwen3_moe"]))
def test_losses_by_layer_are_those_of_passes_through_the_whole_model(family: str, open_family: Any) -> None:
    model = open_family(family)
    batches = list(SHARD.batches(2))
    layers = [layer.index for layer in model.layers if layer.projections]
    roundings = [Intervention(rounding=round_place("int4", layer)) for layer in layers]
    by_layer = model.losses_under(batches, [NO_INTERVENTION, *roundings])
    for rounding, losses in zip(roundings, by_layer[1:], strict=True):
        with model.applying(rounding):
            whole = np.concatenate([model.losses(batch) for batch in batches])
        assert losses.tobytes() == whole.tobytes()


@pytest.mark.parametrize("family", all_of(BY_LAYER, ["doge", "qwen3_moe"]))
def test_layers_of_common_families_run_again(family: str, open_family: Any) -> None:
    """Each batch runs a layer twice with gradients, and nothing else does after the first measurement."""
    model = open_family(family)
    damage(by_layer=True)(model)
    runs = count_runs(model)
    damage(by_layer=True)(model)
    assert runs == [True] * 2 * len(list(SHARD.batches(2)))


@pytest.mark.nightly
def test_predictions_without_a_layer_by_layer(layers_of_six: LanguageModel) -> None:
    without = Intervention(removed=(0, 3))
    by_layer = samples(damage(by_layer=True)(layers_of_six, without))
    assert by_layer == samples(damage(by_layer=False)(layers_of_six, without))


@pytest.mark.nightly
def test_a_model_that_computes_between_its_layers_is_not_run_by_layer(layers_of_six: LanguageModel) -> None:
    """Its layers' outputs have other gradients than the inputs of the layers behind them."""
    layers_of_six.layers[2].module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    expected = samples(damage(by_layer=False)(layers_of_six))
    assert samples(damage(by_layer=True)(layers_of_six)) == expected


@pytest.mark.nightly
def test_a_model_whose_layers_hand_on_more_is_not_run_by_layer(layers_of_six: LanguageModel) -> None:
    """The fifth layer adds what the second one computed."""
    seen: list[torch.Tensor] = []
    layers_of_six.layers[1].module.mlp.register_forward_hook(lambda _m, _args, output: seen.append(output))
    layers_of_six.layers[4].module.mlp.register_forward_hook(lambda _m, _args, output: output + seen[-1])
    expected = samples(damage(by_layer=False)(layers_of_six))
    assert samples(damage(by_layer=True)(layers_of_six)) == expected


@pytest.mark.nightly
def test_the_activations_of_one_layer_are_in_memory(layers_of_six: LanguageModel) -> None:
    """Once it has been found, on a few tokens, that the layers can run again."""
    damage(by_layer=True)(layers_of_six)
    whole = peak_of_saved_bytes(layers_of_six.module, lambda: damage(by_layer=False)(layers_of_six))
    by_layer = peak_of_saved_bytes(layers_of_six.module, lambda: damage(by_layer=True)(layers_of_six))
    assert by_layer < whole / 4
