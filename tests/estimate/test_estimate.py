"""The estimate: peak memory against a fresh process's, what fits and what does not, and that no weight is read."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.checkpoints import llama
from support.command_line import avss
from support.devices import devices_of
from support.ggufs import write_gguf

import avss_dist.estimation
from avss_dist.core.devices import Devices
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_seconds
from avss_dist.distillation.memory import LIBRARIES
from avss_dist.estimation import DistillRow, Estimate, _row, distillation_rows, estimate
from avss_dist.models.checkpoint.locate import find_checkpoint
from avss_dist.models.checkpoint.size import footprint, sharing_skeletons
from avss_dist.partition.catalog import PARTITIONS, SHARDINGS
from avss_dist.partition.choose import choose, least_host_bytes
from avss_dist.partition.estimate import PROCESS_BYTES, PartitionEstimate, batch_bytes
from avss_dist.partition.execution import Execution
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.repair.fits import NormalEquations
from avss_dist.reports.terminal.evaluation import automatic, estimate_table
from avss_dist.requests import EstimateRequest

SETTINGS = Settings(max_sequences=6, sequence_length=32, batch_size=2, sequences_per_shard=4, device="cpu")
GB = 10**9
Save = Callable[[Any, Path], Path]


@pytest.fixture(scope="module")
def header_only(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights file ends after its header."""
    folder = tmp_path_factory.mktemp("header-only")
    for file in tiny_llama.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            header = int.from_bytes(content[:8], "little")
            content = content[: 8 + header]
        (folder / file.name).write_bytes(content)
    return folder


def estimated(
    model: Path | str, settings: Settings = SETTINGS, max_memory: Mapping[str, Any] | None = None
) -> Estimate:
    """The estimate of a run with settings."""
    known = EstimateRequest.__dataclass_fields__
    taken = {name: value for name, value in settings.as_dict().items() if name in known}
    return estimate(EstimateRequest(model, max_memory=max_memory or {}, **taken))


@pytest.fixture(scope="module")
def guess(header_only: Path) -> Estimate:
    return estimated(header_only)


def rows(folder: Path, devices: Devices, ranks: int | None = None, **changes: Any) -> dict[str, PartitionEstimate]:
    """Rows of a model on devices; changes are of its size, or limits of memory."""
    limits = changes.pop("max_memory", {})
    settings = replace(SETTINGS, dtype="float32", device=devices.kind)
    checkpoint = find_checkpoint(str(folder))
    size = replace(footprint(checkpoint, settings), **changes)
    request = EstimateRequest(folder, ranks=ranks, max_memory=limits)
    return {name: _row(name, checkpoint, size, settings, devices, request) for name in PARTITIONS}


def by_partition(guess: Estimate) -> dict[str, PartitionEstimate]:
    return {row.partition: row for row in guess.rows}


def test_no_weight_is_read(guess: Estimate) -> None:
    """`guess` is of a checkpoint that has none."""
    assert guess.num_parameters == sum(p.numel() for p in llama().parameters())
    assert list(by_partition(guess)) == list(PARTITIONS)
    assert [row.ranks for row in guess.rows] == [1, 1, 1, 2, 2, 2, 2]
    for row in guess.rows:
        assert row.device_bytes > PROCESS_BYTES


def test_it_is_json(guess: Estimate) -> None:
    read = json.loads(json.dumps(guess.as_dict()))
    first, *_ = guess.rows
    assert read["rows"][0] == {
        "partition": "single",
        "ranks": 1,
        "gpus": 0,
        "device_bytes": first.device_bytes,
        "host_bytes": first.host_bytes,
        "fits": True,
        "why": "175 kB of weights stay in memory",
    }
    assert read["distillation"] == []  # of a teacher, which is not named here
    assert read["repair"] is None


@pytest.mark.parametrize(("by", "inputs"), [("map", 32), ("refit", 48), ("borrow", 3 * 48)])
def test_the_text_and_the_memory_of_a_repair(by: str, inputs: int, tiny_llama: Path) -> None:
    """Of three layers with 48 neurons: two may be removed after the first one."""
    guess = estimate(EstimateRequest(tiny_llama, repair=by, device="cpu"))
    assert guess.repair is not None
    assert guess.repair.tokens == 4 * min(inputs, 48)
    assert guess.repair.num_bytes == NormalEquations.peak_bytes(inputs, 32)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(estimate_table(guess))
    assert f"for the products of 1 x {inputs} inputs" in console.export_text()


