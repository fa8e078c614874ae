"""Partitions of several ranks, in real processes over gloo: the same statistics as one process, or a refusal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import open_whole, random_shard
from support.checkpoints import llama, save_tokenizer
from support.tiers import all_of
from support.families import lively, tiny_config, tiny_model
from support.oracle import assert_close
from support.quantized import block_fp8, mxfp4
from support.questions import answers, assert_same, composed, generated, write_questions
from support.rank_processes import SECONDS, Gang, free_port
from torch.distributed.tensor import DTensor

from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Expert, Removal
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.corpus.pairs import Pairing
from avss_dist.corpus.shards import Shard, tokenize_corpus
from avss_dist.evaluation.repairs import FitRepair
from avss_dist.measure.shard import analyze_shard, follow
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.models.patching import Patch, decode_patch
from avss_dist.partition.autotp import difference, inference_config, require_heads
from avss_dist.partition.base import Placement
from avss_dist.partition.group import join, leave
from avss_dist.partition.open import open_replica
from avss_dist.partition.zero3 import Zero3Replica, deepspeed_config
from avss_dist.pruning.repair.repair import Repair
from avss_dist.stats.histogram import merge_values
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult
from avss_dist.tasks.base import Measure, Row, TextLoss
from avss_dist.tasks.harness import harness_task
from avss_dist.tasks.rounding import RoundedLosses, RoundingDamage

SETTINGS = Settings(batch_size=2, dtype="float32", device="cpu")
CONFIGS = Path(__file__).parents[2] / "cluster" / "deepspeed"


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Gang]]:
    """The gang of so many ranks, started when it is first asked for."""
    gangs: dict[int, Gang] = {}

    def of(world: int) -> Gang:
        if world not in gangs:
            gangs[world] = Gang(world, tmp_path_factory.mktemp("gang"))
        return gangs[world]

    yield of
    for started in gangs.values():
        started.stop()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: sums are then added up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What the ranks do.


def opened(partition: str, folder: Path, settings: Settings, *, head: bool = False) -> Any:
    world = torch.distributed.get_world_size()
    return open_replica(resolve(str(folder)), settings, Placement(partition=partition, ranks=world), head=head)


def measure(
    partition: str, folder: Path, shards: Sequence[Shard], settings: Settings
) -> tuple[list[ShardResult], Mapping[str, Any], int]:
    """The results of this rank's shards, what the replica says of itself, and the parameter bytes that it keeps."""
    replica = opened(partition, folder, settings)
    rank, step = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if PARTITIONS[partition].splits_data
        else (0, 1)
    )
    results = []
    for start in range(0, len(shards), step):
        now = shards[start : start + step]
        forwards = max(math.ceil(shard.num_sequences / settings.batch_size) for shard in now)
        if rank < len(now):
            results.append(analyze_shard(replica, now[rank], settings, forwards=forwards))
        else:
            follow(replica, forwards)
    held = resident_parameter_bytes(module_of(replica))
    model = {**replica.model, "data": (rank, step), "reports_stats": replica.reports_stats}
    replica.close()
    return results, model, held


def module_of(replica: Any) -> torch.nn.Module:
    """The whole model of a replica, of which this process has a part."""
    module: torch.nn.Module = replica._module if isinstance(replica, Zero3Replica) else replica._backbone.model
    return module


