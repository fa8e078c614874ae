"""Memory of a distillation, estimated before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avss_dist.core.devices import Devices, available_memory, devices_here
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.distillation.pair import LORA, ModelPair, choose_trained
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import Footprint, footprint, load_skeleton
from avss_dist.partition.catalog import SHARDINGS, ShardingInfo
from avss_dist.partition.training import BUCKET

if TYPE_CHECKING:
    from avss_dist.requests import DistillRequest

FLOAT32 = 4  # bytes of a weight that is trained, of its gradient, and of each of the optimizer's two moments
LIBRARIES = 500 << 20  # of a process with its libraries, on a CPU


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes of a distillation in one process: the only one, or one of several ranks.

    Attributes:
        parts: bytes in the training by a word for people. They are the weights of the student in float32, the gradients
            of the trained weights, the two moments of the optimizer, or this rank's part of these, buffers and gathered
            weights of an exchange between ranks, the teacher in its compute dtype, the activations of a batch that
            the backward pass reads, and the logits of the student with those of the teacher or the gradient.
        written: weights of the whole student, in float32, which the end of the training needs.
        trained: number of trained parameters.
    """

    parts: Mapping[str, int]
    written: int
    trained: int

    @property
    def total(self) -> int:
        """Maximum of the sum of all parts in the training, and of what its end needs."""
        training = sum(self.parts.values())
        end = self.written + self.parts["teacher"] + self.parts["logits"]
        return max(training, end)

    def describe(self) -> str:
        """Return the total and its parts, in a line."""
        parts = ", ".join(f"{name} {describe_bytes(size)}" for name, size in self.parts.items() if size)
        return f"{describe_bytes(self.total)} ({parts})"


def estimate_memory(
    student: Checkpoint,
    teacher: Checkpoint,
    settings: Settings,
    teacher_settings: Settings,
    *,
    train: str,
    rank: int,
    sharding: str = next(iter(SHARDINGS)),
    ranks: int = 1,
) -> Memory:
    """Estimate the memory of a distillation on each rank from configurations and headers alone.

    Args:
        student, teacher: checkpoints, whose weights may be on the hub.
        settings: of the student; ``batch_size`` and ``sequence_length`` are those of a rank's training step.
        teacher_settings: of the teacher, with its compute dtype.
        train, rank: see `choose_trained`.
        sharding: a name of `partition.catalog.SHARDINGS`.

    Raises:
        ModelError: a checkpoint cannot be read or built.
    """
    skeleton, _ = load_skeleton(student, settings)
    model = choose_trained(deepcopy(skeleton), train, rank)  # it may be shared, and an adapter changes it
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    size = footprint(student, settings)
    info = SHARDINGS[sharding]
    whole = FLOAT32 * sum(parameter.numel() for parameter in parameters)
    gradients = FLOAT32 * trained
    copy = 0
    if info.zero_stage:
        copy = FLOAT32 * trained  # DeepSpeed's own, which the optimizer changes
    exchange = 0
    if ranks > 1:
        exchange = _exchanged_bytes(size, info, trained)
    # Of a layer: 6 tensors as wide as the residual stream (its input, norms, sums), 5 as the attention (queries, keys,
    # values, output), and half as many again as the outputs of all linear maps of the MLP.
    width = 6 * size.hidden_size + 5 * size.attention_width + int(1.5 * size.mlp_width)
    tokens = settings.batch_size * settings.sequence_length

    def part(size: int, is_divided: bool) -> int:
        """Return the bytes of one rank."""
        return math.ceil(size / ranks) if is_divided else size

    parts = {
        "student": part(whole, info.weights) + part(copy, True),
        "gradients": part(gradients, info.gradients),
        "optimizer": part(2 * gradients, info.moments),
    }
    if exchange:
        parts["exchange"] = exchange
    parts["teacher"] = footprint(teacher, teacher_settings).weight_bytes
    parts["activations"] = FLOAT32 * tokens * width * size.num_layers
    parts["logits"] = 2 * FLOAT32 * tokens * size.vocabulary
    return Memory(parts=parts, written=whole, trained=trained)


