"""Paired text, from a file to the warehouse: strata and rows against numpy, the same bytes however it is done."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import checkpoint_at
from support.oracle import EXACT_FIELDS, assert_close, assert_equal_stats, oracle_stats
from support.pairs import write_pairs
from support.tables import assert_same_tables
from support.warehouses import write_shard

import avss_dist
from avss_dist.core.settings import Settings
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.corpus.shards import Shard, tokenize_corpus
from avss_dist.measure.rows import CountedTokens, by_matrices, row_tensors
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.structure.layers import first_tensor
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica, open_replica
from avss_dist.stats.layer_stats import ShardResult, merge_stats
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

OPTIONS: dict[str, Any] = {"sequence_length": 48, "batch_size": 3, "sequences_per_shard": 8, "executor": "local"}
SETTINGS = Settings(sequence_length=48, batch_size=3, dtype="float32", thresholds=(1e-2, 0.1))
Raw = list[tuple[np.ndarray, np.ndarray]]
PAIRS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("text"), PAIRS)


@pytest.fixture(scope="module")
def opened(tiny_llama: Path) -> Iterator[Replica]:
    replica = open_replica(checkpoint_at(tiny_llama), SETTINGS, Placement())
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def shard(tiny_llama: Path, source: str) -> Shard:
    tokenizer = load_tokenizer(checkpoint_at(tiny_llama))
    return tokenize_corpus(source, tokenizer, SETTINGS).shards[0]


@pytest.fixture(scope="module")
def measured(opened: Replica, shard: Shard) -> tuple[ShardResult, Raw]:
    """A shard's result; and the input and output of layer 1 for each row, which hooks of the test's own saw."""
    raw: Raw = []

    def see(_module: Any, args: Any, output: Any) -> None:
        before = args[0].double().numpy()
        after = first_tensor(output).double().numpy()
        raw.extend(zip(before, after, strict=True))

    handle = opened.layers[1].module.register_forward_hook(see)
    result = analyze_shard(opened, shard, SETTINGS)
    handle.remove()
    return result, raw


def padded(raw: Raw, shard: Shard) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input, output and mask, [rows, tokens, units] and [rows, tokens]."""
    assert shard.pairing is not None
    shape = (len(raw), 48, raw[0][0].shape[1])
    before = np.zeros(shape)
    after = np.zeros(shape)
    for i, (old, new) in enumerate(raw):
        before[i, : len(old)] = old
        after[i, : len(new)] = new
    positions = np.arange(48)
    has_begun = positions >= shard.pairing.starts[:, None]
    is_real = positions < shard.lengths[:, None]
    return before, after, has_begun & is_real


def test_strata_are_those_of_numpy(measured: tuple[ShardResult, Raw], shard: Shard) -> None:
    result, raw = measured
    assert shard.pairing is not None
    before, after, mask = padded(raw, shard)
    grid = np.array(SETTINGS.thresholds)
    labels = np.array(shard.pairing.strata)
    assert set(labels) == {"good", "bad", f"good{AFTER_ANOTHER}", f"bad{AFTER_ANOTHER}"}
    for label in set(labels):
        own = mask & (labels == label)[:, None]
        expected = oracle_stats(after, own, grid, units=True, before=before, first_tokens=True)
        assert_close(result.strata[1, "block", label], expected, angle_atol=1e-7)


