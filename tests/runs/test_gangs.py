"""Partitions of several ranks, in real processes over gloo: the numbers of one process, or a refusal.

By default the two ranks that all tests share are asked, with a family of each class of structure. Other families and
larger groups are of the nightly tier.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import open_whole, random_shard
from support.checkpoints import VOCABULARY, checkpoint_at, llama, one_thread, save_tokenizer
from support.families import lively, tiny_config, tiny_model
from support.json_files import read_json
from support.oracle import assert_close, assert_same_result
from support.quantized import block_fp8, mxfp4
from support.questions import answers, assert_same, composed, generated, write_questions
from support.rank_processes import SECONDS, Gang, free_port
from support.tiers import all_of, nightly
from torch.distributed.tensor import DTensor

from avss_dist.core.errors import AvssError, ConfigError, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Expert, Removal
from avss_dist.core.settings import Settings
from avss_dist.corpus.pairs import Pairing
from avss_dist.corpus.shards import Shard, tokenize_corpus
from avss_dist.evaluation.repairs import FitRepair
from avss_dist.measure.shard import analyze_shard, follow
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.patches import Patch, decode_patch
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.autotp import difference, inference_config, require_autotp
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.group import join, leave
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import open_replica, replica_class
from avss_dist.partition.sharded import Zero3Replica, deepspeed_config
from avss_dist.pruning.repair.repair import Repair
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, merge_values
from avss_dist.tasks.harness import harness_task
from avss_dist.tasks.map_damage import RoundedLosses
from avss_dist.tasks.task import Measure, MetricRow
from avss_dist.tasks.text_loss import TextLoss

SETTINGS = Settings(batch_size=2, dtype="float32", device="cpu")
CONFIGS = Path(__file__).parents[2] / "cluster" / "deepspeed"
SHARING = ("fsdp", "zero3")
SPLITTING = ("tensor_parallel", "expert_parallel")


def cases(
    default: Mapping[str, Sequence[str]], others: Mapping[str, Sequence[str]], larger: Sequence[tuple[str, int, str]]
) -> list[Any]:
    """Return rows (partition, ranks, family): two ranks and the default families; the others are nightly."""

    def of_two(families_of: Mapping[str, Sequence[str]]) -> list[tuple[str, int, str]]:
        rows = []
        for partition, families in families_of.items():
            rows += [(partition, 2, family) for family in families]
        return rows

    return [*of_two(default), *nightly(*of_two(others), *larger)]


@pytest.fixture(scope="module")
def gang(two_ranks: Gang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Gang]]:
    """Return the gang of a number of ranks; the gang of two is the one that all tests share."""
    gangs = {2: two_ranks}

    def of(world: int) -> Gang:
        if world not in gangs:
            gangs[world] = Gang(world, tmp_path_factory.mktemp("gang"))
        return gangs[world]

    yield of
    for world in gangs.keys() - {2}:
        gangs[world].stop()


@pytest.fixture
def own_gang(warm_server: None, tmp_path: Path) -> Iterator[Gang]:
    """Two ranks that a test may harm."""
    gang = Gang(2, tmp_path)
    yield gang
    gang.stop()


@pytest.fixture(scope="module", autouse=True)
def same_sums() -> Iterator[None]:
    """Compute with one thread, as the ranks do: sums are then added up in the same order."""
    with one_thread():
        yield


# Functions that ranks run.


def opened(partition: str, folder: Path, settings: Settings, *, head: bool = False) -> Any:
    world = torch.distributed.get_world_size()
    return open_replica(checkpoint_at(folder), settings, Placement(partition=partition, ranks=world), head=head)


def measure(
    partition: str, folder: Path, shards: Sequence[Shard], settings: Settings
) -> tuple[list[ShardResult], Mapping[str, Any], int]:
    """Return the results of this rank's shards, the replica's description, and the parameter bytes that it keeps."""
    replica = opened(partition, folder, settings)
    rank = 0
    step = 1
    if PARTITIONS[partition].splits_data:
        rank = torch.distributed.get_rank()
        step = torch.distributed.get_world_size()
    results = []
    for start in range(0, len(shards), step):
        round_shards = shards[start : start + step]
        forwards = max(math.ceil(shard.num_sequences / settings.batch_size) for shard in round_shards)
        if rank < len(round_shards):
            results.append(analyze_shard(replica, round_shards[rank], settings, forwards=forwards))
        else:
            follow(replica, forwards)
    held = resident_parameter_bytes(module_of(replica))
    model = {**replica.model, "data": (rank, step), "reports_stats": replica.reports_stats}
    replica.close()
    return results, model, held


def module_of(replica: Any) -> torch.nn.Module:
    """Return the whole model of a replica, of which this process has a part."""
    module: torch.nn.Module = replica._module if isinstance(replica, Zero3Replica) else replica._backbone.model
    return module


def resident_parameter_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of parameters that this process holds now: its part, and what is gathered."""
    held = []
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            held.append(parameter.to_local())
        else:
            held.append(parameter.data)
        # The part of a parameter that DeepSpeed has split.
        part = getattr(parameter, "ds_tensor", None)
        if part is not None:
            held.append(part)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def measure_alone_after_zero3(folder: Path, shard: Shard) -> tuple[int, int, ShardResult]:
    """Return the parameter bytes of an open and of a closed replica, and what this process measures alone then."""
    replica = opened("zero3", folder, SETTINGS)
    module = module_of(replica)
    before = resident_parameter_bytes(module)
    replica.close()
    assert torch.nn.functional.linear is torch._C._nn.linear
    return before, resident_parameter_bytes(module), single(folder, [shard])[0][0]


