"""Ranks of a distillation: processes that share each training step, started and watched by Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import SHARDINGS
from avss_dist.core.settings import Settings, refuse_unused
from avss_dist.distillation.memory import Memory, require_memory
from avss_dist.distillation.pair import ModelPair
from avss_dist.models.size import find_layers, load_skeleton
from avss_dist.system.devices import Devices

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from avss_dist.executors.ray.executor import RayExecutor
    from avss_dist.requests import DistillRequest


def open_ranks(request: DistillRequest) -> AbstractContextManager[RayExecutor | None]:
    """Return the context of the executor of the ranks of a distillation, or of None for one process.

    Raises:
        ConfigError: the cluster cannot be reached, or an option has no effect on one process.
    """
    if request.ranks == 1:
        hint = "Set `ranks` to 2 or more, or leave it out."
        names = ("address", "node_labels", "placement_seconds", "hang_seconds")
        refuse_unused({name: getattr(request.execution, name) for name in names}, "with one rank", hint)
        return nullcontext()
    from avss_dist.executors.ray.executor import RayExecutor

    return closing(RayExecutor(request.execution, request.settings))


def _ranks_per_node(request: DistillRequest, devices: Devices) -> int:
    """Return the maximum number of ranks on one node."""
    places = devices.count_of_largest_node if devices.kind == "cuda" else devices.cpus_of_largest_node
    return max(1, min(request.ranks, places))


def require_room(request: DistillRequest, devices: Devices, memory: Memory, models: ModelPair) -> None:
    """Raise ConfigError if the ranks have too few devices, too little memory, or unsuitable devices."""
    on_gpu, ranks = devices.kind == "cuda", request.ranks
    if not on_gpu and models.bfloat16 and SHARDINGS[request.sharding].is_fsdp:
        raise ConfigError(
            f"`sharding` {request.sharding} computes in float32 on CPUs: transformers wants a GPU for bfloat16 with "
            "FSDP.",
            "Set `dtype` float32, or `sharding` zero3.",
        )
    places, what = (devices.count, "GPUs") if on_gpu else (devices.cpus, "CPUs")
    if places < ranks and not request.execution.address:
        raise ConfigError(f"`ranks` {ranks} need {ranks} {what}; there are {places}.", "Lower `ranks`.")
    free = devices.device_bytes if on_gpu else devices.host_bytes // _ranks_per_node(request, devices)
    require_memory(memory, devices.kind, request.train, free=free)


def run_ranks(request: DistillRequest, executor: RayExecutor, task: Any, on_event: Callable[[Any], None]) -> None:
    """Have all ranks do a task.

    Raises:
        AvssError: a rank raised it, was lost, hangs, or found no place.
    """
    devices = executor.devices
    cpus = 0 if devices.kind == "cuda" else devices.cpus_of_largest_node // _ranks_per_node(request, devices)
    executor.run_ranks(task, request.ranks, threads=max(1, cpus), on_event=on_event)


def sharding_options(request: DistillRequest, models: ModelPair) -> AbstractContextManager[dict[str, Any]]:
    """Return a context manager that gives the arguments of the Trainer for the ranks, or none for one process."""
    if request.ranks == 1:
        return nullcontext({})
    from avss_dist.partition.sharded import trainer_options

    _, skeleton, _ = load_skeleton(models.student, models.settings)
    layers = find_layers(skeleton, models.settings)
    return trainer_options(
        request.sharding,
        models.device.type,
        rows=request.rows,
        bfloat16=models.bfloat16,
        layers={type(layer).__name__ for layer in layers},
    )


def call_at_layers(model: Any, settings: Settings, heartbeat: Callable[[], None] | None) -> None:
    """Have a model call a function whenever a layer begins, unless it is None."""
    if heartbeat is not None:
        for layer in find_layers(model, settings):
            layer.register_forward_pre_hook(lambda *_: heartbeat())