def test_the_table_has_every_partition(guess: Estimate) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(estimate_table(guess))
    text = console.export_text()
    for row in guess.rows:
        assert row.partition in text
    assert "auto takes single: 175 kB of weights" in text
    assert "in 3 layers, 175 kB in float32" in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (12.4, "12 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")],
)
def test_seconds_in_words(seconds: float, said: str) -> None:
    assert describe_seconds(seconds) == said


MEASURE = """
import sys, json
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import open_replica
from avss_dist.measure.shard import analyze_shard
folder, partition, settings = sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3]))
checkpoint = resolve(folder)
shards = tokenize_corpus("builtin:pydoc", load_tokenizer(checkpoint), settings).shards
replica = open_replica(checkpoint, settings, Placement(partition=partition))
print(max(analyze_shard(replica, shard, settings).peak_memory_bytes for shard in shards))
"""


@pytest.mark.nightly
def test_no_process_takes_more(tmp_path: Path, save_checkpoint: Save) -> None:
    """A random Llama of 400 MB, measured in a process of its own. `PROCESS_BYTES` are more than the libraries take."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    model = llama(**sizes, num_key_value_heads=4, max_position_embeddings=256)
    folder = save_checkpoint(model, tmp_path / "model")
    settings = Settings(max_sequences=4, sequence_length=128, batch_size=4, device="cpu")
    guess = estimated(folder, settings)
    assert guess.weight_bytes > 300e6
    row_of = by_partition(guess)
    written_settings = json.dumps(settings.as_dict())
    for row in (row_of["single"], row_of["streaming"]):
        command = [sys.executable, "-c", MEASURE, str(folder), row.partition, written_settings]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = int(done.stdout.split()[-1])
        assert row.device_bytes - PROCESS_BYTES < peak < 1.05 * row.device_bytes, row.partition


def test_layers_that_have_no_room_are_on_disk(tiny_llama: Path) -> None:
    row_of = rows(tiny_llama, devices_of("cpu", GB), max_memory={"cpu": 1})
    assert not row_of["device_map"].fits
    assert "3 of 3 layers on disk" in row_of["device_map"].why


def test_weights_that_stay_quantized_are_not_streamed(tiny_llama: Path) -> None:
    row_of = rows(tiny_llama, devices_of("cpu", 2 * GB), quantized=True)
    assert row_of["single"].fits
    assert not row_of["streaming"].fits
    assert "needs the setting dequantize, which unpacks the weights" in row_of["streaming"].why


def test_a_gguf_file_is_unpacked_layer_by_layer(tmp_path: Path) -> None:
    guess = estimated(write_gguf(llama(), tmp_path / "tiny.gguf"))
    row_of = by_partition(guess)
    assert row_of["streaming"].fits
    assert "unpacked in" in row_of["streaming"].why
    assert not row_of["fsdp"].fits
    assert "is a .gguf file" in row_of["fsdp"].why


@pytest.mark.nightly
def test_only_mixtures_fit_expert_parallel(tiny_llama: Path, tmp_path: Path, save_checkpoint: Save) -> None:
    from support.families import tiny_model

    mixture = save_checkpoint(tiny_model("causal", "mixtral"), tmp_path / "mixtral")
    host = devices_of("cpu", 99 * GB)
    dense = rows(tiny_llama, host)["expert_parallel"]
    fits = rows(mixture, host)["expert_parallel"]
    assert fits.fits
    assert not dense.fits
    assert "no plan that spreads experts of LlamaForCausalLM" in dense.why
    three = rows(mixture, host, ranks=3)["expert_parallel"]
    assert not three.fits
    assert "3 ranks do not divide the 4 experts" in three.why


def test_more_ranks_than_heads_fit_nothing(tiny_llama: Path) -> None:
    row = rows(tiny_llama, devices_of("cpu", 99 * GB), ranks=5)["tensor_parallel"]
    assert not row.fits
    assert "5 ranks cannot share" in row.why


def test_what_auto_takes_is_part_of_the_estimate(guess: Estimate) -> None:
    assert guess.auto == "single"
    assert "fit into" in guess.auto_why
    assert automatic(guess).startswith("auto takes single: 175 kB of weights")
    assert automatic(replace(guess, auto="", auto_why="It is refused.")) == "auto: It is refused."


def test_a_model_that_deepspeed_splits_fits_too(tmp_path: Path, save_checkpoint: Save) -> None:
    """As three ranks do not divide its heads, transformers does not split it; each rank maps the whole model then."""
    folder = save_checkpoint(llama(num_attention_heads=4, num_key_value_heads=4), tmp_path / "four-heads")
    devices = devices_of("cpu", 9 * GB)
    whole = rows(folder, devices, 3)["tensor_parallel"]
    part = rows(folder, devices)["tensor_parallel"]
    assert whole.fits
    assert whole.why.startswith("every rank loads the whole model first")
    assert part.fits
    assert part.why.startswith("every rank loads and keeps a part of each matrix")
    assert whole.device_bytes > part.device_bytes


@pytest.mark.nightly
def test_unpacking_takes_memory_beside_a_layer(tiny_llama: Path) -> None:
    """The weights of a GPU are two layers as they are computed with, and of the host as they are stored."""
    layer = footprint(str(tiny_llama), SETTINGS).layer_bytes[0]
    packed = {"unpacking_bytes": 10**6, "stored_share": 0.25}
    stored_layer = int(layer * 0.25)
    on_host = 10**6 + stored_layer - layer
    more_of_kind = (("cpu", on_host, on_host), ("cuda", 10**6, 2 * stored_layer - 2 * layer))
    for kind, device_more, host_more in more_of_kind:
        plain = rows(tiny_llama, devices_of(kind, GB))["streaming"]
        unpacked = rows(tiny_llama, devices_of(kind, GB), **packed)["streaming"]
        assert unpacked.device_bytes - plain.device_bytes == device_more
        assert unpacked.host_bytes - plain.host_bytes == host_more
        assert "unpacked in 1 MB" in unpacked.why
        assert "unpacked" not in plain.why


def test_what_fits_is_what_is_there(tiny_llama: Path) -> None:
    """One process fits into 1.5 GB, two do not; the reason says what is missing."""
    row_of = rows(tiny_llama, devices_of("cpu", 1_500_000_000))
    assert row_of["single"].fits
    assert row_of["streaming"].fits
    assert not row_of["zero3"].fits
    assert row_of["zero3"].host_bytes > 1_500_000_000
    missing = row_of["zero3"].host_bytes - 1_500_000_000
    assert f"lacks {missing / 1e6:.3g} MB of host memory" in row_of["zero3"].why
    full = rows(tiny_llama, devices_of("cpu", 10_000_000))
    for row in full.values():
        assert not row.fits


@pytest.mark.nightly
def test_a_gpu_holds_weights_and_the_host_the_process(tiny_llama: Path) -> None:
    row_of = rows(tiny_llama, devices_of("cuda", GB, host_bytes=9 * GB))
    size = footprint(str(tiny_llama), SETTINGS)
    assert row_of["single"].device_bytes == size.weight_bytes + batch_bytes(size, SETTINGS)
    assert row_of["single"].host_bytes == PROCESS_BYTES
    assert row_of["zero3"].ranks == 2
    assert not row_of["zero3"].fits
    assert "2 GPUs are needed, 1 are here" in row_of["zero3"].why
    tight = rows(tiny_llama, devices_of("cuda", 100_000, host_bytes=9 * GB))
    assert not tight["single"].fits
    assert "of GPU memory" in tight["single"].why


@pytest.mark.nightly
def test_a_gang_has_as_many_ranks_as_it_takes(tiny_llama: Path) -> None:
    """Of 16 GB, four GPUs of 5 GB hold parts; a number that was asked for stays."""
    devices = devices_of("cuda", 5 * GB, count=8, host_bytes=99 * GB)
    assert rows(tiny_llama, devices, weight_bytes=16 * GB)["zero3"].ranks == 4
    assert rows(tiny_llama, devices, 8, weight_bytes=16 * GB)["zero3"].ranks == 8
    assert rows(tiny_llama, devices, weight_bytes=10_000 * GB)["zero3"].ranks == 128


def test_limits_are_of_the_memory_that_is_here(header_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that no process keeps fits nothing."""
    monkeypatch.setattr(avss_dist.estimation, "devices_here", lambda kind: devices_of(kind, 50_000_000))
    for limits, free in (({}, 50_000_000), ({"cpu": "20MB"}, 20_000_000), ({"cpu": "90MB"}, 50_000_000)):
        guess = estimated(header_only, max_memory=limits)
        assert guess.host_bytes == free
        assert guess.device_bytes == free
        for row in guess.rows:
            assert not row.fits