def floating_buffers(folder: Path, settings: Settings) -> list[torch.Tensor]:
    replica = opened("tensor_parallel", folder, settings)
    buffers = [buffer.clone() for buffer in module_of(replica).buffers() if buffer.is_floating_point()]
    replica.close()
    return buffers


@dataclass(frozen=True)
class Asked:
    """Answers of one rank.

    Attributes:
        tokens: tokens that the model generates without a layer, with a cache and without one.
        notes: notes of the model.
        reports: whether the answers of this rank count.
        batches: number of batches with tokens that this rank ran.
    """

    rows: dict[str, list[MetricRow]]
    tokens: list[int]
    notes: list[str]
    reports: bool
    batches: int


def ask(partition: str, folder: Path, skip: tuple[str, ...] = (), tasks: Sequence[Measure] = ()) -> Asked:
    """Ask the language model of this rank everything but the questions of some names; generate where it has tasks."""
    replica = opened(partition, folder, SETTINGS, head=True)
    model = replica.language_model
    batches = []
    losses = model.losses

    def counted(batch: Any) -> Any:
        if batch.observed.any():
            batches.append(batch)
        return losses(batch)

    model.losses = counted
    try:
        rows = reply(model, skip, tasks)
        tokens = generated(model)[0].tolist() if tasks else []
        return Asked(rows, tokens, [*model.notes], model.reports, len(batches))
    finally:
        replica.close()


def reply(model: LanguageModel, skip: tuple[str, ...], tasks: Sequence[Measure]) -> dict[str, list[MetricRow]]:
    without = NO_INTERVENTION.without(1)
    return answers(model, skip) | {f"task {i}": task(model, without) for i, task in enumerate(tasks)}


def fit_and_ask(
    partition: str, folder: Path, fit: FitRepair, removed: Sequence[Removal]
) -> tuple[Patch, Any, list[list[float]]]:
    replica = opened(partition, folder, fit.repair.settings, head=True)
    return fitted_by(replica.language_model, fit, removed)


def fitted_by(model: LanguageModel, fit: FitRepair, removed: Sequence[Removal]) -> tuple[Patch, Any, list[list[float]]]:
    """Return weights and cuts of the repair of a model without some parts; losses before, with it, and after."""
    without = NO_INTERVENTION.without(*removed)
    (row,) = fit(model, without)
    assert row.patch is not None
    patch, about = decode_patch(row.patch)
    before = losses_of(model, removed)
    with model.patched(patch):
        repaired = losses_of(model, removed)
    return patch, json.loads(about)["record"]["cuts"], [before, repaired, losses_of(model, removed)]


def losses_of(model: LanguageModel, removed: Sequence[Removal]) -> list[float]:
    rows = TextLoss(random_shard())(model, NO_INTERVENTION.without(*removed))
    losses = []
    for row in rows:
        losses += [float(value) for value in row.samples]
    return losses


def rejoin(port: int, seconds: float = SECONDS) -> None:
    rank = torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    leave()
    assert not torch.distributed.is_initialized()
    join(rank, world, "127.0.0.1", port, device=torch.device("cpu"), timeout_seconds=seconds)


