"""Which partition a checkpoint gets: the simplest that holds it. What is impossible is refused before a rank starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import checkpoint_at
from support.devices import devices_of
from support.planning import llama_like
from transformers import GPT2Config, GPT2LMHeadModel

from avss_dist.core.devices import Devices, devices_here
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes, parse_bytes
from avss_dist.models.checkpoint.size import Footprint
from avss_dist.partition.autotp import UNSUPPORTED
from avss_dist.partition.choose import (
    PROCESS_BYTES,
    batch_bytes,
    bytes_beside_weights,
    choose,
    gpus_filled,
    least_host_bytes,
    needs_size,
    place,
)
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement

GB = 10**9
SETTINGS = Settings()


def cpus(memory: int) -> Devices:
    return replace(devices_of("cpu", memory), cpus=8, cpus_of_largest_node=8)


def gpus(count: int, memory: int, on_one_node: int = 8) -> Devices:
    devices = devices_of("cuda", memory, count=count, host_bytes=512 * GB)
    return replace(devices, count_of_largest_node=min(count, on_one_node))


HOST = cpus(24 * GB)
ONE_GPU = gpus(1, 80 * GB)
EIGHT_GPUS = gpus(8, 80 * GB)
FOUR_HOSTS = gpus(32, 80 * GB)
LARGE = llama_like(405, layers=126, hidden=16384)


def chosen(size: Footprint | None, devices: Devices, *, head: bool = False, **execution: Any) -> Placement:
    """The placement of a model of a size, with options of `Execution`."""
    return choose(size, SETTINGS, Execution(**execution), devices, head=head)


@pytest.mark.parametrize(
    ("billions", "devices", "partition", "count"),
    [
        (0.135, cpus(24 * GB), "single", 0),
        (8, cpus(24 * GB), "single", 0),
        (70, cpus(24 * GB), "streaming", 0),
        (8, gpus(1, 80 * GB), "single", 1),
        (8, gpus(8, 24 * GB), "single", 1),
        (13, gpus(8, 24 * GB), "device_map", 2),
        (70, gpus(8, 80 * GB), "device_map", 2),
        (70, gpus(1, 80 * GB), "streaming", 1),
        (405, gpus(8, 80 * GB), "streaming", 1),
        (405, gpus(24, 80 * GB, on_one_node=24), "device_map", 17),
        (70, gpus(64, 80 * GB, on_one_node=1), "streaming", 1),
    ],
)
def test_auto_takes_the_simplest_that_fits(billions: float, devices: Devices, partition: str, count: int) -> None:
    placement = chosen(llama_like(billions), devices)
    assert placement.partition == partition
    assert placement.gpus == count
    assert placement.ranks == 1
    assert "of weights" in placement.why
    assert ("GPU" in placement.why) == (devices.kind == "cuda")


def test_a_device_map_has_whole_layers() -> None:
    """Of 24 GB each; with the activations, three do not fit. The first GPU keeps room for one more."""
    size = llama_like(405)
    devices = gpus(24, 80 * GB, on_one_node=24)
    room = int(80 * GB * 0.9) - batch_bytes(size, SETTINGS)
    assert size.layer_bytes[0] * 2 < room < size.layer_bytes[0] * 3
    assert size.weight_bytes / room < 17
    assert gpus_filled(size, room) == 17
    assert chosen(size, devices).gpus == 17
    assert gpus_filled(size, size.layer_bytes[0] - 1) == math.inf


def test_auto_spreads_parts_over_the_gpus_of_several_hosts() -> None:
    """Each holds a part, and two layers while one runs; with one GPU a host, links are slow."""
    placement = chosen(LARGE, FOUR_HOSTS)
    assert placement.partition == "fsdp"
    assert placement.gpus == placement.ranks
    assert 12 < placement.ranks <= 16
    assert placement.copies == 1
    assert f"need {placement.ranks} times one GPU of 80 GB of several hosts: fsdp, whose ranks read" in placement.why
    assert chosen(LARGE, FOUR_HOSTS, executor="local").partition == "streaming"
    assert chosen(LARGE, FOUR_HOSTS, head=True).partition == "streaming"
    for devices in (gpus(12, 80 * GB), gpus(32, 80 * GB, on_one_node=1)):
        assert chosen(LARGE, devices).partition == "streaming"


def test_auto_takes_zero3_where_transformers_cannot_load_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.distributed.DistributedConfig", object)  # without the fields of later versions
    placement = chosen(LARGE, FOUR_HOSTS)
    assert placement.partition == "zero3"
    assert "5.23 or newer can" in placement.why


def test_auto_counts_activations_replicas_and_limits() -> None:
    size = llama_like(8)
    long = Settings(sequence_length=65536, batch_size=64)
    assert choose(size, long, Execution(), ONE_GPU).partition == "streaming"
    assert chosen(size, HOST, replicas=2).partition == "streaming"
    one_cpu_a_node = replace(HOST, cpus=64, cpus_of_largest_node=1)
    assert chosen(size, one_cpu_a_node, replicas="4..64").partition == "single", "one on each node"
    assert chosen(size, HOST, max_memory={"cpu": 8 * GB}).partition == "streaming"
    assert chosen(size, ONE_GPU, max_memory={"0": 10 * GB}).partition == "streaming"
    placement = chosen(size, gpus(4, 80 * GB), max_memory={"0": 10 * GB, "1": 20 * GB})
    assert placement.partition == "device_map"
    assert placement.gpus == 2
    placement = chosen(size, EIGHT_GPUS, gpus_per_replica=4)
    assert placement.partition == "device_map"
    assert placement.gpus == 4


def test_a_limit_covers_the_process_and_a_batch_as_well_as_weights() -> None:
    """What is left of it for weights and hidden states is what the partition gets; no room is negative."""
    size = llama_like(8)
    devices = cpus(64 * GB)
    beside = bytes_beside_weights(size, SETTINGS, "cpu")
    assert beside == PROCESS_BYTES + batch_bytes(size, SETTINGS)
    enough = least_host_bytes("single", size, SETTINGS, "cpu")
    assert enough == beside + size.weight_bytes
    for limit, partition, verb in ((enough, "single", "fit"), (enough - 1, "streaming", "do not fit")):
        placement = chosen(size, devices, max_memory={"cpu": limit})
        assert placement.partition == partition
        assert placement.max_memory == {"cpu": limit - beside}
        assert f"{verb} into {describe_bytes(limit)} of memory for each" in placement.why
        assert "1.07 GB for the interpreter" in placement.why
    least = least_host_bytes("streaming", size, SETTINGS, "cpu", head=True)
    placement = chosen(size, devices, head=True, max_memory={"cpu": least})
    assert placement.max_memory == {"cpu": max(size.layer_bytes) + size.other_bytes}
    with pytest.raises(ConfigError, match=r"`max_memory` allows"):
        chosen(size, devices, head=True, max_memory={"cpu": least - 1})


def test_quantized_weights_that_do_not_fit_unpacked_are_streamed() -> None:
    """With room for a layer and to unpack it; on a GPU, host memory has the layer as it is stored."""
    size = replace(llama_like(70), unpacking_bytes=3 * GB, stored_share=0.5)
    assert chosen(size, HOST).partition == "streaming"
    beside = bytes_beside_weights(size, SETTINGS, "cpu")
    layer = max(size.layer_bytes)
    weights = layer + size.other_bytes + 3 * GB
    assert least_host_bytes("streaming", size, SETTINGS, "cpu") == beside + weights
    beside = bytes_beside_weights(size, SETTINGS, "cuda")
    assert least_host_bytes("streaming", size, SETTINGS, "cuda") == beside + layer // 2


@pytest.mark.parametrize("devices", [cpus(24 * GB), gpus(1, 80 * GB), gpus(8, 10 * GB)])
def test_weights_that_stay_quantized_are_not_streamed(devices: Devices) -> None:
    """The refusal names what a run with streaming would be refused for, before anything is opened."""
    size = replace(llama_like(70), quantized=True)
    with pytest.raises(ConfigError, match=r"The weights stay quantized, and 140 GB of weights.* fit into") as refused:
        chosen(size, devices)
    assert refused.value.hint.startswith("Set `dequantize`, with which it is streamed")
    with pytest.raises(ConfigError) as refused:
        chosen(replace(size, can_unpack=False), devices)
    assert "dequantize" not in refused.value.hint
    assert chosen(replace(size, quantized=False), devices).partition == "streaming"
    assert chosen(size, EIGHT_GPUS).partition == "device_map"


@pytest.mark.parametrize("partition", ["fsdp", "zero3"])
def test_ranks_without_room_for_the_layer_that_they_gather_are_refused(partition: str) -> None:
    """Each has its part, the layer twice, and a batch. On CPUs, ranks on one host share its memory."""
    dense = llama_like(671, layers=61, hidden=7168)
    size = replace(dense, expert_bytes=20 * GB)
    part = size.weight_bytes // 32
    layer = size.layer_bytes[0]
    batch = batch_bytes(size, SETTINGS)
    execution = Execution(partition=partition, ranks=32)
    assert needs_size(execution)
    needed = -(-size.weight_bytes // 32) + 2 * layer + batch
    assert choose(size, SETTINGS, execution, gpus(32, needed)).ranks == 32
    too_small = gpus(32, needed - 1)
    with pytest.raises(ConfigError) as refused:
        choose(size, SETTINGS, execution, too_small)
    message = str(refused.value)
    assert f"{partition} needs {describe_bytes(needed)} of GPU memory for each of 32 ranks, and there are" in message
    assert f"{describe_bytes(part)} are a rank's part of the weights" in message
    assert f"the largest of {describe_bytes(layer)}, 20 GB of them its experts" in message
    assert refused.value.hint.startswith("Use `partition` expert_parallel")
    with pytest.raises(ConfigError, match="Use `partition` tensor_parallel or streaming, or more `ranks`"):
        choose(dense, SETTINGS, execution, too_small)
    of_eight = 8 * (needed + PROCESS_BYTES)
    assert choose(size, SETTINGS, execution, cpus(of_eight)).ranks == 32
    with pytest.raises(ConfigError, match="of host memory for each of 32 ranks"):
        choose(size, SETTINGS, execution, cpus(of_eight - 8))


def test_a_limit_of_a_gpu_covers_activations_too() -> None:
    size = llama_like(8)
    limits = {"0": 10 * GB, "1": 20 * GB}
    batch = batch_bytes(size, SETTINGS)
    placement = chosen(size, gpus(2, 80 * GB), partition="device_map", max_memory=limits)
    assert placement.max_memory == {"0": 10 * GB - batch, "1": 20 * GB - batch}


@pytest.mark.parametrize(
    ("options", "devices", "ranks", "count"),
    [
        ({"partition": "zero3"}, cpus(24 * GB), 2, 0),
        ({"partition": "zero3", "ranks": 3}, cpus(24 * GB), 3, 0),
        ({"partition": "zero3"}, gpus(8, 80 * GB), 8, 8),
        ({"partition": "tensor_parallel", "ranks": 4}, gpus(8, 80 * GB), 4, 4),
        ({"partition": "tensor_parallel", "gpus_per_replica": 2}, gpus(8, 80 * GB), 2, 2),
        ({"partition": "device_map"}, gpus(8, 80 * GB, on_one_node=4), 1, 4),
        ({"partition": "streaming"}, gpus(8, 80 * GB), 1, 1),
        ({"partition": "single"}, cpus(1), 1, 0),
    ],
)
def test_what_was_asked_for_is_taken(options: dict[str, Any], devices: Devices, ranks: int, count: int) -> None:
    placement = chosen(None, devices, **options)
    assert placement.partition == options["partition"]
    assert placement.ranks == ranks
    assert placement.gpus == count


@pytest.mark.parametrize(
    ("options", "devices", "message"),
    [
        ({"partition": "single", "gpus_per_replica": 2}, gpus(8, GB), "uses one GPU"),
        ({"partition": "zero3", "gpus_per_replica": 2, "ranks": 4}, gpus(8, GB), "every rank has one GPU"),
        ({"gpus_per_replica": 2}, cpus(GB), "needs GPUs, and there is none"),
        (
            {"partition": "single", "max_memory": {"cpu": GB}},
            cpus(GB),
            "`max_memory` has no effect on `partition` single",
        ),
        (
            {"partition": "streaming", "max_memory": {"cpu": 1}},
            cpus(GB),
            r"allows 1 Byte .* streaming .* needs 2.52 GB: 1.07 GB for the interpreter, libraries and counters, "
            r"168 MB for the activations of a batch, and 1.27 GB for the weights that are held at once.\n"
            r"Allow cpu=2517MB or more.",
        ),
        (
            {"partition": "streaming", "max_memory": {"cpu": GB}},
            gpus(1, GB),
            "allows 1 GB .* needs 1.55 GB: 1.07 GB for the interpreter, libraries and counters, and 475 MB",
        ),
        ({"max_memory": {"cpu": 10**6}}, cpus(GB), "allows 1 MB .* streaming .* needs 2.52 GB"),
        ({"partition": "device_map", "max_memory": {"cpu": 10**6}}, cpus(GB), "allows 1 MB .* device_map .* needs"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], devices: Devices, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(llama_like(8), devices, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "zero"}, "Did you mean 'zero3'"),
        ({"partition": "zero3", "ranks": 0}, "`ranks` must be at least 1"),
        ({"max_memory": {"gpu0": 1}}, "'gpu0' is not a device"),
        ({"hang_seconds": 0}, "`hang_seconds` must be greater than 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Execution(**options)


@pytest.mark.parametrize(
    ("text", "size"),
    [("200MB", 200_000_000), ("1.5GiB", 3 << 29), ("7", 7), ("40 GB", 40 * GB), ("2k", 2000), ("1TB", 10**12)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "ten", "1XB", "1.2.3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


def test_this_machine_has_devices() -> None:
    here = devices_here("cpu")
    assert here.cpus >= 1
    assert 10**8 < here.host_bytes == here.device_bytes


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=320, n_positions=64))
    return save_checkpoint(model, tmp_path_factory.mktemp("models") / "gpt2")


def test_a_family_that_nobody_splits_is_refused_when_it_is_placed(gpt2: Path) -> None:
    checkpoint = checkpoint_at(gpt2)
    settings = Settings(sequence_length=16)
    devices = devices_here("cpu")
    with pytest.raises(ConfigError, match="Neither transformers nor DeepSpeed can split a gpt2 model") as told:
        place(checkpoint, settings, Execution(partition="tensor_parallel", ranks=2), devices)
    assert "zero3" in str(told.value.hint)
    with pytest.raises(ConfigError, match="expert"):
        place(checkpoint, settings, Execution(partition="expert_parallel", ranks=2), devices)
    assert place(checkpoint, settings, Execution(partition="zero3", ranks=2), devices).ranks == 2


def test_deepspeed_refuses_these_families() -> None:
    auto_tp = pytest.importorskip("deepspeed.module_inject.auto_tp")
    for family in UNSUPPORTED:
        model = type("Model", (), {"__str__": lambda _, name=family: f"x: {name.upper()}Model"})()
        assert not auto_tp.AutoTP.supported(model)
    assert auto_tp.AutoTP.supported(type("Model", (), {"__str__": lambda _: "x: OPTModel"})())
