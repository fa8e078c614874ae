"""Requirements of a repair: the minimum number of tokens, and weights that can be changed.

They follow from the configuration and the headers of the weight files. No weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.expert_removal import find_routed_experts
from avss_dist.models.expert_units import find_down_projections
from avss_dist.models.layers import layer_lists, linear_sizes
from avss_dist.models.loading import without_head
from avss_dist.models.patching import Parameter
from avss_dist.models.safetensors import DTYPES
from avss_dist.models.sites import find_down_projection
from avss_dist.models.size import load_skeleton
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fitter import PLAIN_HINT
from avss_dist.pruning.repair.projection import RepairError
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.weights import StoredWeights


def tokens_needed(checkpoint: Checkpoint, repair: str, settings: Settings) -> int:
    """Return the minimum number of tokens to fit a repair to, at the layer that needs the fewest.

    Args:
        repair: one of `pruning.repair.registry.REPAIRS`.

    Returns:
        0 if only a pass over tokens can tell which modules are the layers.

    Raises:
        RepairError: no layer can hold the repair; the message says why.
        ModelError: the checkpoint cannot be read, or its model cannot be built.
    """
    _, model, _ = load_skeleton(checkpoint, settings)
    text = model.config.get_text_config()
    lists = layer_lists(without_head(model), text.num_hidden_layers, settings.layers)
    if len(lists) != 1:
        return 0
    ((path, layers),) = lists.items()
    changed = {i: weight for i, layer in enumerate(layers) if (weight := _changed_weight(layer, text.hidden_size))}
    if not changed:
        raise RepairError(
            f"No layer of '{checkpoint.name}' has an MLP that ends in one linear map, or in those of its routed "
            "experts: what is missing after it cannot be given back.",
            "Set `repair` to none.",
        )
    plan = Plan(model=checkpoint.name, num_layers=len(layers), layers=path, drop=(0,))
    _require_plain(checkpoint, plan, [(layer, weight.path) for layer, weight in changed.items()], settings)
    method = REPAIRS[repair]
    return min(method.tokens_needed(weight.inputs, weight.outputs, weight.chances) for weight in changed.values())


class _ChangedWeight(NamedTuple):
    """The weight of a layer that a repair changes.

    Attributes:
        path: path below the layer.
        inputs, outputs: sizes of the linear map.
        chances: share of the tokens that reach the map.
    """

    path: str
    inputs: int
    outputs: int
    chances: float = 1.0


def _changed_weight(layer: nn.Module, width: int) -> _ChangedWeight | None:
    """Return the weight of a layer that a repair changes, or None if it has none.

    Args:
        layer: the module, which may be on the meta device.
        width: units of the residual stream.
    """
    with suppress(ModelError):
        routed = find_routed_experts(layer)
        if routed and (down := find_down_projections(layer.get_submodule(routed.experts))):
            experts, units, outputs = down.as_rows(down.module.get_parameter(down.WEIGHT)).shape
            return _ChangedWeight(f"{routed.experts}.{down.WEIGHT}", units, outputs, routed.top_k / experts)
    if linear := find_down_projection(layer, width):
        path, module = linear
        return _ChangedWeight(f"{path}.weight", *linear_sizes(module))
    return None


def _require_plain(checkpoint: Checkpoint, plan: Plan, changed: Sequence[Parameter], settings: Settings) -> None:
    """Raise RepairError if the files hold none of these weights as numbers that can be changed."""
    weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
    stored = {tensor.name: tensor.dtype for tensors in weights.files.values() for tensor in tensors.values()}
    names = [weights.names(parameter)[0] for parameter in changed]
    dtypes = [DTYPES.get(stored[name]) for name in names if name in stored]
    if not any(dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        form = f"as {stored[names[0]]}" if names[0] in stored else "under other names"
        raise RepairError(
            f"The files of '{checkpoint.name}' hold '{names[0]}' {form}, quantized or fused: "
            "nothing can be added to it.",
            PLAIN_HINT,
        )
