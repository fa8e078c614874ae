"""Results of a shard: rows of answers, notes, refusals, the memory of its counters, and batches that are halved.

Single rows are those of numpy. On SmolLM2-135M, the published formula holds, and thresholds need no rerun.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from support.causal_lm import random_shard
from support.checkpoints import checkpoint_at
from support.families import tiny_model
from support.oracle import FLOAT_FIELDS
from support.rows import column, where
from support.tiers import all_of

from avss_dist.core.errors import BatchTooLarge, ModelError
from avss_dist.core.process import current_umask
from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.corpus.pairs import Pairing
from avss_dist.corpus.shards import Batch, Shard, tokenize_corpus
from avss_dist.measure.kernels.reference import Accumulator
from avss_dist.measure.observer import Observer
from avss_dist.measure.rows import CountedTokens, by_matrices, in_order, masks_by_stratum, row_tensors
from avss_dist.measure.shard import SEE_PADDING, UNIT_SITES, analyze_shard, counter_bytes, follow
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.size import footprint
from avss_dist.models.structure.layers import first_tensor
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import BatchContext, Replica, dummy_batch, no_observation
from avss_dist.runs.ray.worker import ShardAssignment, Worker
from avss_dist.runs.work import Receipt, ReplicaSpec
from avss_dist.stats.layer_stats import ROW_FIELDS
from avss_dist.stats.scores import score_run
from avss_dist.warehouse.encoding import decode_shard
from avss_dist.warehouse.shared import share
from avss_dist.warehouse.store import Store

SETTINGS = Settings(batch_size=2, device="cpu")


def opened(family: str, folder: Path, settings: Settings) -> Replica:
    tiny_model("causal", family).save_pretrained(folder)
    return Replica(checkpoint_at(folder), settings)


def test_a_model_without_any_of_the_sites_is_refused(tmp_path: Path) -> None:
    settings = replace(SETTINGS, sites=("mlp", "neuron"))
    replica = opened("mamba", tmp_path, settings)
    with pytest.raises(ModelError, match="The model has none of the sites mlp, neuron"):
        analyze_shard(replica, random_shard(), settings)


def test_layers_without_experts_are_noted(tmp_path: Path) -> None:
    settings = replace(SETTINGS, experts=True)
    result = analyze_shard(opened("deepseek_v3", tmp_path, settings), random_shard(), settings)
    assert result.experts is not None
    assert list(result.experts) == [1, 2]
    assert "layers 0 have no routed experts" in result.model["notes"]


PADDED = [("causal", "llama"), ("masked", "bert"), ("image-text", "paligemma")]
PADDED += [("masked", family) for family in ("convbert", "fnet", "nystromformer", "yoso")]


@pytest.mark.parametrize(("kind", "family"), all_of(PADDED, [PADDED[0], ("masked", "fnet")]))
def test_padding_changes_the_tokens_of_some_families_alone_and_they_have_a_note(
    kind: str, family: str, tmp_path: Path
) -> None:
    model = tiny_model(kind, family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4  # or layers add next to nothing
    model.save_pretrained(tmp_path)
    replica = Replica(checkpoint_at(tmp_path), SETTINGS)
    shard = random_shard()
    padded = analyze_shard(replica, shard, SETTINGS, rows=5)
    alone = analyze_shard(replica, shard, SETTINGS, rows=1)
    last = len(padded.layers) - 1
    padded_sum = padded.stats[last, "block"].unit_sum
    alone_sum = alone.stats[last, "block"].unit_sum
    tolerance = 1e-4 * np.abs(padded_sum).max()
    ignored = np.allclose(padded_sum, alone_sum, rtol=0, atol=tolerance)
    notes = "\n".join(padded.model["notes"])
    assert ignored == (family not in SEE_PADDING)
    assert ("padding changes the tokens of a row" in notes) == (family in SEE_PADDING)


def test_every_token_of_padded_rows_counts_once_and_only_what_is_asked_is_told(tiny_llama: Path) -> None:
    shard = random_shard()
    result = analyze_shard(Replica(checkpoint_at(tiny_llama), SETTINGS), shard, SETTINGS)
    tokens = int(shard.lengths.sum())
    for (_, site), stats in result.stats.items():
        if site == "block":
            assert stats.count == tokens * 32
    assert result.num_tokens == tokens
    assert result.rows is None
    assert result.experts is None
    assert "projections" not in result.model


def test_rows_of_answers_have_the_tokens_of_prompts_and_answers(tiny_llama: Path) -> None:
    """An answer that begins where its row ends has no token, and one that would begin after it neither."""
    shard = random_shard()
    starts = np.array([3, 0, 9, 23, 20], np.int32)
    rows = np.arange(5)
    strata = ("good", "bad", "good", "bad", "good")
    pairing = Pairing(rows=rows, pairs=rows // 2, strata=strata, starts=starts)
    replica = Replica(checkpoint_at(tiny_llama), SETTINGS)
    result = analyze_shard(replica, replace(shard, pairing=pairing), SETTINGS)
    assert result.rows is not None
    assert shard.lengths.tolist() == [24, 24, 9, 24, 17]
    for prompt_tokens in result.rows["prompt_tokens"].reshape(-1, 5):
        assert prompt_tokens.tolist() == starts.tolist()
    for answer_tokens in result.rows["answer_tokens"].reshape(-1, 5):
        assert answer_tokens.tolist() == [21, 24, 0, 1, 0]


def test_the_memory_of_counters_is_that_of_the_accumulators(tiny_llama: Path) -> None:
    """But for what does not grow with the dtype or the width."""
    size = replace(footprint(str(tiny_llama), SETTINGS), hidden_size=4096)
    like = torch.empty((1, 1, 4096), dtype=torch.bfloat16, device="meta")
    held = 0
    for site in SITES:
        into = Accumulator(like, np.array(THRESHOLDS), units=site in UNIT_SITES, geometry=site == "block")
        held += sum(tensor.nbytes for tensor in into.tensors.values())
    counted = counter_bytes(size, SETTINGS, strata=2)
    fixed = 2 * 3 * len(SITES) * 1000
    assert counted <= 2 * 3 * held < counted + fixed


BATCHES_OF_8 = Settings(max_sequences=13, sequence_length=32, batch_size=8, sequences_per_shard=13, device="cpu")


class SmallDevice(Replica):
    """A device that runs out of memory beyond ``most`` rows, halfway through the layers."""

    most = 8

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        for batch in batches:
            if len(batch.input_ids) > self.most:
                handle = self.layers[1].module.register_forward_pre_hook(self._fail)
                try:
                    super().forward([batch], context)
                finally:
                    handle.remove()
            super().forward([batch], context)

    def _fail(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture(scope="module")
def replica(tiny_llama: Path) -> SmallDevice:
    return SmallDevice(checkpoint_at(tiny_llama), BATCHES_OF_8)


@pytest.fixture(scope="module")
def shard(tiny_llama: Path) -> Shard:
    tokenizer = load_tokenizer(checkpoint_at(tiny_llama))
    return tokenize_corpus("builtin:pydoc", tokenizer, BATCHES_OF_8).shards[0]


@pytest.mark.parametrize(("most", "rows"), [(7, 4), (3, 2), (1, 1)])
def test_a_batch_that_does_not_fit_is_halved(
    most: int, rows: int, replica: SmallDevice, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze_shard(replica, shard, BATCHES_OF_8)
    monkeypatch.setattr(replica, "most", most)
    halved = analyze_shard(replica, shard, BATCHES_OF_8)
    assert halved.stats.keys() == whole.stats.keys()
    assert len(whole.stats) == 5 * len(replica.layers)
    for key, stats in whole.stats.items():
        seen = halved.stats[key]
        for name in ("count", "sequence_count", "token_count", "unit_count", "nonfinite_count"):
            assert getattr(seen, name) == getattr(stats, name), name
        for name in FLOAT_FIELDS:
            expected_value = getattr(stats, name)
            np.testing.assert_allclose(getattr(seen, name), expected_value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert halved.model["notes"][-1] == f"8 rows did not fit in memory at once; some batches had {rows}"
    assert whole.model["notes"] == []


def test_a_row_that_does_not_fit_fails_with_advice(
    replica: SmallDevice, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "most", 0)
    with pytest.raises(BatchTooLarge, match=r"1 x 32 tokens do not fit in memory(.|\n)*streaming"):
        analyze_shard(replica, shard, BATCHES_OF_8)
    monkeypatch.undo()
    assert analyze_shard(replica, shard, BATCHES_OF_8).stats


def test_ranks_that_wait_for_each_other_do_not_halve_alone(
    replica: SmallDevice, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "most", 4)
    monkeypatch.setattr(replica, "model", {**replica.model, "partition": "zero3"})
    with pytest.raises(BatchTooLarge, match="8 x 32 tokens"):
        analyze_shard(replica, shard, BATCHES_OF_8)
    assert analyze_shard(replica, shard, BATCHES_OF_8, rows=4).stats


def test_a_shard_is_concluded_while_the_next_one_is_computed(
    replica: SmallDevice, shard: Shard, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker with a GPU does it, in two threads: an error of the first one is its own, and the other's comes."""
    expected = analyze_shard(replica, shard, BATCHES_OF_8)
    spec = ReplicaSpec(checkpoint=checkpoint_at(tiny_llama), settings=BATCHES_OF_8, placement=Placement())
    worker = Worker("rank 0", BATCHES_OF_8.threads, None, current_umask())
    monkeypatch.setattr(worker, "_spec", spec)
    monkeypatch.setattr(worker, "_model", replica)
    outside = SimpleNamespace(is_canceled=lambda: False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: outside)  # Ray's own would start a Ray here
    strata = Observer.strata
    first = threading.Event()
    second = threading.Event()

    def conclude(self: Observer) -> Any:
        if not first.is_set():
            first.set()
            assert second.wait(timeout=500), "the next shard was not begun"
            raise RuntimeError("it cannot be concluded")
        return strata(self)

    monkeypatch.setattr(Observer, "strata", conclude)

    def heartbeat() -> None:
        if first.is_set():
            second.set()

    monkeypatch.setattr(worker, "_heartbeat", heartbeat)
    assignment = ShardAssignment(shard=shard, rows=BATCHES_OF_8.batch_size, forwards=0, run_id="run")
    with ThreadPoolExecutor(2) as threads:
        failing = threads.submit(worker.measure, assignment)
        assert first.wait(timeout=500)
        result = threads.submit(worker.measure, assignment).result()
    assert "it cannot be concluded" in str(failing.exception())
    assert isinstance(result, Receipt)
    stored = decode_shard(result.files["shard_stats"], "run")
    assert stored is not None
    assert len(stored.stats) == len(expected.stats)
    for key, stats in expected.stats.items():
        assert stored.stats[key].equals(stats)


