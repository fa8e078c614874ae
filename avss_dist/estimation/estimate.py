"""Estimate of the memory of a run, or of a distillation, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import PARTITIONS, SHARDINGS
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import TRAINED, Execution, Settings
from avss_dist.core.text import describe_bytes
from avss_dist.distillation.memory import LIBRARIES, estimate_memory
from avss_dist.distillation.pair import LORA, computes_in_bfloat16
from avss_dist.models.checkpoints import Checkpoint, locate
from avss_dist.models.size import Footprint, footprint, sharing_skeletons
from avss_dist.partition.choose import choose
from avss_dist.partition.memory import PartitionMemory
from avss_dist.partition.replica import replica_class
from avss_dist.requests import DistillRequest, EstimateRequest, require_divisible
from avss_dist.runs.planner import rows_per_shard
from avss_dist.system.devices import Devices, devices_here, pick_device


@dataclass(frozen=True, kw_only=True)
class DistillRow:
    """Estimated memory of a distillation.

    Attributes:
        train: weights that are trained.
        sharding: parts that are divided among ranks, a name of `registry.SHARDINGS`; empty for one process.
        ranks: number of processes.
        trained: number of trained parameters.
        device_bytes: peak memory of each GPU or, on a CPU, of each process.
        fits: whether this memory is here.
        why: components of the memory.
    """

    train: str
    sharding: str
    ranks: int
    trained: int
    device_bytes: int
    fits: bool
    why: str


def distillation_rows(
    student: Checkpoint | str, request: EstimateRequest, settings: Settings, devices: Devices
) -> Iterator[DistillRow]:
    """Yield the memory of each way to distill a model that is possible here.

    Args:
        settings: of the request, with the kind of device.

    Raises:
        ConfigError: the rows of a training step cannot be divided among the ranks.
        ModelError: a model cannot be read or built.
    """
    teacher = locate(str(request.teacher)) or str(request.teacher)
    ranks = request.ranks or max(2, devices.count)
    require_divisible(settings.batch_size, ranks)
    dtype = "bfloat16" if computes_in_bfloat16(request.settings, settings.device) else "float32"
    for train in TRAINED:
        if train == LORA and find_spec("peft") is None:
            continue
        for sharding, processes in (("", 1), *((name, ranks) for name in SHARDINGS)):
            rows = replace(settings, batch_size=settings.batch_size // processes)
            memory = estimate_memory(
                student,
                teacher,
                replace(rows, dtype="float32"),
                replace(rows, dtype=dtype),
                train=train,
                rank=DistillRequest.lora_rank,
                sharding=sharding or next(iter(SHARDINGS)),
                ranks=processes,
            )
            needed, parts = memory.total, {**memory.parts}
            fits = needed <= devices.device_bytes and processes <= devices.count
            if devices.kind == "cpu":
                needed, parts = needed + LIBRARIES, {**parts, "libraries": LIBRARIES}
                fits = processes * needed <= devices.host_bytes
            yield DistillRow(
                train=train,
                sharding=sharding,
                ranks=processes,
                trained=memory.trained,
                device_bytes=needed,
                fits=fits,
                why=", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items()),
            )


ENOUGH_ROWS = 1 << 20  # of a text, for shards of the usual size
RANKS = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of ranks on GPUs, of which the first whose part fits is estimated."""


