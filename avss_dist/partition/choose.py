"""Which partition a checkpoint gets on these devices, and why."""

from __future__ import annotations

from contextlib import suppress

from avss_dist.errors import ConfigError, ModelError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.size import Footprint, footprint
from avss_dist.partition.base import Placement
from avss_dist.registry import GANGS, PARTITIONS
from avss_dist.settings import Execution, Settings
from avss_dist.system.devices import Devices
from avss_dist.text import describe_bytes

SPARE_SHARE = 0.9  # of a device's memory that weights and activations may take
PROCESS_BYTES = 1 << 30  # interpreter, libraries and counters of a process, beside weights and activations


def place(
    checkpoint: Checkpoint | str, settings: Settings, execution: Execution, devices: Devices, *, head: bool = False
) -> Placement:
    """`choose` for a checkpoint, or what a user names; its headers are read where its size matters."""
    size = size_of(checkpoint, settings) if needs_size(execution) else None
    return choose(size, settings, execution, devices, head=head)


def size_of(checkpoint: Checkpoint | str, settings: Settings) -> Footprint | None:
    """A checkpoint's size; None where it is not known."""
    with suppress(ModelError):  # what cannot be sized is opened as `single`, which says what is wrong with it
        return footprint(checkpoint, settings)
    return None


def choose(
    size: Footprint | None, settings: Settings, execution: Execution, devices: Devices, *, head: bool = False
) -> Placement:
    """The requested placement, or the simplest into which the model fits.

    ``auto``: `single` if one device holds weights and activations; else `device_map` over the fewest GPUs of one host
    that do; else `streaming`. Gangs are never chosen: they need fast links to pay.

    Args:
        size: of the checkpoint, where `needs_size`. If it is not known, ``auto`` is `single`.
        head: it runs too.

    Raises:
        ConfigError: the partition cannot have what was requested.
    """
    cuda = devices.kind == "cuda"
    if execution.gpus_per_replica and not cuda:
        raise ConfigError("`gpus_per_replica` needs GPUs, and there is none.", "Leave it out, or set `device` to cuda.")
    if execution.partition != "auto":
        partition, gpus, why = _requested(execution, devices)
    elif size:
        partition, gpus, why = _fitting(size, settings, execution, devices, head=head)
    else:
        partition, gpus, why = "single", int(cuda), "the checkpoint's size is not known"
    if partition == "streaming" and size:
        rest = size.weight_bytes - sum(size.layer_bytes) if head else size.other_bytes
        host = max(size.layer_bytes, default=0) + (0 if cuda else rest)
        require_room_for_a_layer(host, execution.max_memory.get("cpu"))
    return Placement(
        partition=partition,
        ranks=_ranks(partition, execution, gpus),
        gpus=gpus,
        max_memory=dict(execution.max_memory),
        offload_folder=execution.offload_folder,
        why=why,
    )


def needs_size(execution: Execution) -> bool:
    """Whether `choose` depends on the size of the checkpoint."""
    limited = execution.partition == "streaming" and "cpu" in execution.max_memory
    return execution.partition == "auto" or limited


def require_room_for_a_layer(needed: int, limit: int | None) -> None:
    """Refuse to stream within less host memory than the weights that must be there at once.

    Args:
        needed: bytes of the largest layer, and of what stays in host memory beside the layers.
        limit: ``max_memory["cpu"]``.

    Raises:
        ConfigError: the limit is lower.
    """
    if limit is not None and limit < needed:
        raise ConfigError(
            f"`max_memory` allows {describe_bytes(limit)} of host memory; streaming needs {describe_bytes(needed)} for "
            "one layer and what stays beside it.",
            f"Allow cpu={needed // 10**6 + 1}MB or more.",
        )


def _require_effect(execution: Execution) -> None:
    """Refuse limits that the requested partition does not honour."""
    if PARTITIONS[execution.partition].offloads:
        return
    for name in ("max_memory", "offload_folder"):
        if getattr(execution, name):
            offloading = " or ".join(partition for partition, info in PARTITIONS.items() if info.offloads)
            raise ConfigError(
                f"`{name}` has no effect on `partition` {execution.partition}, which keeps all weights on its devices.",
                f"Leave it out, or use {offloading}.",
            )


def _requested(execution: Execution, devices: Devices) -> tuple[str, int, str]:
    """Partition, GPUs, reason."""
    partition = execution.partition
    info = PARTITIONS[partition]
    _require_effect(execution)
    gpus = 0
    if devices.kind == "cuda":
        gpus = execution.gpus_per_replica or _usual_gpus(partition, execution, devices)
    if gpus > 1 and not (info.gang or info.several_gpus):
        others = ", ".join(name for name, other in PARTITIONS.items() if other.gang or other.several_gpus)
        raise ConfigError(
            f"`partition` {partition} uses one GPU, not {gpus}.",
            f"Leave `gpus_per_replica` out, or use another `partition`: {others}.",
        )
    return partition, gpus, "it was requested"


def _usual_gpus(partition: str, execution: Execution, devices: Devices) -> int:
    if partition in GANGS:
        return execution.ranks or max(2, devices.count_of_largest_node)
    return max(1, devices.count_of_largest_node) if PARTITIONS[partition].several_gpus else 1


def _ranks(partition: str, execution: Execution, gpus: int) -> int:
    if partition not in GANGS:
        return 1
    ranks = execution.ranks or gpus or 2
    if gpus and gpus != ranks:
        raise ConfigError(
            f"`ranks` is {ranks} and `gpus_per_replica` {gpus}, but every rank has one GPU.", "Set one of the two."
        )
    return ranks


def _fitting(
    size: Footprint, settings: Settings, execution: Execution, devices: Devices, *, head: bool
) -> tuple[str, int, str]:
    """Partition, GPUs, reason."""
    batch = size.activation_bytes(settings.batch_size, settings.sequence_length)
    if head:
        batch += size.logit_bytes(settings.batch_size, settings.sequence_length)
    what = f"{describe_bytes(size.weight_bytes)} of weights and {describe_bytes(batch)} of activations"
    if devices.kind == "cuda":
        partition, gpus, where = _fitting_gpus(size.weight_bytes, batch, execution, devices)
        return partition, gpus, f"{what} {where}"
    limit = execution.max_memory.get("cpu", devices.host_bytes)
    most = execution.replicas.most if execution.replicas else 1
    beside = min(most, max(1, devices.cpus_of_largest_node // settings.threads))  # replicas on one node
    room = int(limit * SPARE_SHARE) // beside - PROCESS_BYTES
    where = f"{describe_bytes(max(room, 0))} of memory for each replica"
    if size.weight_bytes + batch <= room:
        return "single", 0, f"{what} fit into {where}"
    return "streaming", 0, f"{what} do not fit into {where}"


def _fitting_gpus(weights: int, batch: int, execution: Execution, devices: Devices) -> tuple[str, int, str]:
    """Partition, GPUs, what that is to so many bytes of weights and of a batch's activations."""
    limits = [limit for device, limit in execution.max_memory.items() if device.isdecimal()]
    gpu = min([devices.device_bytes, *limits])
    room = int(gpu * SPARE_SHARE)
    requested, most = execution.gpus_per_replica, devices.count_of_largest_node
    name = f"GPU of {describe_bytes(gpu)}"
    if weights + batch <= room and (requested or 1) == 1:
        return "single", 1, f"fit into one {name}"
    fewest = max(2, -(-weights // (room - batch))) if room > batch else most + 1
    if fewest <= (requested or most):
        return "device_map", requested or fewest, f"need {fewest} times one {name}"
    return "streaming", 1, f"do not fit into {requested or most} times one {name}"