def test_rows_are_those_of_numpy_and_add_up_to_their_strata(measured: tuple[ShardResult, Raw], shard: Shard) -> None:
    result, raw = measured
    before, after, mask = padded(raw, shard)
    assert result.rows is not None
    columns = result.rows
    own_rows = (columns["layer"] == 1) & (columns["site"] == "block")
    rows = {name: values[own_rows] for name, values in columns.items()}
    for i, own in enumerate(mask):
        x = after[i, own]
        old = before[i, own]
        sizes = np.abs(x)
        old_lengths = np.linalg.norm(old, axis=1)
        change = np.linalg.norm(x - old, axis=1) / old_lengths
        assert rows["count"][i] == x.size
        assert rows["near_zero"][i].tolist() == [(sizes < threshold).sum() for threshold in SETTINGS.thresholds]
        expected = {
            "mean": x.mean(),
            "m2": x.size * x.var(),
            "pooled_variance": x.mean(0).var(ddof=1),
            "norm": np.linalg.norm(x, axis=1).mean(),
            "relative_magnitude": change.mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(rows[name][i], value, rtol=1e-6)
    for (layer, site, label), stats in result.strata.items():
        own = (columns["stratum"] == label) & (columns["layer"] == layer) & (columns["site"] == site)
        near_zero = columns["near_zero"][own]
        assert near_zero.sum(axis=0).tolist() == stats.near_zero.tolist()
        assert columns["count"][own].sum() == stats.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_same_on_every_device(dtype: torch.dtype) -> None:
    """What GPUs do, beside what is compiled for CPUs; where something is not finite, or no token counts, too."""
    seeded = torch.Generator().manual_seed(0)
    x, before = torch.randn((2, 5, 9, 33), generator=seeded).to(dtype)
    x[0, 3, 3] = torch.inf
    x[1, 4, 9] = torch.nan
    before[2, 5] = 0
    mask = torch.zeros((5, 9), dtype=torch.bool)
    mask[:4, 2:7] = True
    tokens = CountedTokens(mask, x.device, slice(None))
    thresholds = np.array([1e-3, 0.1])
    fields = row_tensors(x, tokens, thresholds, before)
    expected = by_matrices(tokens.select(x), tokens, thresholds, tokens.select(before))
    assert fields.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(fields[name].numpy(), values.numpy(), rtol=1e-12, err_msg=name)


def test_strata_add_up_to_the_whole_to_the_bit(
    opened: Replica, measured: tuple[ShardResult, Raw], shard: Shard
) -> None:
    assert shard.pairing is not None
    alike = replace(shard.pairing, strata=("all",) * shard.num_sequences)
    whole = analyze_shard(opened, replace(shard, pairing=alike), SETTINGS).stats
    result, _ = measured
    parts = [{(layer, site): stats} for (layer, site, _), stats in result.strata.items()]
    added = merge_stats(parts)
    assert added.keys() == whole.keys()
    for key, stats in whole.items():
        for name in EXACT_FIELDS:
            assert np.array_equal(getattr(added[key], name), getattr(stats, name)), (key, name)


def test_a_result_that_is_sent_is_written_as_by_its_worker(measured: tuple[ShardResult, Raw], tmp_path: Path) -> None:
    run = RunIdentity(run_id="tiny-0123456789", model="tiny", revision=None, family="llama")
    plain, _ = measured
    by_worker = tmp_path / "by worker"
    by_driver = tmp_path / "by driver"
    write_shard(Store(by_worker), run, plain)
    sent = pickle.loads(pickle.dumps(encode_shard(run, plain)))
    Store(by_driver).write_shard_files(run.run_id, 0, sent)
    for table in ("shard_stats", "row_stats"):
        file = f"{table}/run_id={run.run_id}/shard-00000.parquet"
        assert (by_driver / file).read_bytes() == (by_worker / file).read_bytes()
    (back,) = Store(by_worker).reader.each_shard(run.run_id, {0: plain.content_hash})
    assert_equal_stats(back.strata, plain.strata)
    assert_equal_stats(back.stats, plain.stats)


@pytest.mark.nightly
def test_a_resumed_run_and_a_streamed_one_are_the_same(tiny_llama: Path, source: str, tmp_path: Path) -> None:
    once = tmp_path / "once"
    again = tmp_path / "again"
    options = {"corpus": source, **OPTIONS}
    run = avss_dist.score(tiny_llama, warehouse=once, **options)
    streamed = avss_dist.score(tiny_llama, warehouse=again, partition="streaming", **options)
    run_id = run.run_id
    assert streamed.run_id == run_id
    assert_same_tables(again, once)
    for table in ("runs", "stratum_stats"):
        first, *_ = (again / table).rglob("*.parquet")
        first.unlink()
    for table in ("shard_stats", "row_stats"):
        (again / table / f"run_id={run_id}" / "shard-00001.parquet").unlink()
    resumed = avss_dist.score(tiny_llama, warehouse=again, **options)
    assert resumed.resumed_shards == 2
    assert_same_tables(again, once)
    warehouse = Warehouse(once)
    assert warehouse.table("row_stats").num_rows == 4 * PAIRS * 3 * 5
    whole = warehouse.read_layer_stats(run_id)
    strata = warehouse.read_stratum_stats(run_id)
    assert whole[0, "mlp"].count == strata[0, "mlp", "good"].count + strata[0, "mlp", "bad"].count
