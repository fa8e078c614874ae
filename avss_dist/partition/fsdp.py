"""Partition ``fsdp``: each rank holds a part of every parameter (PyTorch FSDP2) and takes its own data.

All ranks gather a layer's parameters when it begins and drop them when it ends, so all run equally many forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer, probe_tokens
from avss_dist.models.loading import forward_function, load_model, open_module, predictor, quiet, without_head
from avss_dist.models.size import load_skeleton
from avss_dist.partition.device_map import unstored
from avss_dist.partition.group import require_group, reraise_lost_ranks
from avss_dist.partition.memory import refusal
from avss_dist.partition.replica import BatchwiseReplica, Placement, describe
from avss_dist.partition.sharded import ShardedLanguageModel, ShardedMemory, refuse_gguf, refuse_mxfp4
from avss_dist.partition.splitting import (
    distributed_config,
    generic_name,
    layer_modules,
    scale_obstacle,
    version_obstacle,
)
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

_RELEASED = "free_full_weight"  # transformers' name for modules whose weights are gathered while they run


class FsdpMemory(ShardedMemory):
    """Memory of a replica with FSDP2; see `sharded.ShardedMemory`."""

    @property
    def obstacle(self) -> str | None:
        """See `PartitionMemory`."""
        _, model, tensors = load_skeleton(self.weights, self.settings)
        converted = unstored(model, [tensor.name for tensor in tensors])
        return (
            super().obstacle
            or version_obstacle()
            or refusal(require_experts_on_every_rank, converted, self.ranks)
            or refusal(require_whole_blocks, self.weights, self.settings, self.ranks)
        )


class FsdpReplica(BatchwiseReplica):
    """One rank of an FSDP2 model; see `partition.replica.Replica`. All ranks open it in a group (`group.join`).

    Each rank reads its part of every tensor from the files.

    Raises:
        ConfigError: there is no group, or the checkpoint or the installed transformers cannot be partitioned this way.
        ModelError: the model cannot be opened or observed.
    """

    memory = FsdpMemory

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> None:
        refuse_gguf(checkpoint, placement.partition)
        _, world = require_group(placement)
        self.device = pick_device(settings.device)
        keep_freed_memory()
        _, empty, tensors = load_skeleton(checkpoint, settings)
        refuse_mxfp4(checkpoint, empty.config, settings, placement.partition)
        require_experts_on_every_rank(unstored(empty, [tensor.name for tensor in tensors]), world)
        require_whole_blocks(checkpoint, settings, world)
        plan = gathering_plan(empty, settings.layers)
        with quiet(), reraise_lost_ranks():
            model = load_model(checkpoint, settings, head=head, **distributed_config(fsdp_size=world, fsdp_plan=plan))
            _prepare(model)
            if head:
                _run(predictor(model), self.device)
            self._backbone = open_module(model, layers=settings.layers, device=self.device)
            if head:
                self.language_model = ShardedLanguageModel(checkpoint, settings, self._backbone, self.device)
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.structure.layers
        self.model: Mapping[str, Any] = describe(self._backbone, "fsdp")

    def close(self) -> None:
        """Drop this rank's part of the weights."""
        self.language_model = None
        del self._backbone, self._run, self.layers
        free_device(self.device)


def gathering_plan(model: Any, layers: str | None) -> dict[str, str]:
    """Return transformers' plan for FSDP2 in which each layer, and each other module with weights, is gathered alone.

    Embeddings that are tied to the head are gathered with the backbone: two modules share their weights, and each part
    of the model that runs must gather them itself.

    Args:
        model: the model with its head, on any device.
        layers: module path of the layer list in the backbone; None finds it.
    """
    units = {*layer_modules(model, layers), without_head(model)}
    inside = {module for unit in layer_modules(model, layers) for module in unit.modules() if module is not unit}
    tied = model.get_input_embeddings() if model.all_tied_weights_keys else None
    return {
        generic_name(path): _RELEASED
        for path, module in model.named_modules()
        if path and module not in inside | {tied} and (module in units or list(module.parameters(recurse=False)))
    }


def require_experts_on_every_rank(converted: Mapping[str, nn.Parameter], ranks: int) -> None:
    """Refuse to leave a rank without any of the experts of a layer, which transformers cannot load.

    Args:
        converted: parameters that transformers stacks while it loads, by name.

    Raises:
        ConfigError: there are experts that the files store one by one, and too many ranks for them.
    """
    for stack in converted.values():
        experts = len(stack)
        if stack.dim() == 3 and -(-experts // ranks) * (ranks - 1) >= experts:
            raise ConfigError(
                f"`partition` fsdp would leave one of {ranks} ranks without any of the {experts} experts of a layer, "
                "which transformers cannot load where files have them one by one.",
                f"Set `ranks` to a divisor of {experts}, or use `partition` zero3.",
            )


def require_whole_blocks(checkpoint: Checkpoint | str, settings: Settings, ranks: int) -> None:
    """Refuse to unpack block FP8 of which a rank would read parts of blocks.

    Raises:
        ConfigError: the ranks do not divide a matrix into whole blocks.
    """
    if obstacle := scale_obstacle(checkpoint, settings, {"fsdp_size": ranks}):
        raise ConfigError(
            f"`partition` fsdp cannot unpack the weights: {obstacle}.",
            "Set `ranks` to a smaller number, leave out `dequantize`, or use `partition` streaming.",
        )


def _prepare(model: nn.Module) -> None:
    """Have modules of an FSDP2 model drop the weights of other ranks after they ran, and carry their class's name.

    By default the model itself and tied embeddings keep them, and classes get the prefix FSDP.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            type(module).__name__ = type(module).__name__.removeprefix("FSDP")


def _run(module: Any, device: torch.device) -> None:
    """Run a module that contains others once: FSDP2 refuses a module that first runs after those inside it."""
    ids = probe_tokens(device)
    with torch.no_grad():
        module(input_ids=ids, use_cache=False)