def test_a_late_worker_writes_no_shard_of_a_run_that_has_ended(
    replica: SmallDevice, shard: Shard, tiny_llama: Path, tmp_path: Path
) -> None:
    """It gives the shard to the driver, which needs it no more."""
    store = Store(tmp_path)
    shared = share(store, "run")
    spec = ReplicaSpec(checkpoint=checkpoint_at(tiny_llama), settings=BATCHES_OF_8, placement=Placement())
    rows = BATCHES_OF_8.batch_size
    assignment = ShardAssignment(shard=shard, rows=rows, forwards=0, run_id="run", warehouse=shared)

    def measure() -> Receipt | None:
        return assignment.run(spec, replica, lambda: None, lambda: None)

    in_time = measure()
    assert in_time is not None
    assert not in_time.files
    assert store.reader.num_partials("run") == 1
    shard_stats = tmp_path / "shard_stats"
    shutil.rmtree(shard_stats)
    store.delete_unfinished_run("run")
    late = measure()
    assert late is not None
    assert late.files
    assert not shard_stats.exists()


def test_fillers_count_for_nothing(replica: SmallDevice, shard: Shard) -> None:
    alone = analyze_shard(replica, shard, BATCHES_OF_8)
    beats: list[int] = []
    filled = analyze_shard(replica, shard, BATCHES_OF_8, forwards=5, heartbeat=lambda: beats.append(1))
    for key, stats in alone.stats.items():
        assert filled.stats[key].equals(stats)
    assert len(beats) == 5 * len(replica.layers), "two batches and three dummy batches, each through every layer"
    follow(replica, 2)
    assert not dummy_batch().observed.any()
    assert dummy_batch().attention_mask.all()