def resident_parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters that this process holds now: its part, and what is gathered."""
    here = [p.to_local() if isinstance(p, DTensor) else p.data for p in module.parameters()]
    held = [*here, *(getattr(p, "ds_tensor", None) for p in module.parameters())]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def bytes_after_close(folder: Path) -> tuple[int, int]:
    replica = opened("zero3", folder, SETTINGS)
    module = module_of(replica)
    before = resident_parameter_bytes(module)
    replica.close()
    return before, resident_parameter_bytes(module)


def rejoin(port: int, seconds: float = SECONDS) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    leave()
    assert not torch.distributed.is_initialized()
    join(rank, world, "127.0.0.1", port, device=torch.device("cpu"), timeout_seconds=seconds)


# What they are given, and what is expected.


def make_shards(number: int, rows: Sequence[int] = (4,)) -> list[Shard]:
    """Shards of 16 tokens a row, some of them padding; ``rows`` are repeated."""
    random = np.random.default_rng(0)
    shards = []
    for index in range(number):
        count = rows[index % len(rows)]
        shards.append(
            Shard(
                shard_id=index,
                input_ids=random.integers(3, 120, (count, 16)).astype(np.int32),
                lengths=random.integers(9, 17, count).astype(np.int32),
                skip_first_tokens=0,
                content_hash=f"shard {index}",
            )
        )
    return shards


def grouped_llama() -> Any:
    """Three key/value heads for six heads, and 50 units: neither two nor three ranks share them evenly."""
    return llama(hidden_size=48, intermediate_size=50, num_attention_heads=6, num_key_value_heads=3, head_dim=8)


def three_headed_mixture() -> Any:
    """Four experts, which two ranks share, and three heads, which they do not."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen3_moe")
    config.update({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def build(family: str) -> Any:
    if family == "grouped llama":
        return grouped_llama()
    if family == "three-headed mixture":
        return three_headed_mixture()
    return tiny_model({"bert": "masked", "gemma3": "image-text"}.get(family, "causal"), family)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint."""
    parent = tmp_path_factory.mktemp("families")

    def saved(family: str) -> Path:
        folder = parent / family.replace(" ", "-")
        if not folder.exists():
            build(family).save_pretrained(folder)
        return folder

    return saved


def single(folder: Path, shards: Sequence[Shard], settings: Settings = SETTINGS) -> tuple[list[ShardResult], Any]:
    replica = open_replica(resolve(str(folder)), settings, Placement())
    results = [analyze_shard(replica, shard, settings) for shard in shards]
    model = replica.model
    replica.close()
    return results, model


def merged(per_rank: Sequence[tuple[list[ShardResult], Any, int]]) -> list[ShardResult]:
    return sorted((r for results, _, _ in per_rank for r in results), key=lambda result: result.shard_id)


def assert_equal(actual: Sequence[ShardResult], expected: Sequence[ShardResult]) -> None:
    """Equal to the last bit."""
    assert [r.shard_id for r in actual] == [r.shard_id for r in expected]
    for got, want in zip(actual, expected, strict=True):
        assert (got.layers, got.num_tokens, got.stats.keys()) == (want.layers, want.num_tokens, want.stats.keys())
        assert all(got.stats[key].equals(want.stats[key]) for key in want.stats)


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
        moved = merge_values(got.values, (want.abs_value, -want.abs_value_count))[1]
        assert np.abs(moved).sum() <= 16, key
        for name in ("min", "max", "max_abs"):
            assert abs(getattr(got, name) - getattr(want, name)) <= rtol * want.max_abs, (key, name)
        moving = ("near_zero", "histogram", "abs_value", "abs_value_count", "min", "max", "max_abs")
        counted = {name: getattr(want, name) for name in moving}
        assert_close(replace(got, **counted), want, rtol=rtol, angle_atol=1e-4)


def partitioned(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a replica says of itself that must not depend on the partition."""
    return {k: v for k, v in model.items() if k not in ("partition", "data", "reports_stats")}


# Ranks that share shards: FSDP2 and ZeRO-3.

DENSE = ("gpt2", "opt", "gemma3_text", "bloom", "falcon", "bert")
OTHERS = ("mixtral", "qwen3_moe", "mamba")
MORE_MIXTURES = ("qwen2_moe", "llama4_text", "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "phimoe", "minimax")
FSDP = (*DENSE, *OTHERS, "qwen2", "phi3", "gpt_neox", "gemma3", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe")


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    [
        *(("zero3", 3, family) for family in ("grouped llama", "mixtral")),
        *(("fsdp", 3, family) for family in ("grouped llama", "gpt_oss")),
        *all_of(
            [
                *(("fsdp", 2, family) for family in (*FSDP, *MORE_MIXTURES)),
                *(("zero3", 2, family) for family in DENSE + OTHERS),
                *product(("fsdp", "zero3"), (4,), ("llama", "gpt2", "gemma3", "qwen3_moe", "mixtral")),
            ],
            [
                *(("fsdp", 2, family) for family in ("gemma3", "bert", "mamba")),
                *(("zero3", 2, family) for family in ("gpt2", "mamba", "qwen3_moe")),
            ],
        ),
    ],
)
def test_ranks_that_share_shards_give_the_bytes_of_one_process(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    """Shards of unequal sizes: in every round some rank runs dummy batches, in the last one most have nothing."""
    number = 2 * world + 1 if world > 2 else 3
    folder, shards = folder_of(family), make_shards(number, rows=(4, 1, 3))
    per_rank = gang(world).run(measure, partition, folder, shards, SETTINGS)
    expected, model = single(folder, shards)
    assert_equal(merged(per_rank), expected)
    for rank, (results, of_rank, held) in enumerate(per_rank):
        assert [r.shard_id for r in results] == list(range(rank, number, world))
        assert (of_rank["data"], of_rank["reports_stats"], of_rank["partition"]) == ((rank, world), True, partition)
        assert partitioned(of_rank) == partitioned(model)
        parts = (-(-len(p) // world) * p[0].numel() + world for p in build(family).parameters())
        assert held <= 4 * sum(parts)


def test_fsdp_needs_an_expert_for_every_rank(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    for error in gang(3).outcomes(measure, "fsdp", folder_of("mixtral"), make_shards(1), SETTINGS):
        assert isinstance(error, ConfigError)
        assert "one of 3 ranks without any of the 4 experts of a layer" in error.message


Asked = tuple[dict[str, list[Row]], bool, int]


def ask_all(
    partition: str, folders: Sequence[Path], skip: tuple[str, ...] = (), tasks: Sequence[Measure] = ()
) -> list[Asked | Exception]:
    """Of each model, what this rank of a replica answers, whether that counts, and how many batches it had."""
    return [
        _asked(
            partition, folder, (*skip, *unanswered(partition, folder.name), *composed(folder.name, partition)), tasks
        )
        for folder in folders
    ]


def _asked(partition: str, folder: Path, skip: tuple[str, ...], tasks: Sequence[Measure]) -> Asked | Exception:
    replica = opened(partition, folder, SETTINGS, head=True)
    model = replica.language_model
    batches, losses = [], model.losses
    model.losses = lambda batch: (batches.append(batch) if batch.observed.any() else None, losses(batch))[1]
    try:
        found = answers(model, skip) | {
            f"task {i}": task(model, NO_INTERVENTION.without(1)) for i, task in enumerate(tasks)
        }
        return found, model.reports, len(batches)
    except ModelError as error:
        return error
    finally:
        replica.close()


def expected_of(
    folder: Path, partition: str, skip: tuple[str, ...] = (), tasks: Sequence[Measure] = ()
) -> dict[str, list[Row]]:
    model = open_whole(resolve(str(folder)), SETTINGS)
    return answers(model, (*skip, *composed(folder.name, partition))) | {
        f"task {i}": task(model, NO_INTERVENTION.without(1)) for i, task in enumerate(tasks)
    }


SHARED = ("llama", "gemma3", "gpt_neox", "gpt2", "mamba", "qwen3_moe")  # the statistics of others are measured above
SPLIT = ("llama", "gemma3", "gpt_neox", "mixtral", "opt")  # and below; opt by AutoTP
MIXTURES = ("qwen3_moe", "gpt_oss")
ASKED = {"fsdp": SHARED, "zero3": SHARED, "tensor_parallel": SPLIT, "expert_parallel": MIXTURES}


def unanswered(partition: str, family: str) -> tuple[str, ...]:
    """Questions that a family is not asked."""
    if not PARTITIONS[partition].splits_matrices:
        return ()
    rounded = ("rounded", "gradients of rounded")
    return (*rounded, "gradients") if (partition, family) == ("tensor_parallel", "opt") else rounded


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    all_of(
        [*product(("fsdp", "zero3"), (2,), SHARED), *product(("fsdp", "zero3"), (4,), ("llama", "qwen3_moe"))],
        [
            *(("fsdp", 2, family) for family in ("llama", "gemma3")),
            *(("zero3", 2, family) for family in ("llama", "mamba", "qwen3_moe")),
        ],
    ),
)
def test_ranks_that_share_batches_answer_as_one_process_does(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    """Ranks share three batches, so that one has a dummy; all have all answers, to the bit, gradients too."""
    expected = expected_of(folder_of(family), partition)
    found, counts, batches = zip(
        *(asked for (asked,) in gang(world).run(ask_all, partition, [folder_of(family)])), strict=True
    )
    assert counts == (True, *[False] * (world - 1))
    for answers_of_rank in found:
        assert_same(answers_of_rank, expected)
    share = batches[0] // (2 if world == 2 else 1)
    assert batches == ((2 * share, share) if world == 2 else (share, share, share, 0))


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    all_of(
        [
            *(
                (partition, 2, family)
                for partition in ("tensor_parallel", "expert_parallel")
                for family in ASKED[partition]
            ),
            *(("tensor_parallel", 4, "gpt_neox"), ("expert_parallel", 4, "qwen3_moe")),
        ],
        [
            *(("tensor_parallel", 2, family) for family in ("llama", "mixtral", "opt")),
            ("expert_parallel", 2, "qwen3_moe"),
        ],
    ),
)
def test_ranks_that_split_matrices_answer_as_one_process_does(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    found, counts, _ = zip(
        *(asked for (asked,) in gang(world).run(ask_all, partition, [folder_of(family)])), strict=True
    )
    assert counts == (True, *[False] * (world - 1))
    expected = expected_of(folder_of(family), partition, unanswered(partition, family))
    for answers_of_rank in found:
        assert_same(answers_of_rank, expected, rtol=1e-4)


def test_split_weights_are_not_rounded(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    for measure in (RoundedLosses(random_shard(), "int4"), RoundingDamage(shard=random_shard(), formats=("int4",))):
        for (error,) in gang(2).run(ask_all, "tensor_parallel", [folder_of("llama")], ("",), (measure,)):
            assert isinstance(error, ModelError)
            assert "Each rank has a part of each weight" in error.message


def test_autotp_has_no_gradients(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    """Two ranks do not divide three heads, so that DeepSpeed splits the model."""
    skip = ("loss", "leave", "sublayers", "shapley", "propagated")
    for (error,) in gang(2).run(ask_all, "tensor_parallel", [folder_of("grouped llama")], skip):
        assert isinstance(error, ModelError)
        assert "tensor_parallel has no gradients of a llama model" in error.message


@pytest.mark.parametrize("partition", ["fsdp", "zero3", "tensor_parallel"])
def test_gangs_answer_the_harness_as_one_process_does(
    partition: str, gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    folder = save_tokenizer(tmp_path / "model")
    grouped_llama().save_pretrained(folder)
    skip, tasks = ("",), harness_task(write_questions(tmp_path)).parts
    ((found, _, _),), _ = gang(2).run(ask_all, partition, [folder], skip, tasks)
    assert_same(found, expected_of(folder, partition, skip, tasks), rtol=1e-6)


def fit_and_ask(
    partition: str, folder: Path, fit: FitRepair, removed: Sequence[Removal]
) -> tuple[Patch, Any, list[list[float]]]:
    replica = opened(partition, folder, fit.repair.settings, head=True)
    return fitted_by(replica.language_model, fit, removed)


def fitted_by(model: LanguageModel, fit: FitRepair, removed: Sequence[Removal]) -> tuple[Patch, Any, list[list[float]]]:
    """Weights and cuts of the repair of a model without some parts; losses before, with it, and after."""
    without = NO_INTERVENTION.without(*removed)
    (row,) = fit(model, without)
    assert row.patch is not None
    patch, about = decode_patch(row.patch)
    measure = TextLoss(random_shard())

    def ask() -> list[float]:
        return [float(value) for row in measure(model, without) for value in row.samples]

    before = ask()
    with model.patched(patch):
        repaired = ask()
    return patch, json.loads(about)["record"]["cuts"], [before, repaired, ask()]


@pytest.mark.parametrize(
    ("partition", "by", "ranks"),
    all_of(
        [*product(("fsdp", "zero3"), ("channel", "map", "refit", "refit_all"), (2, 3))],
        [("fsdp", "refit_all", 2), ("fsdp", "map", 3), ("zero3", "refit", 2)],
    ),
)
def test_ranks_that_share_batches_fit_the_repair_of_one_process(
    partition: str, by: str, ranks: int, gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """Of five batches, so that one rank has none left; equal but for the order of sums, and in place to the bit."""
    lively(llama(num_hidden_layers=5)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    of_ranks, cuts = repaired_by_ranks(partition, by, gang(ranks), tmp_path, [2])
    assert len(cuts) == (3 if by == "refit_all" else 1)
    assert all(before == after != repaired for before, repaired, after in of_ranks)


@pytest.mark.parametrize("partition", ["fsdp", "zero3"])
def test_ranks_that_share_batches_fit_the_remaining_experts(
    partition: str, gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    lively(build("qwen3_moe")).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    _, cuts = repaired_by_ranks(partition, "map", gang(2), tmp_path, [Expert(1, 0), Expert(2, 1)])
    assert [cut["experts"] for cut in cuts] == [[0], [1]]


def repaired_by_ranks(
    partition: str, by: str, gang: Gang, folder: Path, removed: Sequence[Removal]
) -> tuple[list[list[list[float]]], list[dict[str, Any]]]:
    """Losses of each rank and cuts of a repair, whose weights are compared with those of one process."""
    settings = replace(SETTINGS, max_sequences=20, sequence_length=32, batch_size=4)
    checkpoint = resolve(str(folder))
    text = tokenize_corpus("builtin:pydoc", load_tokenizer(checkpoint), settings)
    repair = Repair(by=by, corpora=("builtin:pydoc",), settings=settings)
    fit = FitRepair(repair=repair, layers="layers", texts=(text,))
    patch, cuts, _ = fitted_by(open_whole(checkpoint, settings), fit, removed)
    of_ranks = gang.run(fit_and_ask, partition, folder, fit, removed)
    assert all(cut["error_after"] < cut["error_before"] for cut in cuts)
    for found, found_cuts, (_, repaired, _) in of_ranks:
        for ours, theirs in zip(found_cuts, cuts, strict=True):
            assert ours["ridges"] == theirs["ridges"]
            assert ours["error_before"] == pytest.approx(theirs["error_before"], rel=1e-5)
            assert ours["error_after"] == pytest.approx(theirs["error_after"], rel=1e-4)
        assert found.keys() == patch.keys()
        for name, weights in patch.items():
            torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-5)
        assert repaired == losses_with(checkpoint, settings, found, removed)
    return [losses for _, _, losses in of_ranks], cuts


def losses_with(checkpoint: Checkpoint, settings: Settings, patch: Patch, removed: Sequence[Removal]) -> list[float]:
    model = open_whole(checkpoint, settings)
    with model.patched(patch):
        rows = TextLoss(random_shard())(model, NO_INTERVENTION.without(*removed))
    return [float(value) for row in rows for value in row.samples]


def generate_all(partition: str, folders: Sequence[Path]) -> list[tuple[list[int], list[str]]]:
    """Of each model, the tokens that this rank generates without a layer, with a cache and without one; its notes."""
    results = []
    for folder in folders:
        replica = opened(partition, folder, SETTINGS, head=True)
        model = replica.language_model
        results.append((generated(model)[0].tolist(), [*model.notes]))
        replica.close()
    return results


@pytest.mark.parametrize("partition", ["fsdp", "zero3", "tensor_parallel"])
def test_gangs_generate_with_a_cache_as_one_process_does(
    partition: str, gang: Callable[[int], Gang], folder_of: Callable[[str], Path]
) -> None:
    """One family with windows as well, which is the same to every partition."""
    folders = [folder_of(family) for family in ("llama", *(["gemma3"] if partition == "fsdp" else []))]
    models = [open_whole(resolve(str(folder)), SETTINGS) for folder in folders]
    expected = [(generated(model)[0].tolist(), []) for model in models]
    assert gang(2).run(generate_all, partition, folders) == [expected, expected]


def test_zero3_in_bfloat16(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    settings, shards = replace(SETTINGS, dtype="bfloat16"), make_shards(3)
    for family in ("grouped llama", "gemma3_text", "mixtral"):
        folder = folder_of(family)
        per_rank = gang(2).run(measure, "zero3", folder, shards, settings)
        expected, model = single(folder, shards, settings)
        assert_equal(merged(per_rank), expected)
        assert per_rank[0][1]["dtype"] == model["dtype"] == "bfloat16"


def test_zero3_frees_its_part(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    for before, after in gang(2).run(bytes_after_close, folder_of("gpt2")):
        assert before > 0
        assert after == 0


def test_other_partitions_are_not_disturbed(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    """A process that has left ZeRO-3 loads the next model whole."""
    folder, shards = folder_of("grouped llama"), make_shards(1)
    gang(2).run(measure, "zero3", folder, shards, SETTINGS)
    expected, _ = single(folder, shards)
    for results in gang(2).run(single_stats, folder, shards):
        assert all(results[key].equals(expected[0].stats[key]) for key in expected[0].stats)


@pytest.mark.parametrize("partition", ["fsdp", "zero3", "tensor_parallel"])
def test_a_lost_rank_is_no_mistake_of_the_user(
    tmp_path: Path, folder_of: Callable[[str], Path], partition: str
) -> None:
    """The other one fails, instead of waiting for ever, in a way that can be tried again."""
    gang = Gang(2, tmp_path)
    gang.run(os.getpid)
    gang.lose(1)
    (error,) = gang.outcomes(measure, partition, folder_of("grouped llama"), make_shards(1), SETTINGS)
    gang.stop()
    assert isinstance(error, RuntimeError)
    assert "gloo/" in str(error)


def test_a_frozen_rank_is_waited_for_no_longer_than_said(tmp_path: Path, folder_of: Callable[[str], Path]) -> None:
    """The first failure names the time; later ones only say that gloo gave up, and are no mistakes either."""
    gang = Gang(2, tmp_path)
    gang.run(rejoin, free_port(), 10.0)
    gang.freeze(1)
    for message in ("Timed out waiting 10000ms", "pair closure"):
        (error,) = gang.outcomes(measure, "tensor_parallel", folder_of("grouped llama"), make_shards(1), SETTINGS)
        assert isinstance(error, RuntimeError)
        assert message in str(error)
    gang.stop()


def single_stats(folder: Path, shards: Sequence[Shard]) -> Mapping[LayerKey, LayerStats]:
    assert torch.nn.functional.linear is torch._C._nn.linear
    return single(folder, shards)[0][0].stats


@pytest.mark.nightly
def test_two_ranks_hold_half_of_smollm2_each(gang: Callable[[int], Gang], smollm2: Path) -> None:
    settings, shards = replace(SETTINGS, dtype="bfloat16"), make_shards(2, rows=(1,))
    per_rank = gang(2).run(measure, "zero3", smollm2, shards, settings)
    expected, model = single(smollm2, shards, settings)
    for _, of_rank, held in per_rank:
        assert of_rank["num_parameters"] == model["num_parameters"]
        assert 0.5 <= held / (2 * model["num_parameters"]) <= 0.55
    assert_equal(merged(per_rank), expected)


@pytest.mark.parametrize("partition", ["fsdp", "zero3"])
def test_a_gguf_file_is_not_opened_in_parts(partition: str) -> None:
    checkpoint = Checkpoint(name="tiny.gguf", source="gguf", path="/tiny.gguf", revision="0")
    with pytest.raises(ConfigError, match=rf"'tiny.gguf' is a .gguf file.*every process, so that {partition} would"):
        open_replica(checkpoint, SETTINGS, Placement(partition=partition, ranks=2))


# Tensor parallel.

BY_AUTOTP = ("grouped llama", "bert")  # three heads, and a family without a plan
BY_PLAN = ("llama", "qwen2", "gemma3_text", "gpt_neox", "phi", "phi3", "cohere", "gptj", "starcoder2", "olmo2")
MIXED = ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "olmoe", "granitemoe", *MORE_MIXTURES)
SPREAD = (*(family for family in MIXED if family != "llama4_text"), "gpt_oss", "three-headed mixture")  # it has no plan
EXPERT_SUMS = ("gate_sum", "gated_norm_sum", "output_sum", "output_sum_sq", "router_entropy_sum")


@pytest.mark.parametrize(
    ("partition", "world", "family"),
    all_of(
        [
            *(("tensor_parallel", 2, family) for family in (*BY_AUTOTP, *BY_PLAN, *MIXED)),
            *(("tensor_parallel", 4, family) for family in ("gpt_neox", "gptj", "olmoe", "opt")),
            *(("expert_parallel", 2, family) for family in SPREAD),
            *(("expert_parallel", 4, family) for family in ("qwen3_moe", "gpt_oss", "olmoe", "three-headed mixture")),
        ],
        [
            *(("tensor_parallel", 2, family) for family in (*BY_AUTOTP, "llama", "gemma3_text", "phi3", "olmo2")),
            *(("tensor_parallel", 2, family) for family in ("mixtral", "deepseek_v3")),
            *(("expert_parallel", 2, family) for family in ("qwen3_moe", "gpt_oss", "three-headed mixture")),
        ],
    ),
)
def test_ranks_that_split_matrices_give_the_numbers_of_one_process(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str, world: int, family: str
) -> None:
    """The head is split too, unless DeepSpeed does it. Every token is counted once for its experts."""
    folder, shards, settings = folder_of(family), make_shards(2, rows=(4, 3)), replace(SETTINGS, experts=True)
    first, *others = gang(world).run(measure, partition, folder, shards, settings)
    expected, model = single(folder, shards, settings)
    for got, want in zip(first[0], expected, strict=True):
        assert_near(got.stats, want.stats, rtol=1e-4)
        assert got.experts is not None and want.experts is not None and got.experts.keys() == want.experts.keys()
        for layer, sums in want.experts.items():
            for name in ("routed_tokens", "output_count", "token_count"):
                assert np.array_equal(getattr(got.experts[layer], name), getattr(sums, name)), (layer, name)
            for name in EXPERT_SUMS:
                np.testing.assert_allclose(getattr(got.experts[layer], name), getattr(sums, name), rtol=1e-4, atol=1e-4)
    assert not any(result.stats for results, *_ in others for result in results)
    assert [of_rank["reports_stats"] for _, of_rank, _ in (first, *others)] == [True, *[False] * (world - 1)]
    assert all(of_rank["data"] == (0, 1) for _, of_rank, _ in (first, *others))
    assert partitioned(first[1]) == partitioned(model)


def test_three_ranks_share_fifty_units(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    """17, 17 and 16 units of the site ``neuron``: gathered, they are all there."""
    folder, shards = folder_of("grouped llama"), make_shards(1)
    per_rank = gang(3).run(measure, "tensor_parallel", folder, shards, SETTINGS)
    expected, model = single(folder, shards)
    ((result,), _, held), *others = per_rank
    assert_near(result.stats, expected[0].stats, rtol=1e-4)
    assert result.stats[0, "neuron"].count == 50 * shards[0].num_tokens
    assert all(bytes_held < 4 * model["num_parameters"] for bytes_held in (held, *(h for _, _, h in others)))


def test_tensor_parallel_ranks_share_strata_and_rows(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path]
) -> None:
    """Of paired text: each measures the answers of its rows, and the first one has all, in their order."""
    folder, (shard,) = folder_of("grouped llama"), make_shards(1)
    strata = ("good", "bad", "good", "bad")
    pairing = Pairing(rows=np.arange(7, 11), pairs=np.arange(4) // 2, strata=strata, starts=np.zeros(4, np.int32))
    paired = [replace(shard, pairing=pairing)]
    (((got,), _, _), _) = gang(2).run(measure, "tensor_parallel", folder, paired, SETTINGS)
    (want,), _ = single(folder, paired)
    assert_near(got.stats, want.stats, rtol=1e-4)
    assert {key: one.count for key, one in got.strata.items()} == {key: one.count for key, one in want.strata.items()}
    assert got.rows and want.rows and got.rows.row.tolist() == [7, 8, 9, 10]
    for key, rows in want.rows.stats.items():
        for name in ("count", "norm", "m2", "pooled_variance"):
            np.testing.assert_allclose(getattr(got.rows.stats[key], name), getattr(rows, name), rtol=1e-4)


def test_tensor_parallel_in_bfloat16(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    """Sums of 8 significant bits; but rotary frequencies stay in float32, for positions far apart need more."""
    settings, shards = replace(SETTINGS, dtype="bfloat16"), make_shards(1)
    folder = folder_of("grouped llama")
    (((result,), _, _), _) = gang(2).run(measure, "tensor_parallel", folder, shards, settings)
    (want,), _ = single(folder, shards, settings)
    assert result.stats.keys() == want.stats.keys()
    for key, stats in want.stats.items():
        assert result.stats[key].count == stats.count
        assert result.stats[key].rms == pytest.approx(stats.rms, rel=0.02)
    buffers = [b for b in build("grouped llama").buffers() if b.is_floating_point()]
    for found in gang(2).run(floating_buffers, folder, settings):
        assert len(found) == len(buffers) > 0
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, buffers, strict=True))


def floating_buffers(folder: Path, settings: Settings) -> list[torch.Tensor]:
    replica = opened("tensor_parallel", folder, settings)
    found = [buffer.clone() for buffer in module_of(replica).buffers() if buffer.is_floating_point()]
    replica.close()
    return found


def test_a_family_that_is_cut_wrongly_is_refused(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    """DeepSpeed takes Persimmon, whose keys, queries and values lie head by head, and mixes them up."""
    outcomes = gang(2).outcomes(measure, "tensor_parallel", folder_of("persimmon"), make_shards(1), SETTINGS)
    for error in outcomes:
        assert isinstance(error, ModelError)
        assert "cannot split a persimmon model (PersimmonForCausalLM)" in error.message
        assert "of layer 0 is off by 0." in error.message
        assert "zero3" in str(error.hint)


def test_a_family_that_deepspeed_does_not_know_is_refused(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path]
) -> None:
    for error in gang(2).outcomes(measure, "tensor_parallel", folder_of("gpt2"), make_shards(1), SETTINGS):
        assert isinstance(error, ModelError)
        assert "cannot split a gpt2 model" in error.message


def test_more_ranks_than_heads_are_refused(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    for error in gang(3).outcomes(measure, "tensor_parallel", folder_of("llama"), make_shards(1), SETTINGS):
        assert isinstance(error, ConfigError)
        assert error.message == "3 ranks cannot share 2 heads (num_key_value_heads of the llama configuration)."
        assert error.hint == "Set `ranks` to 2 at most. Use `partition` single, device_map, fsdp, zero3 or streaming."


def test_experts_that_ranks_cannot_share_are_refused(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path]
) -> None:
    refusals = {
        "mixtral": "3 ranks do not divide the 4 experts of a layer of MixtralForCausalLM.",
        "llama": "transformers has no plan that spreads experts of LlamaForCausalLM over ranks.",
    }
    for family, message in refusals.items():
        for error in gang(3).outcomes(measure, "expert_parallel", folder_of(family), make_shards(1), SETTINGS):
            assert isinstance(error, ConfigError) and error.message == message


@pytest.mark.parametrize("partition", ["fsdp", "zero3", "tensor_parallel", "expert_parallel"])
def test_unpacked_weights(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], tmp_path: Path, partition: str
) -> None:
    """Block FP8 of which every rank reads whole blocks, or all: the numbers of one process that unpacks it."""
    folder, settings = block_fp8(folder_of("qwen3_moe"), tmp_path / "fp8"), replace(SETTINGS, dequantize=True)
    shards = make_shards(2, rows=(4, 4))
    per_rank = gang(2).run(measure, partition, folder, shards, settings)
    expected, _ = single(folder, shards, settings)
    if PARTITIONS[partition].splits_data:
        assert_equal(merged(per_rank), expected)
        return
    for found, wanted in zip(per_rank[0][0], expected, strict=True):
        assert_near(found.stats, wanted.stats, rtol=1e-4)


@pytest.mark.parametrize(
    ("partition", "quantize", "family", "dequantize", "said"),
    [
        ("fsdp", block_fp8, "grouped llama", True, "2 ranks do not divide the"),
        ("fsdp", mxfp4, "gpt_oss", False, "ranks of fsdp cannot gather them"),
        ("zero3", mxfp4, "gpt_oss", False, "ranks of zero3 cannot gather them"),
        ("tensor_parallel", mxfp4, "gpt_oss", False, "takes none that stay quantized"),
    ],
)
def test_quantized_weights_that_ranks_cannot_share_are_refused(
    gang: Callable[[int], Gang],
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    partition: str,
    quantize: Callable[[Path, Path], Path],
    family: str,
    dequantize: bool,
    said: str,
) -> None:
    folder, settings = quantize(folder_of(family), tmp_path / "quantized"), replace(SETTINGS, dequantize=dequantize)
    for error in gang(2).outcomes(measure, partition, folder, make_shards(1), settings):
        assert isinstance(error, ConfigError) and said in error.message and error.hint


def test_heads_are_counted_by_what_the_configuration_calls_them() -> None:
    for family, heads in {"gpt2": 4, "falcon": 2, "llama": 2}.items():
        config = build(family).config
        require_heads(config, heads)
        with pytest.raises(ConfigError, match=f"{heads + 1} ranks cannot share"):
            require_heads(config, heads + 1)


def test_autotp_cannot_check_flash_attention(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    settings = replace(SETTINGS, attention="flash_attention_2")
    for error in gang(2).outcomes(measure, "tensor_parallel", folder_of("grouped llama"), make_shards(1), settings):
        assert isinstance(error, ConfigError)
        assert error.hint == "Set `attention` to sdpa."


def test_difference_is_of_the_median_token() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0], [30.0, 40.0], [1.0, 0.0]])
    assert difference(expected, expected) == 0.0
    assert difference(expected, expected * 1.5) == pytest.approx(0.5)
    assert difference(expected, torch.full_like(expected, torch.nan)) == torch.inf
    one_token_elsewhere = expected.clone()
    one_token_elsewhere[3] = -7.0
    assert difference(expected, one_token_elsewhere) == 0.0
    assert difference(torch.full((2, 2), torch.nan), torch.zeros(2, 2)) == 0.0


# Both.


def test_a_process_can_join_another_group(gang: Callable[[int], Gang], folder_of: Callable[[str], Path]) -> None:
    folder, shards = folder_of("grouped llama"), make_shards(2)
    gang(2).run(measure, "tensor_parallel", folder, shards, SETTINGS)
    gang(2).run(rejoin, free_port())
    expected, _ = single(folder, shards)
    assert_equal(merged(gang(2).run(measure, "zero3", folder, shards, SETTINGS)), expected)
    first, _ = gang(2).run(measure, "tensor_parallel", folder, shards, SETTINGS)
    assert_near(first[0][1].stats, expected[1].stats, rtol=1e-4)


@pytest.mark.parametrize("partition", ["fsdp", "zero3", "tensor_parallel"])
def test_nothing_is_printed_on_stdout(
    gang: Callable[[int], Gang], folder_of: Callable[[str], Path], partition: str
) -> None:
    """Joining the group, which starts the gang, is part of it."""
    gang(2).run(measure, partition, folder_of("grouped llama"), make_shards(1), SETTINGS)
    gang(2).outcomes(measure, "tensor_parallel", folder_of("gpt2"), make_shards(1), SETTINGS)
    assert [path.read_text() for path in gang(2).stdout] == ["", ""]


@pytest.mark.parametrize("partition", ["fsdp", "zero3", "tensor_parallel"])
def test_the_group_must_be_there(folder_of: Callable[[str], Path], partition: str) -> None:
    checkpoint = resolve(str(folder_of("llama")))
    with pytest.raises(ConfigError, match=f"`partition` {partition} needs a group of 2 processes; this is one of 1"):
        open_replica(checkpoint, SETTINGS, Placement(partition=partition, ranks=2))
    with pytest.raises(ConfigError, match=f"`partition` {partition} with one rank spreads nothing"):
        open_replica(checkpoint, SETTINGS, Placement(partition=partition))


def test_the_documented_configurations_are_those_in_use() -> None:
    assert json.loads((CONFIGS / "zero3.json").read_text()) == deepspeed_config(torch.bfloat16, torch.device("cuda"))
    assert json.loads((CONFIGS / "tensor_parallel.json").read_text()) == inference_config(torch.bfloat16, 2)
