"""Results of a shard beside its statistics: rows of answers, notes, refusals, and the memory of its counters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.causal_lm import random_shard
from support.families import tiny_model

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import SITES, THRESHOLDS, Settings
from avss_dist.corpus.pairs import Pairing
from avss_dist.measure.kernels.reference import Accumulator
from avss_dist.measure.shard import UNIT_SITES, analyze_shard, counter_bytes
from avss_dist.models.checkpoints import resolve
from avss_dist.models.size import footprint
from avss_dist.partition.single import SingleReplica

SETTINGS = Settings(batch_size=2, device="cpu")


def opened(family: str, folder: Path, settings: Settings) -> SingleReplica:
    tiny_model("causal", family).save_pretrained(folder)
    return SingleReplica(resolve(str(folder)), settings)


def test_a_model_without_any_of_the_sites_is_refused(tmp_path: Path) -> None:
    settings = replace(SETTINGS, sites=("mlp", "neuron"))
    replica = opened("mamba", tmp_path, settings)
    with pytest.raises(ModelError, match="The model has none of the sites mlp, neuron"):
        analyze_shard(replica, random_shard(), settings)


def test_layers_without_experts_are_noted(tmp_path: Path) -> None:
    settings = replace(SETTINGS, experts=True)
    result = analyze_shard(opened("deepseek_v3", tmp_path, settings), random_shard(), settings)
    assert result.experts is not None and list(result.experts) == [1, 2]
    assert "layers 0 have no routed experts" in result.model["notes"]


def test_every_token_of_padded_rows_counts_once_and_only_what_is_asked_is_told(tiny_llama: Path) -> None:
    shard = random_shard()
    result = analyze_shard(SingleReplica(resolve(str(tiny_llama)), SETTINGS), shard, SETTINGS)
    tokens = int(shard.lengths.sum())
    assert {stats.count for key, stats in result.stats.items() if key[1] == "block"} == {tokens * 32}
    assert result.num_tokens == tokens and result.rows is None and result.experts is None
    assert "projections" not in result.model


def test_rows_of_answers_have_the_tokens_of_prompts_and_answers(tiny_llama: Path) -> None:
    """An answer that begins where its row ends has no token, and one that would begin after it neither."""
    shard = random_shard()
    starts = np.array([3, 0, 9, 23, 20], np.int32)
    pairing = Pairing(rows=np.arange(5), pairs=np.arange(5) // 2, strata=("good", "bad") * 2 + ("good",), starts=starts)
    result = analyze_shard(SingleReplica(resolve(str(tiny_llama)), SETTINGS), replace(shard, pairing=pairing), SETTINGS)
    assert result.rows is not None
    assert shard.lengths.tolist() == [24, 24, 9, 24, 17]
    assert result.rows.prompt_tokens.tolist() == starts.tolist()
    assert result.rows.answer_tokens.tolist() == [21, 24, 0, 1, 0]


def test_the_memory_of_counters_is_that_of_the_accumulators(tiny_llama: Path) -> None:
    """But for what does not grow with the dtype or the width."""
    size = replace(footprint(str(tiny_llama), SETTINGS), hidden_size=4096)
    like = torch.empty((1, 1, 4096), dtype=torch.bfloat16, device="meta")
    held = 0
    for site in SITES:
        into = Accumulator(like, np.array(THRESHOLDS), units=site in UNIT_SITES, geometry=site == "block")
        held += sum(tensor.nbytes for tensor in into.tensors.values())
    counted = counter_bytes(size, SETTINGS, strata=2)
    assert counted <= 2 * 3 * held < counted + 2 * 3 * len(SITES) * 1000