GRID = np.array([0.25, 1.0])
Measure = Callable[[torch.Tensor, CountedTokens, torch.Tensor | None], dict[str, Any]]


def compiled(x: torch.Tensor, tokens: CountedTokens, before: torch.Tensor | None) -> dict[str, Any]:
    return dict(row_tensors(x, tokens, GRID, before))


def matrices(x: torch.Tensor, tokens: CountedTokens, before: torch.Tensor | None) -> dict[str, Any]:
    selected = None if before is None else tokens.select(before)
    return dict(by_matrices(tokens.select(x), tokens, GRID, selected))


def mean_of_finite(values: np.ndarray) -> float:
    """Return the mean, or NaN of nothing and where a value is not finite."""
    if not len(values) or not np.isfinite(values).all():
        return math.nan
    return float(values.mean())


def pooled_variance(x: np.ndarray) -> float:
    """Return the variance over units of their means over tokens; NaN without tokens and where it is not finite."""
    if not len(x) or not np.isfinite(x).all():
        return math.nan
    if x.shape[1] == 1:
        return 0.0
    return float(x.mean(axis=0).var(ddof=1))


def expected(x: np.ndarray, before: np.ndarray | None) -> dict[str, Any]:
    """Return the fields of the tokens of one row, [tokens, units]."""
    finite = x[np.isfinite(x)]
    sizes = np.abs(finite)
    fields: dict[str, Any] = {
        "count": finite.size,
        "near_zero": [(sizes < limit).sum() for limit in GRID],
        "mean": math.nan,
        "m2": 0.0,
        "pooled_variance": pooled_variance(x),
        "norm": mean_of_finite(np.linalg.norm(x, axis=1)),
        "relative_magnitude": math.nan,
    }
    if finite.size:
        mean = finite.mean()
        fields["mean"] = mean
        fields["m2"] = ((finite - mean) ** 2).sum()
    if before is not None:
        lengths = np.linalg.norm(before, axis=1)
        relative = np.linalg.norm(x - before, axis=1) / lengths
        fields["relative_magnitude"] = mean_of_finite(relative)
    return fields


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("units", [1, 2, 5])
@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("measure", [compiled, matrices])
def test_rows_are_those_of_numpy(measure: Measure, geometry: bool, units: int) -> None:
    """Row 1 has an infinity, row 2 a NaN, row 3 an input of zero, row 4 no token, row 5 nothing finite, row 6 one."""
    rng = np.random.default_rng(units)
    x, before = rng.normal(size=(2, 7, 6, units)).astype(np.float32)
    x[0, 1:4, 0] = 0.25, -1.0, 100.0
    x[1, 2, 0] = np.inf
    x[2, 3, -1] = np.nan
    before[3, 1] = 0
    x[5] = np.nan
    mask = rng.random((7, 6)) < 0.6
    mask[:4, 1:4] = True
    mask[4] = False
    mask[5] = True
    mask[6] = np.arange(6) == 2
    tokens = CountedTokens(torch.from_numpy(mask), torch.device("cpu"), slice(None))
    inputs = torch.from_numpy(before) if geometry else None
    fields = measure(torch.from_numpy(x), tokens, inputs)
    assert set(fields) == set(ROW_FIELDS)
    for row, own in enumerate(mask):
        new = x[row, own].astype(np.float64)
        old = before[row, own].astype(np.float64) if geometry else None
        for name, value in expected(new, old).items():
            measured = fields[name][row].numpy()
            np.testing.assert_allclose(measured, value, rtol=1e-10, atol=1e-12, err_msg=f"{name} of {row}")


