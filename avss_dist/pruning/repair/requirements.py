"""Requirements of a repair: the minimum number of tokens, and weights that can be changed.

They follow from the configuration and the headers of the weight files. No weight is read.
"""

from __future__ import annotations

from torch import nn

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import layer_lists, linear_sizes
from avss_dist.models.loading import without_head
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
    maps = {
        index: linear for index, layer in enumerate(layers) if (linear := find_down_projection(layer, text.hidden_size))
    }
    if not maps:
        raise RepairError(
            f"No layer of '{checkpoint.name}' has an MLP that ends in one linear map of its own (experts are routed, "
            "or fused): what is missing after it cannot be given back.",
            "Set `repair` to none.",
        )
    plan = Plan(model=checkpoint.name, num_layers=len(layers), layers=path, drop=(0,))
    _require_plain(checkpoint, plan, maps, settings)
    inputs, outputs = zip(*(linear_sizes(module) for _, module in maps.values()), strict=True)
    return REPAIRS[repair].tokens_needed(min(inputs), min(outputs))


def _require_plain(
    checkpoint: Checkpoint, plan: Plan, maps: dict[int, tuple[str, nn.Module]], settings: Settings
) -> None:
    """Raise RepairError if the files hold none of these linear maps as numbers that can be changed.

    Args:
        maps: path and module by layer.
    """
    weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
    stored = {tensor.name: tensor.dtype for tensors in weights.files.values() for tensor in tensors.values()}
    names = [weights.name((layer, f"{path}.weight")) for layer, (path, _) in maps.items()]
    dtypes = [DTYPES.get(stored[name]) for name in names if name in stored]
    if not any(dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        form = f"as {stored[names[0]]}" if names[0] in stored else "under other names"
        raise RepairError(
            f"The files of '{checkpoint.name}' hold '{names[0]}' {form}, quantized or fused: "
            "nothing can be added to it.",
            PLAIN_HINT,
        )
