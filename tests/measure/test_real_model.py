"""SmolLM2-135M, through pip: every field of every site equals numpy, the published formula holds, in both dtypes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import assert_close, counted_by, oracle_stats

from avss_dist.core.settings import THRESHOLDS, Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.base import no_observation
from avss_dist.partition.single import SingleReplica
from avss_dist.stats.scores import score_run

pytestmark = pytest.mark.nightly

CORPUS = os.environ.get("AVSS_TEST_CORPUS", "builtin:pydoc")
MODULES = {"attention": "self_attn", "mlp": "mlp", "neuron": "mlp.down_proj"}


def captured(replica: SingleReplica, batch: Any, layers: Sequence[int]) -> dict[int, dict[str, dict[str, Any]]]:
    """The raw activations of layers in one pass, as oracle arguments by site."""
    taken: dict[int, dict[str, torch.Tensor]] = {index: {} for index in layers}

    def keep(index: int, name: str, of_input: bool) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            taken[index][name] = (value[0] if isinstance(value, tuple) else value).clone()

        return hook

    handles = []
    for index in layers:
        layer = replica.layers[index].module
        places = [(layer, "before", True), (layer, "block", False)]
        places += [(layer.get_submodule(path), site, site == "neuron") for site, path in MODULES.items()]
        for module, name, of_input in places:
            handles.append(module.register_forward_hook(keep(index, name, of_input), with_kwargs=True))
    replica.forward([batch], no_observation)
    for handle in handles:
        handle.remove()
    return {index: _sites(tensors) for index, tensors in taken.items()}


def _sites(taken: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    taken["update"] = taken["block"] - taken["before"]
    exact = {name: t.double().numpy() for name, t in taken.items()}
    sites: dict[str, dict[str, Any]] = {site: {"x": exact[site]} for site in ("block", "update", *MODULES)}
    sites["block"] |= {"before": exact["before"]}
    return sites


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_field_equals_numpy(smollm2: Path, dtype: str) -> None:
    settings = Settings(max_sequences=2, sequence_length=32, batch_size=2, dtype=dtype)
    checkpoint = resolve(str(smollm2))
    shard = tokenize_corpus(CORPUS, load_tokenizer(checkpoint), settings).shards[0]
    replica = SingleReplica(checkpoint, settings)
    result = analyze_shard(replica, shard, settings)
    assert len(result.stats) == 30 * 5
    (batch,) = shard.batches(2)
    for index, sites in captured(replica, batch, (0, 9, 10, 19, 29)).items():
        for site, activations in sites.items():
            units = site in ("block", "update")
            activations |= {"units": units, "by": counted_by(dtype), "first_tokens": site == "block"}
            expected = oracle_stats(mask=batch.observed, thresholds=np.array(THRESHOLDS), **activations)
            assert_close(result.stats[index, site], expected, rtol=1e-9, angle_atol=1e-7)


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

    variance, sparsity = torch.zeros(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    for batch in shard.batches(1):
        for i, sites in captured(replica, batch, range(30)).items():
            hidden = torch.from_numpy(sites["block"]["x"])
            variance[i] += hidden.mean(dim=1).var(dim=1).sum() / shard.num_sequences
            sparsity[i] += (hidden.abs() < 1e-5).double().mean() / 2
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