@dataclass(frozen=True, kw_only=True)
class PartitionEstimate:
    """Estimated memory of a replica with one partition.

    Attributes:
        partition: one of ``registry.PARTITIONS``.
        ranks: processes of the replica; by default as few as GPUs have room for, and 2 on a CPU.
        gpus: GPUs of the replica; 0 on a CPU.
        device_bytes: bytes of each GPU or, on a CPU, of each process.
        host_bytes: bytes of the host, all its ranks together.
        fits: whether this memory is here, and nothing else is in the way.
        why: components of the numbers, or the missing memory.
    """

    partition: str
    ranks: int
    gpus: int
    device_bytes: int
    host_bytes: int
    fits: bool
    why: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(TabularResult):
    """Estimate of a run, with a row for each partition.

    Attributes:
        model: name in the request.
        num_parameters, num_layers, weight_bytes, dtype: size of the model; see `models.size.Footprint`.
        device: ``cpu`` or ``cuda``.
        device_bytes, host_bytes: memory of the smallest GPU, or of the host, and of the host, within the limits.
        quantized: whether weights stay quantized where the partition computes with them as stored.
        rows: a row for each partition, the simplest first.
        auto: partition that a run chooses with ``auto``; empty if it is refused.
        auto_why: reason of the choice or of the refusal, for people.
        distillation: a row for each way to distill the model; empty without a teacher.
    """

    model: str
    num_parameters: int
    num_layers: int
    weight_bytes: int
    dtype: str
    device: str
    device_bytes: int
    host_bytes: int
    rows: tuple[PartitionEstimate, ...]
    auto: str
    auto_why: str
    quantized: bool
    distillation: tuple[DistillRow, ...] = ()

    def table(self) -> pa.Table:
        """Return a table with a row for each partition."""
        return pa.Table.from_pylist([asdict(row) for row in self.rows])

    def summary(self) -> str:
        """Return the model and its layers in a line."""
        return f"{self.model}, {self.num_layers} layers"

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON-ready values."""
        return asdict(self)


@sharing_skeletons()
def estimate(request: EstimateRequest) -> Estimate:
    """Estimate the memory of a replica with every partition, from a checkpoint's configuration and headers.

    Raises:
        AvssError: the model or a setting is not one that can be run.
    """
    settings, model = request.settings, str(request.model)
    weights = locate(model, weights=False) or model
    settings = replace(settings, device=pick_device(settings.device).type)
    size = footprint(weights, settings)
    rows = settings.sequences_per_shard or rows_per_shard(size, settings, settings.max_sequences or ENOUGH_ROWS)
    settings = replace(settings, dtype=size.dtype, sequences_per_shard=rows)
    here = devices_here(settings.device)
    host = min(here.host_bytes, request.max_memory.get("cpu", here.host_bytes))
    gpus = [here.device_bytes, *(limit for name, limit in request.max_memory.items() if name != "cpu")]
    devices = replace(here, host_bytes=host, device_bytes=host if here.kind == "cpu" else min(gpus))
    try:
        placement = choose(size, settings, Execution(max_memory=request.max_memory), here)
        auto, why = placement.partition, placement.why
        why += f"; over {placement.gpus} GPUs" if placement.gpus > 1 else ""
    except ConfigError as error:
        auto, why = "", f"{error.message} {error.hint}".replace("`", "").strip()
    return Estimate(
        model=model,
        num_parameters=size.num_parameters,
        num_layers=size.num_layers,
        weight_bytes=size.weight_bytes,
        dtype=size.dtype,
        quantized=size.quantized,
        device=devices.kind,
        device_bytes=devices.device_bytes,
        host_bytes=devices.host_bytes,
        rows=tuple(_row(partition, weights, size, settings, devices, request) for partition in PARTITIONS),
        auto=auto,
        auto_why=why,
        distillation=tuple(distillation_rows(weights, request, settings, devices)) if request.teacher else (),
    )


def _row(
    partition: str,
    weights: Checkpoint | str,
    size: Footprint,
    settings: Settings,
    devices: Devices,
    request: EstimateRequest,
) -> PartitionEstimate:
    """Return the row of a partition. A gang has the requested ranks, or as few as have room for their parts."""
    kind: type[PartitionMemory] = replica_class(partition).memory
    numbers: tuple[int, ...] = (1,)
    if PARTITIONS[partition].gang:
        numbers = (request.ranks,) if request.ranks else RANKS if devices.kind == "cuda" else RANKS[:1]
    for ranks in numbers:
        memory = kind(partition, weights, size, settings, ranks, request.max_memory, devices)
        usage = memory.usage()
        if usage.device_bytes <= devices.device_bytes or memory.obstacle:
            break
    needs = [(usage.host_bytes, devices.host_bytes, "host memory")]
    if memory.on_gpu:
        needs.append((usage.device_bytes, devices.device_bytes, "GPU memory"))
    lacks = [f"lacks {describe_bytes(need - free)} of {name}" for need, free, name in needs if need > free]
    if memory.obstacle:
        lacks.append(memory.obstacle)
    if memory.gpus > devices.count:
        lacks.append(f"{memory.gpus} GPUs are needed, {devices.count} are here")
    unpacked = [f"weights are unpacked to {size.dtype}"] if memory.size.quantized != size.quantized else []
    return PartitionEstimate(
        partition=partition,
        ranks=ranks,
        gpus=memory.gpus,
        device_bytes=usage.device_bytes,
        host_bytes=usage.host_bytes,
        fits=not lacks,
        why="; ".join([*lacks, usage.why, *unpacked]),
    )
