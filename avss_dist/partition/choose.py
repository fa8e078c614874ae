"""PartitionChoice of the partition of a checkpoint on given devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from avss_dist.core.devices import SPARE_SHARE, Devices
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import Footprint, footprint, sharing_skeletons
from avss_dist.partition.catalog import GANGS, LAYERWISE, PARTITIONS, SEVERAL_GPUS, WHOLE
from avss_dist.partition.estimate import PROCESS_BYTES, batch_bytes, bytes_beside_weights
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import replica_class
from avss_dist.partition.splitting import version_obstacle


@sharing_skeletons()
def place(
    checkpoint: Checkpoint, settings: Settings, execution: Execution, devices: Devices, *, head: bool = False
) -> Placement:
    """Return the placement of a checkpoint. Its headers are read if the choice depends on its size."""
    size = size_of(checkpoint, settings) if needs_size(execution) else None
    placement = choose(size, settings, execution, devices, head=head)
    require_ranks(checkpoint, settings, placement)
    return placement


@sharing_skeletons()
def require_ranks(checkpoint: Checkpoint, settings: Settings, placement: Placement) -> None:
    """Refuse a model that the ranks of a placement cannot divide, before they start.

    Raises:
        ConfigError: they cannot.
    """
    # A model that cannot be built without weights is opened all the same, and says what is wrong with it.
    with suppress(ModelError):
        replica_class(placement.partition).require_ranks(placement.partition, checkpoint, settings, placement.ranks)


def size_of(checkpoint: Checkpoint, settings: Settings) -> Footprint | None:
    """Return a checkpoint's size, or None if it cannot be determined."""
    # A model that cannot be sized is opened as `single`, and says what is wrong with it.
    with suppress(ModelError):
        return footprint(checkpoint, settings)
    return None


@dataclass(frozen=True, kw_only=True)
class PartitionChoice:
    """A partition for a model.

    Attributes:
        partition: name of the partition.
        gpus: number of GPUs of a replica; 0 on CPUs.
        why: reason, for people.
    """

    partition: str
    gpus: int
    why: str


def choose(
    size: Footprint | None, settings: Settings, execution: Execution, devices: Devices, *, head: bool = False
) -> Placement:
    """Return the requested placement, or the simplest into which the model fits.

    ``auto``: `single` if one device holds weights and activations; else `device_map` over the fewest GPUs of one host
    that do; else, without a head, `fsdp` over the fewest GPUs of several hosts with several GPUs each, or `zero3` if
    the installed transformers lacks `fsdp`; else `streaming`. Other gangs are never chosen, and `streaming` is not if
    the weights would stay quantized, because it computes with other numbers.

    Args:
        size: size of the checkpoint, required if `needs_size`. If it is None, ``auto`` is `single`.
        head: the head runs, too.

    Raises:
        ConfigError: the devices or limits do not fit the requested partition, or ranks have no room for the layer that
            they gather; or ``auto`` finds no partition for weights that would stay quantized.
    """
    has_gpus = devices.kind == "cuda"
    if execution.gpus_per_replica and not has_gpus:
        raise ConfigError("`gpus_per_replica` needs GPUs, and there is none.", "Leave it out, or set `device` to cuda.")
    if execution.partition != "auto":
        choice = _requested(execution, devices)
    elif size:
        choice = _fitting(size, settings, execution, devices, head=head)
        _require_unpacked(choice, size)
    else:
        choice = PartitionChoice(partition=WHOLE, gpus=int(has_gpus), why="the checkpoint's size is not known")
    ranks = _num_ranks(choice, execution)
    if size:
        _require_room_to_gather(choice.partition, ranks, size, settings, devices, head=head)
    return Placement(
        partition=choice.partition,
        ranks=ranks,
        gpus=choice.gpus,
        max_memory=weight_limits(choice.partition, size, settings, execution.max_memory, devices.kind, head=head),
        why=choice.why,
    )


def _require_unpacked(choice: PartitionChoice, size: Footprint) -> None:
    """Refuse to stream weights that would stay quantized, because streaming computes with other numbers."""
    if not size.quantized or choice.partition != LAYERWISE:
        return
    hint = "Use more memory or GPUs, or a `partition` of several ranks."
    if size.can_unpack:
        effect = "with which it is streamed and the numbers are those of unpacked weights"
        hint = f"Set `dequantize`, {effect}. {hint}"
    raise ConfigError(
        f"The weights stay quantized, and {choice.why}. `partition` {LAYERWISE}, for which one layer must fit, "
        "computes with unpacked weights.",
        hint,
    )


def _num_ranks(choice: PartitionChoice, execution: Execution) -> int:
    """Return the number of ranks of a replica: as requested, else one for each GPU, else two."""
    if choice.partition not in GANGS:
        return 1
    ranks = execution.ranks or choice.gpus or 2
    if choice.gpus and choice.gpus != ranks:
        raise ConfigError(
            f"`ranks` is {ranks} and `gpus_per_replica` {choice.gpus}, but every rank has one GPU.",
            "Set one of the two.",
        )
    return ranks


