"""Choice of the partition of a checkpoint on given devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

from avss_dist.core.devices import SPARE_SHARE, Devices
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.registry import GANGS, LAYERWISE, PARTITIONS, SEVERAL_GPUS, WHOLE
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import describe_bytes
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.size import Footprint, footprint, sharing_skeletons
from avss_dist.partition.replica import PROCESS_BYTES, Placement, batch_bytes, bytes_beside_weights, replica_class
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
    with suppress(ModelError):  # a model that cannot be built without weights is opened, and says what is wrong with it
        replica_class(placement.partition).require_ranks(placement.partition, checkpoint, settings, placement.ranks)


def size_of(checkpoint: Checkpoint, settings: Settings) -> Footprint | None:
    """Return a checkpoint's size, or None if it cannot be determined."""
    with suppress(ModelError):  # what cannot be sized is opened as `single`, which says what is wrong with it
        return footprint(checkpoint, settings)
    return None


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
    cuda = devices.kind == "cuda"
    if execution.gpus_per_replica and not cuda:
        raise ConfigError("`gpus_per_replica` needs GPUs, and there is none.", "Leave it out, or set `device` to cuda.")
    if execution.partition != "auto":
        partition, gpus, why = _requested(execution, devices)
    elif size:
        partition, gpus, why = _fitting(size, settings, execution, devices, head=head)
        if size.quantized and partition == LAYERWISE:
            hint = "Use more memory or GPUs, or a `partition` of several ranks."
            if size.can_unpack:
                how = "with which it is streamed and the numbers are those of unpacked weights"
                hint = f"Set `dequantize`, {how}. {hint}"
            raise ConfigError(
                f"The weights stay quantized, and {why}. `partition` {LAYERWISE}, for which one layer must fit, "
                "computes with unpacked weights.",
                hint,
            )
    else:
        partition, gpus, why = WHOLE, int(cuda), "the checkpoint's size is not known"
    ranks = (execution.ranks or gpus or 2) if partition in GANGS else 1
    if partition in GANGS and gpus and gpus != ranks:
        raise ConfigError(
            f"`ranks` is {ranks} and `gpus_per_replica` {gpus}, but every rank has one GPU.", "Set one of the two."
        )
    if size:
        _require_room_to_gather(partition, ranks, size, settings, devices, head=head)
    return Placement(
        partition=partition,
        ranks=ranks,
        gpus=gpus,
        max_memory=weight_limits(partition, size, settings, execution.max_memory, devices.kind, head=head),
        why=why,
    )


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
        limit, needed = limits["cpu"], least_host_bytes(partition, size, settings, kind, head=head) if size else 0
        if size and limit < needed:
            batch = batch_bytes(size, settings, head=head) if kind == "cpu" else 0
            parts = [f"{describe_bytes(PROCESS_BYTES)} for the interpreter, libraries and counters"]
            parts += [f"{describe_bytes(batch)} for the activations of a batch"] if batch else []
            held = describe_bytes(needed - PROCESS_BYTES - batch)
            raise ConfigError(
                f"`max_memory` allows {describe_bytes(limit)} of host memory; with `partition` {partition} a replica "
                f"needs {describe_bytes(needed)}: {', '.join(parts)}, and {held} for the weights that are held at "
                "once.",
                f"Allow cpu={-(-needed // 10**6)}MB or more.",
            )
        remaining["cpu"] = max(1, limit - bytes_beside_weights(size, settings, kind, head=head))
    if PARTITIONS[partition].several_gpus and size:
        batch = batch_bytes(size, settings, head=head)
        remaining |= {gpu: max(1, limit - batch) for gpu, limit in limits.items() if gpu != "cpu"}
    return remaining


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
    beside, room, memory = batch_bytes(size, settings, head=head), devices.device_bytes, "GPU memory"
    if devices.kind == "cpu":
        room, memory = devices.host_bytes // _on_one_node(ranks, settings, devices), "host memory"
        beside += PROCESS_BYTES
    if not weights or weights + beside <= room:
        return
    experts = f", {describe_bytes(size.expert_bytes)} of them its experts" if size.expert_bytes else ""
    instead = "expert_parallel, whose ranks hold whole experts," if experts else "tensor_parallel"
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


