"""SmolLM2-135M, through pip: the published formula holds, and thresholds need no rerun."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoints import resolve
from avss_dist.models.layers import first_tensor
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.replica import no_observation
from avss_dist.partition.single import SingleReplica
from avss_dist.stats.scores import score_run

pytestmark = pytest.mark.nightly

CORPUS = os.environ.get("AVSS_TEST_CORPUS", "builtin:pydoc")


def test_the_released_reading_of_avss(smollm2: Path) -> None:
    """``pooled`` at 1e-5 against the formula over hidden states, in a few lines of torch."""
    settings = Settings(max_sequences=2, sequence_length=64, batch_size=1, dtype="bfloat16", sites=("block",))
    checkpoint = resolve(str(smollm2))
    shard = tokenize_corpus(CORPUS, load_tokenizer(checkpoint), settings).shards[0]
    replica = SingleReplica(checkpoint, settings)
    rows = score_run(analyze_shard(replica, shard, settings).stats, [layer.name for layer in replica.layers])
    ours = [
        r["avss"] for r in rows if (r["recipe"], r["threshold"], r["threshold_kind"]) == ("pooled", 1e-5, "absolute")
    ]

    outputs: list[torch.Tensor] = []
    for layer in replica.layers:
        layer.module.register_forward_hook(lambda _module, _args, output: outputs.append(first_tensor(output)))
    replica.forward([*shard.batches(1)], no_observation)
    hidden = torch.stack(outputs).double().view(2, 30, -1, outputs[0].shape[-1])
    variance = hidden.mean(dim=2).var(dim=2).mean(dim=0)
    sparsity = (hidden.abs() < 1e-5).double().mean(dim=(0, 2, 3))
    avss = (variance / variance.sum()) / (sparsity / sparsity.sum())
    np.testing.assert_allclose(ours, avss.numpy(), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_threshold_without_a_rerun_equals_a_rerun(smollm2: Path, dtype: str) -> None:
    """At 40 others: to the element in bfloat16; in float32 within 1%, and to the element at the edge of a bin."""
    drawn = np.exp(np.random.default_rng(0).uniform(np.log(1e-4), np.log(3.0), 40))
    kept = Settings(max_sequences=2, sequence_length=48, batch_size=2, dtype=dtype)
    rerun = replace(kept, thresholds=(*drawn, 0.6875))
    checkpoint = resolve(str(smollm2))
    shard = tokenize_corpus(CORPUS, load_tokenizer(checkpoint), kept).shards[0]
    replica = SingleReplica(checkpoint, kept)
    stored, counted = (analyze_shard(replica, shard, settings).stats for settings in (kept, rerun))
    for key, stats in counted.items():
        found = np.array([stored[key].below(t) for t in stats.thresholds])
        assert (found[:, 1] <= stats.near_zero).all() and (stats.near_zero <= found[:, 2]).all(), key
        if dtype == "bfloat16":
            assert np.array_equal(found[:, 0], stats.near_zero), key
        many = stats.near_zero > 10_000
        assert found[many, 0] == pytest.approx(stats.near_zero[many], rel=0.01), key
        at = stats.thresholds.searchsorted(0.6875)
        assert found[at, 0] == stats.near_zero[at], key