# What they are given, and what is expected.


def make_shards(number: int, rows: Sequence[int] = (4,)) -> list[Shard]:
    """Return shards of 16 tokens a row, some of them padding; ``rows`` are repeated."""
    random = np.random.default_rng(0)
    shards = []
    for index in range(number):
        count = rows[index % len(rows)]
        shard = Shard(
            shard_id=index,
            input_ids=random.integers(3, 120, (count, 16)).astype(np.int32),
            lengths=random.integers(9, 17, count).astype(np.int32),
            skip_first_tokens=0,
            content_hash=f"shard {index}",
        )
        shards.append(shard)
    return shards


def changed(family: str, **values: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    config.update(values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def grouped_llama() -> Any:
    """Three key/value heads for six heads, and 50 units: neither two nor three ranks share them evenly."""
    return llama(hidden_size=48, intermediate_size=50, num_attention_heads=6, num_key_value_heads=3, head_dim=8)


ODD: dict[str, Callable[[], Any]] = {
    "grouped llama": grouped_llama,
    "one-headed llama": lambda: llama(num_key_value_heads=1),
    "three-headed mixture": lambda: changed("qwen3_moe", num_attention_heads=6, num_key_value_heads=3, head_dim=8),
    "one expert": lambda: changed("mixtral", num_local_experts=1, num_experts_per_tok=1),
    "three experts": lambda: changed("mixtral", num_local_experts=3),
}
STORED: dict[str, Callable[[Path, Path], Path]] = {"FP8": block_fp8, "MXFP4": mxfp4}


def build(family: str) -> Any:
    if family in ODD:
        return ODD[family]()
    return tiny_model({"bert": "masked", "gemma3": "image-text"}.get(family, "causal"), family)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny checkpoint; after `` in ``, a family's name has a form of storage."""
    parent = tmp_path_factory.mktemp("families")

    def saved(family: str) -> Path:
        folder = parent / family.replace(" ", "-")
        whole, _, form = family.partition(" in ")
        if not folder.exists() and form:
            STORED[form](saved(whole), folder)
        elif not folder.exists():
            build(family).save_pretrained(folder)
        return folder

    return saved


def single(folder: Path, shards: Sequence[Shard], settings: Settings = SETTINGS) -> tuple[list[ShardResult], Any]:
    replica = open_replica(checkpoint_at(folder), settings, Placement())
    results = [analyze_shard(replica, shard, settings) for shard in shards]
    model = replica.model
    replica.close()
    return results, model


def assert_equal(per_rank: Sequence[tuple[list[ShardResult], Any, int]], expected: Sequence[ShardResult]) -> None:
    """The results of all ranks, in the order of the shards, are equal to the bit."""
    results: list[ShardResult] = []
    for results_of_rank, _, _ in per_rank:
        results += results_of_rank
    results.sort(key=lambda result: result.shard_id)
    for actual, wanted in zip(results, expected, strict=True):
        assert_same_result(actual, wanted)


def assert_near(actual: Mapping[LayerKey, LayerStats], expected: Mapping[LayerKey, LayerStats], rtol: float) -> None:
    """Equal but for rounding, of which sums over ranks have another one.

    Float32 elements are then off by some 1e-7 of the RMS. Of a shard's 10,000, by the density of values around an edge,
    0.01 should be counted on its other side: two may. Of the thousands of cuts, one is crossed by about one element:
    eight may. Every other count is exact.
    """
    assert actual.keys() == expected.keys()
    for key, want in expected.items():
        got = actual[key]
        assert np.abs(got.near_zero - want.near_zero).max() <= 2, key
        assert np.abs(got.histogram - want.histogram).sum() <= 4, key
        moved = merge_values((got.abs_value, got.abs_value_count), (want.abs_value, -want.abs_value_count))[1]
        assert np.abs(moved).sum() <= 16, key
        for name in ("min", "max", "max_abs"):
            assert abs(getattr(got, name) - getattr(want, name)) <= rtol * want.max_abs, (key, name)
        moving = ("near_zero", "histogram", "abs_value", "abs_value_count", "min", "max", "max_abs")
        counted = {name: getattr(want, name) for name in moving}
        assert_close(replace(got, **counted), want, rtol=rtol, angle_atol=1e-4)


def partitioned(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a replica says of itself that must not depend on the partition."""
    return {k: v for k, v in model.items() if k not in ("partition", "data", "reports_stats")}


# Statistics.

MIXTURES = ("qwen2_moe", "llama4_text", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "phimoe", "minimax")
FSDP = ("gpt2", "opt", "gemma3_text", "bloom", "falcon", "mixtral", "qwen3_moe", "qwen2", "phi3", "gpt_neox", "gpt_oss")


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    cases(
        {"fsdp": ("gemma3",), "zero3": ("qwen3_moe",)},
        {
            "fsdp": (*FSDP, "bert", "mamba", "deepseek_v3", "glm4_moe", "olmoe", *MIXTURES),
            "zero3": ("gpt2", "opt", "gemma3_text", "bloom", "falcon", "bert", "mamba", "mixtral"),
        },
        [
            *product(("zero3",), (3,), ("grouped llama", "mixtral")),
            *product(("fsdp",), (3,), ("grouped llama", "gpt_oss")),
            *product(SHARING, (4,), ("gemma3", "qwen3_moe")),
        ],
    ),
)
def test_ranks_that_share_shards_give_the_bytes_of_one_process(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    """Shards of unequal sizes: in every round some rank runs dummy batches, in the last one most have nothing."""
    number = 2 * world + 1 if world > 2 else 3
    folder = folder_of(family)
    shards = make_shards(number, rows=(4, 1, 3))
    per_rank = gang(world).run(measure, partition, folder, shards, SETTINGS)
    expected, model = single(folder, shards)
    assert_equal(per_rank, expected)
    for rank, (results, of_rank, held) in enumerate(per_rank):
        assert [r.shard_id for r in results] == list(range(rank, number, world))
        assert of_rank["data"] == (rank, world)
        assert of_rank["reports_stats"] is True
        assert of_rank["partition"] == partition
        assert partitioned(of_rank) == partitioned(model)
        parts = (-(-len(p) // world) * p[0].numel() + world for p in build(family).parameters())
        assert held <= 4 * sum(parts)


BY_PLAN = ("llama", "qwen2", "gemma3_text", "gpt_neox", "phi", "cohere", "gptj", "starcoder2", "olmo2")
MIXED = ("qwen3_moe", "glm4_moe", "olmoe", "granitemoe", *MIXTURES)
SPREAD = ("mixtral", "deepseek_v3", *(family for family in MIXED if family != "llama4_text"))  # it has no plan
EXPERT_SUMS = ("gate_sum", "gated_norm_sum", "output_sum", "output_sum_sq", "router_entropy_sum")


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    cases(
        {
            "tensor_parallel": ("bert", "deepseek_v3"),  # bert by AutoTP
            "expert_parallel": ("gpt_oss",),
        },
        {
            "tensor_parallel": ("grouped llama", "phi3", "mixtral", *BY_PLAN, *MIXED),
            "expert_parallel": ("three-headed mixture", *SPREAD),
        },
        [
            ("tensor_parallel", 3, "grouped llama"),  # 17, 17 and 16 of 50 units
            *product(("tensor_parallel",), (4,), ("gpt_neox", "olmoe", "opt")),
            *product(("expert_parallel",), (4,), ("gpt_oss", "three-headed mixture")),
        ],
    ),
)
def test_ranks_that_split_matrices_give_the_numbers_of_one_process(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    """The head is split too, unless DeepSpeed does it. Every token is counted once for its experts."""
    folder = folder_of(family)
    shards = make_shards(2, rows=(4, 3))
    settings = replace(SETTINGS, experts=True)
    first, *others = gang(world).run(measure, partition, folder, shards, settings)
    expected, model = single(folder, shards, settings)
    for got, want in zip(first[0], expected, strict=True):
        assert_near(got.stats, want.stats, rtol=1e-4)
        assert got.experts is not None
        assert want.experts is not None
        assert got.experts.keys() == want.experts.keys()
        for layer, sums in want.experts.items():
            for name in ("routed_tokens", "output_count", "token_count"):
                assert np.array_equal(getattr(got.experts[layer], name), getattr(sums, name)), (layer, name)
            for name in EXPERT_SUMS:
                np.testing.assert_allclose(getattr(got.experts[layer], name), getattr(sums, name), rtol=1e-4, atol=1e-4)
    assert first[1]["reports_stats"] is True
    assert first[1]["data"] == (0, 1)
    for results, model_of_rank, _ in others:
        assert not any(result.stats for result in results)
        assert model_of_rank["reports_stats"] is False
        assert model_of_rank["data"] == (0, 1)
    assert partitioned(first[1]) == partitioned(model)


def test_ranks_measure_paired_text(two_ranks: Gang, folder_of: Callable[[str], Path]) -> None:
    """Ranks that split matrices measure the answers of some rows each, and the first one has all, in their order."""
    folder = folder_of("llama")
    (shard,) = make_shards(1)
    strata = ("good", "bad", "good", "bad")
    pairing = Pairing(rows=np.arange(7, 11), pairs=np.arange(4) // 2, strata=strata, starts=np.zeros(4, np.int32))
    paired = [replace(shard, pairing=pairing)]
    (((got,), _, _), _) = two_ranks.run(measure, "tensor_parallel", folder, paired, SETTINGS)
    (((alone,), _, _), _) = two_ranks.run(measure, "zero3", folder, paired, SETTINGS)
    (want,), _ = single(folder, paired)
    assert_near(got.stats, want.stats, rtol=1e-4)
    assert got.strata.keys() == want.strata.keys()
    for key, stats in want.strata.items():
        assert got.strata[key].count == stats.count
    assert alone.strata.keys() == want.strata.keys()
    assert all(alone.strata[key].equals(stats) for key, stats in want.strata.items())
    assert got.rows
    assert want.rows
    assert got.rows["row"].tolist() == [7, 8, 9, 10] * len(want.stats)
    for name in ("layer", "site", "row", "pair", "stratum", "prompt_tokens", "answer_tokens"):
        np.testing.assert_array_equal(got.rows[name], want.rows[name])
    for name in ("count", "norm", "m2", "pooled_variance"):
        np.testing.assert_allclose(got.rows[name], want.rows[name], rtol=1e-4)


def test_zero3_in_bfloat16(two_ranks: Gang, folder_of: Callable[[str], Path]) -> None:
    settings = replace(SETTINGS, dtype="bfloat16")
    shards = make_shards(3)
    folder = folder_of("mixtral")
    per_rank = two_ranks.run(measure, "zero3", folder, shards, settings)
    expected, model = single(folder, shards, settings)
    assert_equal(per_rank, expected)
    assert per_rank[0][1]["dtype"] == model["dtype"] == "bfloat16"


def test_tensor_parallel_in_bfloat16(two_ranks: Gang, folder_of: Callable[[str], Path]) -> None:
    """Sums of 8 significant bits; but rotary frequencies stay in float32, for positions far apart need more."""
    settings = replace(SETTINGS, dtype="bfloat16")
    shards = make_shards(1)
    folder = folder_of("llama")
    (((result,), _, _), _) = two_ranks.run(measure, "tensor_parallel", folder, shards, settings)
    (want,), _ = single(folder, shards, settings)
    assert result.stats.keys() == want.stats.keys()
    for key, stats in want.stats.items():
        assert result.stats[key].count == stats.count
        assert result.stats[key].rms == pytest.approx(stats.rms, rel=0.02)
    buffers = [b for b in build("llama").buffers() if b.is_floating_point()]
    for buffers_of_rank in two_ranks.run(floating_buffers, folder, settings):
        assert len(buffers_of_rank) == len(buffers) > 0
        for actual, wanted in zip(buffers_of_rank, buffers, strict=True):
            assert torch.equal(actual, wanted)
            assert actual.dtype == wanted.dtype


@pytest.mark.parametrize("partition", all_of([*SHARING, *SPLITTING], ["tensor_parallel"]))
def test_unpacked_weights(two_ranks: Gang, folder_of: Callable[[str], Path], partition: str) -> None:
    """Block FP8 of which every rank reads whole blocks, or all: the numbers of one process that unpacks it."""
    folder = folder_of("qwen3_moe in FP8")
    settings = replace(SETTINGS, dequantize=True)
    shards = make_shards(2, rows=(4, 4))
    per_rank = two_ranks.run(measure, partition, folder, shards, settings)
    expected, _ = single(folder, shards, settings)
    if partition in SHARING:
        assert_equal(per_rank, expected)
        return
    for actual, wanted in zip(per_rank[0][0], expected, strict=True):
        assert_near(actual.stats, wanted.stats, rtol=1e-4)


# Answers.


def unanswered(partition: str, family: str) -> tuple[str, ...]:
    """Return the names of questions that a family is not asked."""
    skip = composed(family, partition)
    if partition in SPLITTING:
        skip = (*skip, "rounded", "gradients of rounded")
    if (partition, family) == ("tensor_parallel", "opt"):
        skip = (*skip, "gradients")
    return skip


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    cases(
        {
            "fsdp": ("gpt2",),
            "tensor_parallel": ("gpt_neox",),
        },
        {
            "fsdp": ("llama", "gemma3", "gpt_neox", "mamba", "qwen3_moe"),
            "zero3": ("gpt2", "llama", "gemma3", "gpt_neox", "mamba", "qwen3_moe"),
            "tensor_parallel": ("llama", "gemma3", "mixtral", "opt"),  # opt by AutoTP
            "expert_parallel": ("gpt_oss", "qwen3_moe"),
        },
        [
            *(("fsdp", 4, "llama"), ("zero3", 4, "qwen3_moe")),
            *(("tensor_parallel", 4, "gpt_neox"), ("expert_parallel", 4, "qwen3_moe")),
        ],
    ),
)
def test_ranks_answer_as_one_process_does(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    """Ranks that share batches give the same bits; of three batches, one has a dummy. All ranks have all answers."""
    skip = unanswered(partition, family)
    asked = gang(world).run(ask, partition, folder_of(family), skip)
    expected = reply(open_whole(checkpoint_at(folder_of(family)), SETTINGS), skip, ())
    assert [of_rank.reports for of_rank in asked] == [True, *[False] * (world - 1)]
    for of_rank in asked:
        assert_same(of_rank.rows, expected, rtol=0.0 if partition in SHARING else 1e-4)
    if partition in SHARING:
        share = asked[0].batches // (2 if world == 2 else 1)
        assert [of_rank.batches for of_rank in asked] == (
            [2 * share, share] if world == 2 else [share, share, share, 0]
        )


@pytest.mark.parametrize(
    ("partition", "family"), [("fsdp", "gemma3"), *nightly(("tensor_parallel", "llama"), ("zero3", "llama"))]
)
def test_ranks_answer_the_harness_and_generate_as_one_process_does(
    partition: str, family: str, two_ranks: Gang, tmp_path: Path
) -> None:
    """One family with windows in its cache."""
    folder = save_tokenizer(tmp_path / "model")
    model = build(family)
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder)
    tasks = harness_task(write_questions(tmp_path)).parts
    whole = open_whole(checkpoint_at(folder), SETTINGS)
    expected = reply(whole, ("",), tasks)
    tokens = generated(whole)[0].tolist()
    for answered in two_ranks.run(ask, partition, folder, ("",), tasks):
        assert_same(answered.rows, expected, rtol=1e-6)
        assert answered.tokens == tokens
        assert answered.notes == []


LAYER = [2]
EXPERTS = [Expert(1, 0), Expert(2, 1)]


@pytest.mark.parametrize(
    ("partition", "world", "by", "removed"),
    [
        ("fsdp", 2, "refit_all", LAYER),
        *nightly(("zero3", 2, "map", EXPERTS)),
        *nightly(
            *product(("fsdp",), (2,), ("channel", "map", "refit", "borrow"), (LAYER,)), ("fsdp", 2, "map", EXPERTS)
        ),
        *nightly(*product(("zero3",), (2,), ("channel", "map", "refit", "borrow", "refit_all"), (LAYER,))),
        *nightly(("fsdp", 3, "map", LAYER), ("zero3", 3, "refit_all", LAYER)),
    ],
)
def test_ranks_that_share_batches_fit_the_repair_of_one_process(
    partition: str, world: int, by: str, removed: list[Removal], gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """Of five batches, so that one rank has none left; equal but for the order of sums, and in place to the bit."""
    lively(build("qwen3_moe") if removed == EXPERTS else llama(num_hidden_layers=5)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    settings = replace(SETTINGS, max_sequences=20, sequence_length=32, batch_size=4)
    checkpoint = checkpoint_at(tmp_path)
    text = tokenize_corpus("builtin:pydoc", load_tokenizer(checkpoint), settings)
    repair = Repair(by=by, corpora=("builtin:pydoc",), settings=settings)
    fit = FitRepair(repair=repair, layers="layers", texts=(text,))
    patch, cuts, _ = fitted_by(open_whole(checkpoint, settings), fit, removed)
    assert len(cuts) == (3 if by == "refit_all" else len(removed))
    assert all(cut["error_after"] < cut["error_before"] for cut in cuts)
    if removed == EXPERTS:
        assert [cut["experts"] for cut in cuts] == [[0], [1]]
    for fitted, fitted_cuts, (before, repaired, after) in gang(world).run(
        fit_and_ask, partition, tmp_path, fit, removed
    ):
        for ours, theirs in zip(fitted_cuts, cuts, strict=True):
            assert ours["ridges"] == theirs["ridges"]
            assert ours["error_before"] == pytest.approx(theirs["error_before"], rel=1e-5)
            assert ours["error_after"] == pytest.approx(theirs["error_after"], rel=1e-4)
        assert fitted.keys() == patch.keys()
        for name, weights in patch.items():
            torch.testing.assert_close(fitted[name], weights, rtol=1e-3, atol=1e-5)
        whole = open_whole(checkpoint, settings)
        with whole.patched(fitted):
            assert repaired == losses_of(whole, removed)
        assert before == after != repaired


# Refusals.


@pytest.mark.parametrize(
    ("partition", "family", "change", "kind", "message", "hint"),
    [
        ("fsdp", "one expert", {}, ConfigError, "one of 2 ranks without any of the 1 experts of a layer", "zero3"),
        ("fsdp", "grouped llama in FP8", {"dequantize": True}, ConfigError, "2 ranks do not divide the", "`ranks`"),
        ("fsdp", "gpt_oss in MXFP4", {}, ConfigError, "ranks of fsdp cannot gather them", ""),
        ("zero3", "gpt_oss in MXFP4", {}, ConfigError, "ranks of zero3 cannot gather them", ""),
        ("tensor_parallel", "gpt_oss in MXFP4", {}, ConfigError, "takes none that stay quantized", ""),
        ("tensor_parallel", "one-headed llama", {}, ConfigError, "2 ranks cannot share 1 heads (num_key_value", "Use"),
        ("tensor_parallel", "bert", {"attention": "flash_attention_2"}, ConfigError, "", "Set `attention` to sdpa."),
        ("tensor_parallel", "gpt2", {}, ConfigError, "Neither transformers nor DeepSpeed can split a gpt2", ""),
        # DeepSpeed takes Persimmon, whose keys, queries and values lie head by head, and mixes them up.
        ("tensor_parallel", "persimmon", {}, ModelError, "cannot split a persimmon model (Persimmon", "zero3"),
        ("tensor_parallel", "persimmon", {}, ModelError, "of layer 0 is off by 0.", ""),
        ("expert_parallel", "three experts", {}, ConfigError, "2 ranks do not divide the 3 experts of a layer", ""),
        ("expert_parallel", "llama", {}, ConfigError, "no plan that spreads experts of LlamaForCausalLM", ""),
    ],
)
def test_models_that_ranks_cannot_share_are_refused(
    two_ranks: Gang,
    folder_of: Callable[[str], Path],
    partition: str,
    family: str,
    change: dict[str, Any],
    kind: type[AvssError],
    message: str,
    hint: str,
) -> None:
    outcomes = two_ranks.outcomes(measure, partition, folder_of(family), make_shards(1), replace(SETTINGS, **change))
    for error in outcomes:
        assert isinstance(error, kind)
        assert message in error.message
        assert hint in str(error.hint)


ALL_BUT_GRADIENTS = ("loss", "leave", "sublayers", "shapley", "propagated")


@pytest.mark.parametrize(
    ("family", "skip", "tasks", "message"),
    [
        ("llama", ("",), [RoundedLosses(random_shard(), "int4")], "Each rank has a part of each weight"),
        ("opt", ALL_BUT_GRADIENTS, [], "tensor_parallel has no gradients of a opt model"),  # DeepSpeed splits it
    ],
)
def test_ranks_that_split_matrices_refuse_questions(
    two_ranks: Gang,
    folder_of: Callable[[str], Path],
    family: str,
    skip: tuple[str, ...],
    tasks: list[Measure],
    message: str,
) -> None:
    for error in two_ranks.outcomes(ask, "tensor_parallel", folder_of(family), skip, tasks):
        assert isinstance(error, ModelError)
        assert message in error.message


@pytest.mark.parametrize("partition", SHARING)
def test_a_gguf_file_is_not_opened_in_parts(partition: str) -> None:
    checkpoint = Checkpoint(name="tiny.gguf", source="gguf", path="/tiny.gguf", revision="0")
    with pytest.raises(ConfigError, match=rf"'tiny.gguf' is a .gguf file.*every process, so that {partition} would"):
        replica_class(partition).require_ranks(partition, checkpoint, SETTINGS, 2)


def test_one_rank_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="`partition` zero3 with one rank spreads nothing"):
        open_replica(checkpoint_at(tiny_llama), SETTINGS, Placement(partition="zero3"))


def test_heads_are_counted_by_what_the_configuration_calls_them() -> None:
    for family, heads in {"bloom": 4, "falcon": 2, "llama": 2}.items():
        config = build(family).config
        require_autotp(config, heads)
        with pytest.raises(ConfigError, match=f"{heads + 1} ranks cannot share") as refused:
            require_autotp(config, heads + 1)
        assert f"Set `ranks` to {heads} at most. Use `partition` single," in str(refused.value.hint)


# Groups.


def test_a_process_that_has_left_zero3_measures_alone(two_ranks: Gang, folder_of: Callable[[str], Path]) -> None:
    """It holds nothing of the last model, and loads the next one whole."""
    folder = folder_of("gpt2")
    (shard,) = make_shards(1)
    (expected,), _ = single(folder, [shard])
    for before, after, result in two_ranks.run(measure_alone_after_zero3, folder, shard):
        assert before > 0
        assert after == 0
        assert_same_result(result, expected)


def test_a_process_can_join_another_group(own_gang: Gang, folder_of: Callable[[str], Path]) -> None:
    """Nothing is printed on stdout meanwhile, by DeepSpeed for example, also where it refuses a model."""
    folder = folder_of("llama")
    shards = make_shards(2)
    own_gang.outcomes(measure, "tensor_parallel", folder_of("gpt2"), shards, SETTINGS)
    own_gang.run(rejoin, free_port())
    expected, _ = single(folder, shards)
    assert_equal(own_gang.run(measure, "zero3", folder, shards, SETTINGS), expected)
    first, _ = own_gang.run(measure, "tensor_parallel", folder, shards, SETTINGS)
    assert_near(first[0][1].stats, expected[1].stats, rtol=1e-4)
    own_gang.run(measure, "fsdp", folder, shards, SETTINGS)
    assert [path.read_text() for path in own_gang.stdout] == ["", ""]


@pytest.mark.parametrize("partition", ["fsdp", *nightly("zero3", "tensor_parallel")])
def test_a_lost_rank_is_no_mistake_of_the_user(
    own_gang: Gang, folder_of: Callable[[str], Path], partition: str
) -> None:
    """The other one fails, instead of waiting for ever, in a way that can be tried again."""
    own_gang.run(os.getpid)
    own_gang.lose(1)
    (error,) = own_gang.outcomes(measure, partition, folder_of("llama"), make_shards(1), SETTINGS)
    assert isinstance(error, RuntimeError)
    assert "gloo/" in str(error)


@pytest.mark.nightly
def test_a_frozen_rank_is_waited_for_no_longer_than_said(own_gang: Gang, folder_of: Callable[[str], Path]) -> None:
    """The first failure names the time; later ones only say that gloo gave up, and are no mistakes either."""
    own_gang.run(rejoin, free_port(), 10.0)
    own_gang.freeze(1)
    for message in ("Timed out waiting 10000ms", "pair closure"):
        (error,) = own_gang.outcomes(measure, "tensor_parallel", folder_of("llama"), make_shards(1), SETTINGS)
        assert isinstance(error, RuntimeError)
        assert message in str(error)


def test_difference_is_of_the_median_token() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0], [30.0, 40.0], [1.0, 0.0]])
    assert difference(expected, expected) == 0.0
    assert difference(expected, expected * 1.5) == pytest.approx(0.5)
    assert difference(expected, torch.full_like(expected, torch.nan)) == torch.inf
    one_token_elsewhere = expected.clone()
    one_token_elsewhere[3] = -7.0
    assert difference(expected, one_token_elsewhere) == 0.0
    assert difference(torch.full((2, 2), torch.nan), torch.zeros(2, 2)) == 0.0


def test_the_documented_configurations_are_those_in_use() -> None:
    assert read_json(CONFIGS / "zero3.json") == deepspeed_config(torch.bfloat16, torch.device("cuda"))
    assert read_json(CONFIGS / "tensor_parallel.json") == inference_config(torch.bfloat16, 2)