def _exchanged_bytes(size: Footprint, info: ShardingInfo, trained: int) -> int:
    """Return the bytes of the exchange between ranks.

    DDP copies gradients, and DeepSpeed has buckets. Of divided weights, two layers are whole at a time.

    Args:
        trained: number of trained parameters.
    """
    gathered = 0
    if info.weights:
        gathered = 3 * max(*size.layer_bytes, size.other_bytes)
    if info.zero_stage:
        buckets = 3 * FLOAT32 * min(BUCKET, trained)
        return buckets + gathered
    return gathered or FLOAT32 * trained


def without_layers(memory: Memory, size: Footprint, count: int) -> Memory:
    """Return the estimate for a student without ``count`` layers, the largest ones, of which all weights are trained.

    Args:
        memory: estimate for a student with all layers.
        size: size of the student with all layers, in float32.
    """
    remaining = size.num_layers - count
    dropped = sum(sorted(size.layer_bytes)[remaining:])
    parts = dict(memory.parts)
    parts["student"] -= dropped
    parts["gradients"] -= dropped
    parts["optimizer"] -= 2 * dropped
    parts["activations"] = parts["activations"] * remaining // size.num_layers
    return Memory(parts=parts, written=memory.written - dropped, trained=memory.trained - dropped // FLOAT32)


def require_memory(memory: Memory, device: str, train: str, hint: str = "", free: int | None = None) -> None:
    """Raise ConfigError if the estimate exceeds the memory of the device, with the size and what would lower it.

    Args:
        hint: replaces the hint that names options of `DistillRequest`.
        free: bytes that the process may take; by default all of this machine's, or of its smallest GPU.
    """
    needed = memory.total
    if device == "cpu":
        needed += LIBRARIES
    if free is None:
        free = available_memory() if device == "cpu" else devices_here(device).device_bytes
    if needed <= free:
        return
    if not hint:
        hint = "Lower `batch_size` or `sequence_length`."
        if train != LORA:
            hint = "Lower `batch_size` or `sequence_length`, or set `train` lora."
    raise ConfigError(
        f"Distillation with `train` {train} needs about {describe_bytes(needed)} of memory: {memory.describe()}. "
        f"There are {describe_bytes(free)}.",
        hint,
    )


def ranks_per_node(request: DistillRequest, devices: Devices) -> int:
    """Return the maximum number of ranks on one node."""
    if devices.kind == "cuda":
        places = devices.count_of_largest_node
    else:
        places = devices.cpus_of_largest_node
    return max(1, min(request.ranks, places))


def require_room(request: DistillRequest, devices: Devices, memory: Memory, models: ModelPair) -> None:
    """Raise ConfigError if the ranks have too few devices, too little memory, or unsuitable devices."""
    ranks = request.ranks
    if devices.kind == "cuda":
        places = devices.count
        kind_of_place = "GPUs"
        free = devices.device_bytes
    else:
        places = devices.cpus
        kind_of_place = "CPUs"
        free = devices.host_bytes // ranks_per_node(request, devices)
    problems = []
    if devices.kind != "cuda" and models.bfloat16 and SHARDINGS[request.sharding].is_fsdp:
        problems.append(
            ConfigError(
                f"`sharding` {request.sharding} computes in float32 on CPUs: transformers wants a GPU for bfloat16 "
                "with FSDP.",
                "Set `dtype` float32, or `sharding` zero3.",
            )
        )
    if places < ranks and not request.execution.address:
        message = f"`ranks` {ranks} need {ranks} {kind_of_place}; there are {places}."
        problems.append(ConfigError(message, "Lower `ranks`."))
    if problems:
        raise ConfigError.combine(problems)
    require_memory(memory, devices.kind, request.train, free=free)
