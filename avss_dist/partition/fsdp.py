"""Partition ``fsdp``: each rank holds a part of every parameter (PyTorch FSDP2) and takes its own data.

All ranks gather a layer's parameters when it begins and drop them when it ends, so all run equally many forward passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import probe_tokens
from avss_dist.models.loading import Backbone, load_model, open_module, predictor, without_head
from avss_dist.models.size import load_skeleton
from avss_dist.partition.device_map import unstored
from avss_dist.partition.group import require_group
from avss_dist.partition.replica import Placement, Replica
from avss_dist.partition.sharded import ShardedLanguageModel, ShardedMemory
from avss_dist.partition.splitting import (
    distributed_config,
    generic_name,
    layer_modules,
    require_version,
    scale_obstacle,
)

_RELEASED = "free_full_weight"  # transformers' name for modules whose weights are gathered while they run


class FsdpMemory(ShardedMemory):
    """Memory of a replica with FSDP2. See `sharded.ShardedMemory`."""

    @staticmethod
    def require_ranks(partition: str, weights: Checkpoint | str, settings: Settings, ranks: int) -> None:
        """Refuse a model of which transformers cannot load parts on so many ranks. See `sharded.ShardedMemory`.

        Raises:
            ConfigError: the installed transformers is too old; a rank would have none of the experts of a layer that
                the files store one by one; or ranks would unpack parts of blocks in FP8.
        """
        ShardedMemory.require_ranks(partition, weights, settings, ranks)
        require_version()
        _, model, tensors = load_skeleton(weights, settings)
        for stack in unstored(model, [tensor.name for tensor in tensors]).values():
            experts = len(stack)
            if stack.dim() == 3 and -(-experts // ranks) * (ranks - 1) >= experts:
                raise ConfigError(
                    f"`partition` fsdp would leave one of {ranks} ranks without any of the {experts} experts of a "
                    "layer, which transformers cannot load where files have them one by one.",
                    f"Set `ranks` to a divisor of {experts}, or use `partition` zero3.",
                )
        if obstacle := scale_obstacle(weights, settings, {"fsdp_size": ranks}):
            raise ConfigError(
                f"`partition` fsdp cannot unpack the weights: {obstacle}.",
                "Set `ranks` to a smaller number, leave out `dequantize`, or use `partition` streaming.",
            )


class FsdpReplica(Replica):
    """One rank of an FSDP2 model. See `partition.replica.Replica`. All ranks open it in a group (`group.join`).

    Each rank reads its part of every tensor from the files.
    """

    memory = FsdpMemory

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        self.memory.require_ranks(placement.partition, checkpoint, settings, placement.ranks)
        _, world = require_group(placement.partition, placement.ranks)
        self.language_model_type = ShardedLanguageModel
        plan = gathering_plan(load_skeleton(checkpoint, settings)[1], settings.layers)
        model = load_model(checkpoint, settings, head=head, **distributed_config(fsdp_size=world, fsdp_plan=plan))
        for module in model.modules():
            if isinstance(module, FSDPModule):  # of which the model itself and tied embeddings would keep weights
                module.set_reshard_after_forward(True, recurse=False)
                type(module).__name__ = type(module).__name__.removeprefix("FSDP")
        if head:  # FSDP2 refuses a module that first runs after those inside it
            with torch.no_grad():
                predictor(model)(input_ids=probe_tokens(self.device), use_cache=False)
        return open_module(model, layers=settings.layers, device=self.device)


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