def needs_size(execution: Execution) -> bool:
    """Whether `choose` depends on the size of the checkpoint."""
    partition = execution.partition
    return partition == "auto" or PARTITIONS[partition].splits_data or bool(execution.max_memory)


def weight_limits(
    partition: str,
    size: Footprint | None,
    settings: Settings,
    limits: Mapping[str, int],
    kind: str,
    *,
    head: bool = False,
) -> dict[str, int]:
    """Return the bytes that weights and waiting hidden states may take, by device, for `Placement.max_memory`.

    Args:
        size: size of the checkpoint. If it is None, no limit is refused.
        limits: ``Execution.max_memory``: limits of all memory of a replica, by device.
        kind: kind of the computing device, ``cpu`` or ``cuda``.
        head: the head runs, too.

    Raises:
        ConfigError: the limit of host memory is lower than `least_host_bytes`.
    """
    remaining = dict(limits)
    if "cpu" in limits:
        if size:
            _require_host_limit(limits["cpu"], partition, size, settings, kind, head=head)
        remaining["cpu"] = max(1, limits["cpu"] - bytes_beside_weights(size, settings, kind, head=head))
    if PARTITIONS[partition].several_gpus and size:
        batch = batch_bytes(size, settings, head=head)
        for device, limit in limits.items():
            if device != "cpu":
                remaining[device] = max(1, limit - batch)
    return remaining


def _require_host_limit(
    limit: int, partition: str, size: Footprint, settings: Settings, kind: str, *, head: bool
) -> None:
    """Refuse a limit of host memory that is lower than `least_host_bytes`."""
    needed = least_host_bytes(partition, size, settings, kind, head=head)
    if limit >= needed:
        return
    parts = [f"{describe_bytes(PROCESS_BYTES)} for the interpreter, libraries and counters"]
    batch = 0
    if kind == "cpu":
        batch = batch_bytes(size, settings, head=head)
    if batch:
        parts.append(f"{describe_bytes(batch)} for the activations of a batch")
    held = describe_bytes(needed - PROCESS_BYTES - batch)
    raise ConfigError(
        f"`max_memory` allows {describe_bytes(limit)} of host memory; with `partition` {partition} a replica "
        f"needs {describe_bytes(needed)}: {', '.join(parts)}, and {held} for the weights that are held at "
        "once.",
        f"Allow cpu={math.ceil(needed / 10**6)}MB or more.",
    )


def least_host_bytes(partition: str, size: Footprint, settings: Settings, kind: str, *, head: bool = False) -> int:
    """Return the minimum bytes of host memory of a replica: `bytes_beside_weights`, and the weights held at once."""
    beside = bytes_beside_weights(size, settings, kind, head=head)
    if PARTITIONS[partition].gang:  # `max_memory` has no effect
        return beside
    return beside + int(replica_class(partition).minimum_host_weights(size, kind, head=head))


def _require_room_to_gather(
    partition: str, ranks: int, size: Footprint, settings: Settings, devices: Devices, *, head: bool
) -> None:
    """Refuse ranks that have no room for the largest layer, which each of them gathers, beside their parts."""
    weights = replica_class(partition).minimum_rank_weights(size, ranks)
    beside = batch_bytes(size, settings, head=head)
    if devices.kind == "cpu":
        memory = "host memory"
        room = devices.host_bytes // _on_one_node(ranks, settings, devices)
        beside += PROCESS_BYTES
    else:
        memory = "GPU memory"
        room = devices.device_bytes
    if not weights or weights + beside <= room:
        return
    experts = ""
    instead = "tensor_parallel"
    if size.expert_bytes:
        experts = f", {describe_bytes(size.expert_bytes)} of them its experts"
        instead = "expert_parallel, whose ranks hold whole experts,"
    raise ConfigError(
        f"`partition` {partition} needs {describe_bytes(weights + beside)} of {memory} for each of {ranks} ranks, and "
        f"there are {describe_bytes(room)}: {describe_bytes(size.weight_bytes // ranks)} are a rank's part of the "
        f"weights, and every rank gathers whole layers, the largest of {describe_bytes(max(size.layer_bytes))}"
        f"{experts}.",
        f"Use `partition` {instead} or streaming, or more `ranks`.",
    )


