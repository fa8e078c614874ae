"""Which partition a checkpoint gets on the devices that there are, and why."""

from __future__ import annotations

from avss_dist.errors import ConfigError
from avss_dist.models.size import Footprint
from avss_dist.partition.base import Placement
from avss_dist.settings import GANGS, Execution, Settings
from avss_dist.system.devices import Devices
from avss_dist.text import describe_bytes

SPARE_SHARE = 0.9  # of a device's memory that weights and activations may take
PROCESS_BYTES = 1 << 30  # interpreter, libraries and counters of a process, beside weights and activations


def choose(size: Footprint | None, settings: Settings, execution: Execution, devices: Devices) -> Placement:
    """The placement that was asked for, or the simplest into which the model fits.

    ``auto``: `single` if one device holds weights and activations; else `device_map` over the fewest GPUs of one host
    that do; else `streaming`. Gangs are for those who ask: `zero3` and `tensor_parallel` need fast links to pay.

    Args:
        size: of the checkpoint, for ``auto``; where it is not known, that is `single`.

    Raises:
        ConfigError: the partition cannot have what was asked for.
    """
    cuda = devices.kind == "cuda"
    if execution.gpus_per_replica and not cuda:
        raise ConfigError("--gpus-per-replica was given, and there is no GPU.", "Leave it out, or pass --device cuda.")
    if execution.partition == "auto":
        unknown = "single", int(cuda), "the checkpoint's size is not known"
        partition, gpus, why = _fitting(size, settings, execution, devices) if size else unknown
    else:
        partition, why = execution.partition, "it was asked for"
        gpus = (execution.gpus_per_replica or _usual_gpus(partition, execution, devices)) if cuda else 0
    ranks = _ranks(partition, execution, gpus)
    if partition in ("single", "streaming") and gpus > 1:
        raise ConfigError(
            f"--partition {partition} uses one GPU, and --gpus-per-replica asks for {gpus}.",
            "Use --partition device_map, zero3 or tensor_parallel, or leave --gpus-per-replica out.",
        )
    return Placement(
        partition=partition,
        ranks=ranks,
        gpus=gpus,
        max_memory=dict(execution.max_memory),
        offload_folder=execution.offload_folder,
        why=why,
    )


def _usual_gpus(partition: str, execution: Execution, devices: Devices) -> int:
    if partition in GANGS:
        return execution.ranks or max(2, devices.count_of_largest_node)
    return max(1, devices.count_of_largest_node) if partition == "device_map" else 1


def _ranks(partition: str, execution: Execution, gpus: int) -> int:
    if partition not in GANGS:
        return 1
    ranks = execution.ranks or gpus or 2
    if gpus and gpus != ranks:
        raise ConfigError(
            f"--ranks {ranks} with --gpus-per-replica {gpus}: every rank has one GPU.", "Give one of the two."
        )
    return ranks


def _fitting(size: Footprint, settings: Settings, execution: Execution, devices: Devices) -> tuple[str, int, str]:
    """Partition, GPUs, reason."""
    batch = size.activation_bytes(settings.batch_size, settings.sequence_length)
    need = size.weight_bytes + batch
    what = f"{describe_bytes(size.weight_bytes)} of weights and {describe_bytes(batch)} of activations"
    if devices.kind == "cpu":
        room = execution.max_memory.get("cpu", devices.host_bytes)
        room = int(room * SPARE_SHARE) // (execution.replicas or 1) - PROCESS_BYTES
        where = f"{describe_bytes(max(room, 0))} of memory for each replica"
        if need <= room:
            return "single", 0, f"{what} fit into {where}"
        return "streaming", 0, f"{what} do not fit into {where}"
    room = int(devices.device_bytes * SPARE_SHARE)
    asked, most = execution.gpus_per_replica, devices.count_of_largest_node
    a_gpu = f"GPU of {describe_bytes(devices.device_bytes)}"
    if need <= room and (asked or 1) == 1:
        return "single", 1, f"{what} fit into one {a_gpu}"
    fewest = max(2, -(-size.weight_bytes // (room - batch))) if room > batch else most + 1
    if fewest <= (asked or most):
        return "device_map", asked or fewest, f"{what} need {fewest} times one {a_gpu}"
    return "streaming", 1, f"{what} do not fit into {asked or most} times one {a_gpu}"