def _requested(execution: Execution, devices: Devices) -> tuple[str, int, str]:
    """Return the partition, its number of GPUs, and the reason, for people."""
    partition = execution.partition
    info = PARTITIONS[partition]
    if execution.max_memory and not info.offloads:
        offloading = " or ".join(name for name, other in PARTITIONS.items() if other.offloads)
        raise ConfigError(
            f"`max_memory` has no effect on `partition` {partition}, which keeps all weights on its devices.",
            f"Leave it out, or use {offloading}.",
        )
    gpus, here = 0, devices.count_of_largest_node
    if devices.kind == "cuda":
        usual = (execution.ranks or max(2, here)) if info.gang else max(1, here) if info.several_gpus else 1
        gpus = execution.gpus_per_replica or usual
    if gpus > 1 and not (info.gang or info.several_gpus):
        suitable = ", ".join(name for name, other in PARTITIONS.items() if other.gang or other.several_gpus)
        raise ConfigError(
            f"`partition` {partition} uses one GPU, not {gpus}.",
            f"Leave `gpus_per_replica` out, or use another `partition`: {suitable}.",
        )
    return partition, gpus, "it was requested"


def _fitting(
    size: Footprint, settings: Settings, execution: Execution, devices: Devices, *, head: bool
) -> tuple[str, int, str]:
    """Return the partition, its number of GPUs, and the reason, for people."""
    batch = batch_bytes(size, settings, head=head)
    weights, activations = f"{describe_bytes(size.weight_bytes)} of weights", f"{describe_bytes(batch)} of activations"
    if devices.kind == "cuda":
        partition, gpus, where = _fitting_gpus(size, batch, execution, devices, head=head)
        return partition, gpus, f"{weights} and {activations} {where}"
    maximum = execution.replicas.maximum if execution.replicas else 1
    free = int(devices.host_bytes * SPARE_SHARE) // _on_one_node(maximum, settings, devices)
    room = min(free, execution.max_memory.get("cpu", free))
    fits = least_host_bytes(WHOLE, size, settings, devices.kind, head=head) <= room
    return (
        WHOLE if fits else LAYERWISE,
        0,
        f"{weights}, {activations} and {describe_bytes(PROCESS_BYTES)} for the interpreter, libraries and counters "
        f"{'fit' if fits else 'do not fit'} into {describe_bytes(room)} of memory for each replica",
    )


def _fitting_gpus(
    size: Footprint, batch: int, execution: Execution, devices: Devices, *, head: bool
) -> tuple[str, int, str]:
    """Return the partition, its number of GPUs, and how the weights and activations of a batch fit, for people."""
    limits = [limit for device, limit in execution.max_memory.items() if device.isdecimal()]
    gpu = min([devices.device_bytes, *limits])
    room = int(gpu * SPARE_SHARE) - batch
    requested, available = execution.gpus_per_replica, devices.count_of_largest_node
    name = f"GPU of {describe_bytes(gpu)}"
    if size.weight_bytes <= room and (requested or 1) == 1:
        return WHOLE, 1, f"fit into one {name}"
    minimum = gpus_filled(size, room)
    if minimum <= (requested or available):
        return SEVERAL_GPUS, int(requested or minimum), f"need {minimum} times one {name}"
    room -= 2 * max(*size.layer_bytes, size.embedding_bytes)  # one module is gathered while another one runs
    minimum = max(2, -(-size.weight_bytes // room)) if room > 0 else math.inf
    in_parts = not (requested or head or execution.executor == "local")  # with a head, weights may have to be changed
    if in_parts and 1 < available < minimum <= devices.count:
        partition, why = "fsdp", "fsdp, whose ranks read their parts of the files alone"
        if obstacle := version_obstacle():
            partition, why = "zero3", f"zero3, because {obstacle}"
        return partition, int(minimum), f"need {minimum} times one {name} of several hosts: {why}"
    return LAYERWISE, 1, f"do not fit into {requested or available} times one {name}"


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
    gpus, used = 1, 0
    for number, module in enumerate(modules, 1):
        reserved = max(modules[number:], default=0) if gpus == 1 else 0
        if used + module + reserved > room:
            gpus, used = gpus + 1, 0
        used += module
    return max(2, gpus)