def _on_one_node(processes: int, settings: Settings, devices: Devices) -> int:
    """Return the number of processes, of several on CPUs, that share the memory of one node."""
    return min(processes, max(1, devices.cpus_of_largest_node // settings.threads))


def _requested(execution: Execution, devices: Devices) -> PartitionChoice:
    """Return the requested partition."""
    partition = execution.partition
    info = PARTITIONS[partition]
    if execution.max_memory and not info.offloads:
        offloading = " or ".join(name for name, other in PARTITIONS.items() if other.offloads)
        raise ConfigError(
            f"`max_memory` has no effect on `partition` {partition}, which keeps all weights on its devices.",
            f"Leave it out, or use {offloading}.",
        )
    gpus = 0
    if devices.kind == "cuda":
        gpus = execution.gpus_per_replica or _usual_gpus(execution, devices)
    if gpus > 1 and not (info.gang or info.several_gpus):
        suitable = ", ".join(name for name, other in PARTITIONS.items() if other.gang or other.several_gpus)
        raise ConfigError(
            f"`partition` {partition} uses one GPU, not {gpus}.",
            f"Leave `gpus_per_replica` out, or use another `partition`: {suitable}.",
        )
    return PartitionChoice(partition=partition, gpus=gpus, why="it was requested")


def _usual_gpus(execution: Execution, devices: Devices) -> int:
    """Return the number of GPUs of a replica if none was requested: those of the largest node, or one."""
    info = PARTITIONS[execution.partition]
    available = devices.count_of_largest_node
    if info.gang:
        return execution.ranks or max(2, available)
    if info.several_gpus:
        return max(1, available)
    return 1


def _fitting(
    size: Footprint, settings: Settings, execution: Execution, devices: Devices, *, head: bool
) -> PartitionChoice:
    """Return the simplest partition into which a model fits, or `LAYERWISE`."""
    batch = batch_bytes(size, settings, head=head)
    weights = f"{describe_bytes(size.weight_bytes)} of weights"
    activations = f"{describe_bytes(batch)} of activations"
    if devices.kind == "cuda":
        choice = _fitting_gpus(size, batch, execution, devices, head=head)
        return replace(choice, why=f"{weights} and {activations} {choice.why}")
    replicas = execution.replicas.maximum if execution.replicas else 1
    free = int(devices.host_bytes * SPARE_SHARE) // _on_one_node(replicas, settings, devices)
    room = min(free, execution.max_memory.get("cpu", free))
    needs = f"{weights}, {activations} and {describe_bytes(PROCESS_BYTES)} for the interpreter, libraries and counters"
    where = f"into {describe_bytes(room)} of memory for each replica"
    if least_host_bytes(WHOLE, size, settings, devices.kind, head=head) <= room:
        return PartitionChoice(partition=WHOLE, gpus=0, why=f"{needs} fit {where}")
    return PartitionChoice(partition=LAYERWISE, gpus=0, why=f"{needs} do not fit {where}")


def _fitting_gpus(
    size: Footprint, batch: int, execution: Execution, devices: Devices, *, head: bool
) -> PartitionChoice:
    """Return the simplest partition over GPUs. Its reason says how weights and the activations of a batch fit."""
    limits = [limit for device, limit in execution.max_memory.items() if device.isdecimal()]
    gpu = min([devices.device_bytes, *limits])
    room = int(gpu * SPARE_SHARE) - batch
    requested = execution.gpus_per_replica
    available = devices.count_of_largest_node
    name = f"GPU of {describe_bytes(gpu)}"
    if size.weight_bytes <= room and (requested or 1) == 1:
        return PartitionChoice(partition=WHOLE, gpus=1, why=f"fit into one {name}")
    minimum = gpus_filled(size, room)
    if minimum <= (requested or available):
        gpus = int(requested or minimum)
        return PartitionChoice(partition=SEVERAL_GPUS, gpus=gpus, why=f"need {minimum} times one {name}")
    room -= 2 * max(*size.layer_bytes, size.embedding_bytes)  # one module is gathered while another one runs
    minimum = math.inf
    if room > 0:
        minimum = max(2, math.ceil(size.weight_bytes / room))
    # With a head, weights may have to be changed, which ranks with parts of them cannot do.
    may_be_in_parts = not (requested or head or execution.executor == "local")
    if may_be_in_parts and 1 < available < minimum <= devices.count:
        partition = "fsdp"
        why = "fsdp, whose ranks read their parts of the files alone"
        if obstacle := version_obstacle():
            partition = "zero3"
            why = f"zero3, because {obstacle}"
        why = f"need {minimum} times one {name} of several hosts: {why}"
        return PartitionChoice(partition=partition, gpus=int(minimum), why=why)
    return PartitionChoice(
        partition=LAYERWISE, gpus=1, why=f"do not fit into {requested or available} times one {name}"
    )


def gpus_filled(size: Footprint, room: int) -> float:
    """Return the number of GPUs that `device_map` fills with whole modules, one after the other, at least 2.

    The first GPU keeps room for the largest module that follows, because Accelerate reserves it for offloaded ones.

    Args:
        room: bytes of weights that each GPU has room for.

    Returns:
        The number; infinity if a GPU has no room for the largest module.
    """
    modules = size.module_bytes
    if max(modules) > room:
        return math.inf
    gpus = 1
    used = 0
    for number, module in enumerate(modules, 1):
        reserved = 0
        if gpus == 1:
            reserved = max(modules[number:], default=0)
        if used + module + reserved > room:
            gpus += 1
            used = 0
        used += module
    return max(2, gpus)