def test_masks_are_apart_by_stratum_and_only_those_with_a_token() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    (whole,) = masks_by_stratum(mask, None).values()
    assert list(masks_by_stratum(mask, None)) == [""]
    assert torch.equal(whole, mask)
    assert masks_by_stratum(torch.zeros((2, 3), dtype=torch.bool), None) == {}
    zeros = np.zeros(4, np.int64)
    pairing = Pairing(rows=zeros, pairs=zeros, strata=("b", "a", "c", "b"), starts=zeros)
    masks = masks_by_stratum(mask, pairing)
    assert list(masks) == ["a", "b"]
    assert masks["a"].nonzero().tolist() == [[1, 0], [1, 1]]
    assert masks["b"].nonzero().tolist() == [[0, 0], [3, 1]]


def test_answers_after_another_prompt_are_not_own() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    zeros = np.zeros(3, np.int64)
    pairing = Pairing(rows=zeros, pairs=zeros, strata=("good", f"good{AFTER_ANOTHER}", "bad"), starts=zeros)

    def own(mask: torch.Tensor, pairing: Pairing | None) -> list[int]:
        return CountedTokens(mask, mask.device, slice(None), pairing).own_places.tolist()

    assert own(mask, pairing) == [0, 5]
    assert own(mask, None) == mask.flatten().nonzero().flatten().tolist()