@pytest.mark.nightly
def test_what_fits_a_limit_is_what_a_run_accepts(tiny_llama: Path) -> None:
    devices = devices_of("cpu", 64 * GB)
    size = footprint(str(tiny_llama), SETTINGS)
    for partition in ("device_map", "streaming"):
        least = least_host_bytes(partition, size, SETTINGS, "cpu")
        for limit, fits in ((least, True), (least - 1, False)):
            limits = {"cpu": limit}
            execution = Execution(partition=partition, max_memory=limits)
            row = rows(tiny_llama, devices_of("cpu", limit), max_memory=limits)[partition]
            assert row.fits == fits
            assert ("of host memory" in row.why) == (not fits)
            with nullcontext() if fits else pytest.raises(ConfigError, match="`max_memory` allows"):
                choose(size, SETTINGS, execution, devices)
    least = least_host_bytes("single", size, SETTINGS, "cpu")
    for limit, fits in ((least, True), (least - 1, False)):
        limits = {"cpu": limit}
        row = rows(tiny_llama, devices_of("cpu", limit), max_memory=limits)["single"]
        assert row.fits == fits
        placement = choose(size, SETTINGS, Execution(max_memory=limits), devices)
        assert (placement.partition == "single") == fits


@pytest.fixture(scope="module")
def student(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    model = str(tiny_llama)
    plan = Plan(model=model, num_layers=3, layers="layers", drop=(1,))
    prune(model, plan, folder)
    return folder


def rows_of(student: Path, teacher: Path, devices: Devices, **options: Any) -> Sequence[DistillRow]:
    request = EstimateRequest(str(student), teacher=str(teacher), batch_size=8, **options)
    checkpoint = find_checkpoint(str(student))
    return list(distillation_rows(checkpoint, request, replace(SETTINGS, batch_size=8), devices))


def test_each_way_has_a_row(student: Path, tiny_llama: Path) -> None:
    """What is divided is less with more ranks; on a CPU all ranks need their memory on one host."""
    devices = devices_of("cpu", 2 * LIBRARIES)
    rows = {(row.train, row.sharding): row for row in rows_of(student, tiny_llama, devices)}
    assert list(rows) == list(product(("all", "lora"), ("", *SHARDINGS)))
    for train in ("all", "lora"):
        assert rows[train, ""].ranks == 1
        assert rows[train, ""].fits
        for sharding in SHARDINGS:
            assert rows[train, sharding].ranks == 2
            assert not rows[train, sharding].fits
    assert rows["all", ""].trained > rows["lora", ""].trained > 0
    by_eight_ranks = rows_of(student, tiny_llama, devices, ranks=8)
    eight = {row.sharding: row for row in by_eight_ranks if row.train == "all"}
    assert eight["zero3"].device_bytes < eight["zero2"].device_bytes < eight["zero1"].device_bytes
    assert eight["fsdp"].device_bytes < eight["ddp"].device_bytes == rows["all", "ddp"].device_bytes
    assert "exchange" in eight["fsdp"].why
    assert "exchange" not in eight[""].why


@pytest.mark.nightly
def test_an_adapter_is_not_left_in_a_shared_skeleton(student: Path, tiny_llama: Path) -> None:
    devices = devices_of("cpu", 2**40)
    apart = rows_of(student, tiny_llama, devices)
    with sharing_skeletons():
        assert [rows_of(student, tiny_llama, devices) for _ in range(2)] == [apart] * 2


@pytest.mark.nightly
def test_a_gpu_has_no_libraries_and_each_rank_needs_one(student: Path, tiny_llama: Path) -> None:
    on_cpu = rows_of(student, tiny_llama, devices_of("cpu", 2**40), ranks=4, dtype="float32")
    on_gpus = rows_of(student, tiny_llama, devices_of("cuda", 2**40, count=2), ranks=4, dtype="float32")
    assert {a.device_bytes - b.device_bytes for a, b in zip(on_cpu, on_gpus, strict=True)} == {LIBRARIES}
    assert [row.fits for row in on_gpus[:3]] == [True, False, False]


@pytest.mark.nightly
def test_the_command_tells_it_where_a_teacher_is_named(student: Path, tiny_llama: Path) -> None:
    command = ["estimate", student, "--sequence-length", 32, "--device", "cpu"]
    told = json.loads(avss(*command, "--teacher", tiny_llama, "--format", "json").stdout)
    assert {row["train"] for row in told["distillation"]} == {"all", "lora"}
    shown = avss(*command, "--teacher", tiny_llama).stdout
    assert "one process" in shown
    assert "fsdp" in shown
