"""Partition ``expert_parallel``: the routed experts of a mixture are spread over the ranks, which take the same data.

Attention, dense matrices and the head are split as with ``tensor_parallel``, if the ranks divide the heads.
"""

from __future__ import annotations

from typing import Any

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import Backbone
from avss_dist.models.size import load_skeleton
from avss_dist.partition.native import (
    attention_plan,
    generic_name,
    layer_plan,
    open_by_plan,
    part_bytes,
    scale_obstacle,
    tensor_plan_obstacle,
    version_obstacle,
)
from avss_dist.partition.tensor_parallel import TensorParallelMemory, TensorParallelReplica

_ELSEWHERE = "Use `partition` fsdp, zero3, device_map or streaming."


class ExpertParallelMemory(TensorParallelMemory):
    """Memory of a replica with ranks that divide experts; see `tensor_parallel.TensorParallelMemory`."""

    plan_obstacle = None

    @staticmethod
    def require_ranks(weights: Checkpoint | str, settings: Settings, ranks: int) -> None:
        """See `PartitionMemory`."""
        require_experts(weights, settings, ranks)

    @property
    def obstacle(self) -> str | None:
        """See `PartitionMemory`."""
        return version_obstacle() or super().obstacle

    def part_bytes(self) -> int:
        """See `TensorParallelMemory`. If no plan spreads the experts, it is that of ``tensor_parallel``."""
        try:
            options = expert_options(self.weights, self.settings, self.ranks)
        except ConfigError:
            options = {"tp_size": self.ranks}
        return part_bytes(self.weights, self.settings, options)

    @property
    def summary(self) -> str:
        """See `TensorParallelMemory`."""
        return "every rank loads and keeps some of the experts of each layer"


class ExpertParallelReplica(TensorParallelReplica):
    """One rank of a mixture of experts; see `tensor_parallel.TensorParallelReplica`."""

    memory = ExpertParallelMemory

    def _open(self, checkpoint: Checkpoint, settings: Settings, *, head: bool) -> tuple[Backbone, bool]:
        """See `TensorParallelReplica`. transformers exchanges tokens in passes with gradients, and sums in others."""
        options = require_experts(checkpoint, settings, self.split.ranks)
        return open_by_plan(checkpoint, settings, self.device, head=head, **options), True


def expert_options(checkpoint: Checkpoint | str, settings: Settings, ranks: int) -> dict[str, Any]:
    """Return the fields of transformers' ``DistributedConfig`` that spread the experts of a model over ranks.

    Raises:
        ConfigError: the model has no experts that transformers can spread, or the ranks do not divide their number.
    """
    resolved, model, _ = load_skeleton(checkpoint, settings)
    rules = layer_plan(model, getattr(model, "ep_plan", {}), settings.layers)
    if resolved.gguf or not rules:
        raise ConfigError(
            f"transformers has no plan that spreads experts of {type(model).__name__} over ranks.", _ELSEWHERE
        )
    numbers = {len(stack) for path, stack in model.named_parameters() if generic_name(path) in rules}
    if wrong := sorted(number for number in numbers if number % ranks):
        raise ConfigError(
            f"{ranks} ranks do not divide the {wrong[0]} experts of a layer of {type(model).__name__}.",
            f"Set `ranks` to a divisor of {wrong[0]}. {_ELSEWHERE}",
        )
    options: dict[str, Any] = {"tp_size": ranks, "ep_size": ranks}
    if tensor_plan_obstacle(checkpoint, settings, ranks):
        attention = attention_plan(layer_plan(model, model.tp_plan, settings.layers))
        options["tp_plan"] = dict.fromkeys(attention, "replicate") or None
    return options


def require_experts(checkpoint: Checkpoint | str, settings: Settings, ranks: int) -> dict[str, Any]:
    """Return `expert_options`, with which the ranks can also split the other weights.

    Raises:
        ConfigError: see `expert_options`; or the ranks do not divide another quantized matrix into whole blocks.
    """
    options = expert_options(checkpoint, settings, ranks)
    if obstacle := scale_obstacle(checkpoint, settings, options):
        raise ConfigError(
            f"`partition` expert_parallel cannot split the weights beside the experts: {obstacle}.",
            "Set `ranks` to a smaller number.",
        )
    return options
