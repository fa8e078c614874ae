"""Estimate of the memory of a distillation: for each choice of trained weights, by one process and by several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

from avss_dist.core.registry import SHARDINGS
from avss_dist.core.settings import TRAINED, Settings
from avss_dist.core.text import describe_bytes
from avss_dist.distillation.memory import LIBRARIES, Memory, estimate_memory
from avss_dist.distillation.pair import computes_in_bfloat16
from avss_dist.distillation.trained import LORA
from avss_dist.models.checkpoints import Checkpoint, locate
from avss_dist.requests import DistillRequest, EstimateRequest, require_divisible
from avss_dist.system.devices import Devices


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
            yield _row(train, sharding, processes, memory, devices)


def _row(train: str, sharding: str, ranks: int, memory: Memory, devices: Devices) -> DistillRow:
    on_gpu = devices.kind == "cuda"
    needed = memory.total + (0 if on_gpu else LIBRARIES)
    fits = needed <= devices.device_bytes and ranks <= devices.count if on_gpu else ranks * needed <= devices.host_bytes
    parts = {**memory.parts, **({} if on_gpu else {"libraries": LIBRARIES})}
    return DistillRow(
        train=train,
        sharding=sharding,
        ranks=ranks,
        trained=memory.trained,
        device_bytes=needed,
        fits=fits,
        why=", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items()),
    )