def test_rows_come_in_the_order_of_their_places() -> None:
    def values_at(places: np.ndarray) -> dict[str, np.ndarray]:
        """Different values of each field at each place."""
        return {name: places + 100 * number for number, name in enumerate(ROW_FIELDS)}

    first = np.array([7, 5, 1])
    second = np.array([0, 9])
    merged = in_order([(first, values_at(first)), (second, values_at(second))])
    expected_values = values_at(np.array([0, 1, 5, 7, 9]))
    for name in ROW_FIELDS:
        assert merged[name].tolist() == expected_values[name].tolist()


CORPUS = os.environ.get("AVSS_TEST_CORPUS", "builtin:pydoc")


@pytest.mark.nightly
def test_the_released_reading_of_avss(smollm2: Path) -> None:
    """``pooled`` at 1e-5 against the formula over hidden states, in a few lines of torch."""
    settings = Settings(max_sequences=2, sequence_length=64, batch_size=1, dtype="bfloat16", sites=("block",))
    checkpoint = checkpoint_at(smollm2)
    shard = tokenize_corpus(CORPUS, load_tokenizer(checkpoint), settings).shards[0]
    replica = Replica(checkpoint, settings)
    result = analyze_shard(replica, shard, settings)
    scores = score_run(result.stats, [layer.name for layer in replica.layers])
    published = where(scores, recipe="pooled", threshold=1e-5, threshold_kind="absolute")
    ours = column(published, "avss")

    outputs: list[torch.Tensor] = []
    for layer in replica.layers:
        layer.module.register_forward_hook(lambda _module, _args, output: outputs.append(first_tensor(output)))
    replica.forward([*shard.batches(1)], no_observation)
    units = outputs[0].shape[-1]
    hidden = torch.stack(outputs).double().view(2, 30, -1, units)
    variance = hidden.mean(dim=2).var(dim=2).mean(dim=0)
    is_near_zero = hidden.abs() < 1e-5
    sparsity = is_near_zero.double().mean(dim=(0, 2, 3))
    avss = (variance / variance.sum()) / (sparsity / sparsity.sum())
    np.testing.assert_allclose(ours, avss.numpy(), rtol=1e-9)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_threshold_without_a_rerun_equals_a_rerun(smollm2: Path, dtype: str) -> None:
    """At 40 others: to the element in bfloat16; in float32 within 1%, and to the element at the edge of a bin."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.uniform(np.log(1e-4), np.log(3.0), 40))
    settings = Settings(max_sequences=2, sequence_length=48, batch_size=2, dtype=dtype)
    rerun = replace(settings, thresholds=(*drawn, 0.6875))
    checkpoint = checkpoint_at(smollm2)
    shard = tokenize_corpus(CORPUS, load_tokenizer(checkpoint), settings).shards[0]
    replica = Replica(checkpoint, settings)
    stored = analyze_shard(replica, shard, settings).stats
    counted = analyze_shard(replica, shard, rerun).stats
    for key, stats in counted.items():
        near_zero = stats.near_zero
        below = np.array([stored[key].below(threshold) for threshold in stats.thresholds])
        estimate, low, high = below.T
        assert (low <= near_zero).all(), key
        assert (near_zero <= high).all(), key
        if dtype == "bfloat16":
            assert np.array_equal(estimate, near_zero), key
        many = near_zero > 10_000
        assert estimate[many] == pytest.approx(near_zero[many], rel=0.01), key
        at = stats.thresholds.searchsorted(0.6875)
        assert estimate[at] == near_zero[at], key
