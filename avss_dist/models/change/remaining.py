"""A model in memory with some of its layers alone, as its pruned checkpoint has them. It shares modules and weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoint.layer_settings import NUM_LAYERS, settings_by_layer
from avss_dist.models.forward import Change, ReplaceAttributes
from avss_dist.models.structure.layers import Layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OWN_INDEX = re.compile(r"^(layer|block)?_?(idx|index|id|number)$")


def remaining_modules(model: nn.Module, layers: Sequence[Layer], removed: Collection[int]) -> list[Change]:
    """Return the changes by which a model holds only its remaining layers.

    Remaining layers are the same modules, with their hooks and their current weights, and have new indices. The
    model's configuration has the settings of the remaining layers. A forward pass equals one that skips the removed
    layers, and a key-value cache has an entry for every layer, if the family has no other setting by layer.

    Args:
        model: model that contains the layers.
        removed: indices of layers.

    Raises:
        ModelError: the layers are not the modules of one list, each used once.
    """
    modules = _layer_list(model, layers)
    keep = [layer.index for layer in layers if layer.index not in removed]
    changes: list[Change] = []
    for new, old in enumerate(keep):
        for module in layers[old].module.modules():
            for name, value in vars(module).items():
                if is_own_index(name, value, old):
                    changes.append(ReplaceAttributes(module, {name: value + new - old}))
    for config in _configs(model, modules):
        settings = settings_by_layer(vars(config), len(layers), keep)
        settings[_num_layers_key(config)] = len(keep)
        changes.append(ReplaceAttributes(config, settings))
    remaining = {str(new): layers[old].module for new, old in enumerate(keep)}
    changes.append(ReplaceAttributes(modules, {"_modules": remaining}))
    return changes


def _layer_list(model: nn.Module, layers: Sequence[Layer]) -> nn.ModuleList:
    """Return the module list that holds the layers.

    Raises:
        ModelError: the layers are not the modules of one list, each used once.
    """
    uses = [layer.module for layer in layers]
    for modules in model.modules():
        # Modules are equal if they are the same.
        if isinstance(modules, nn.ModuleList) and list(modules) == uses:
            return modules
    raise ModelError("The layers are not the modules of one list, each used once.")


def _configs(model: nn.Module, modules: nn.ModuleList) -> list[PreTrainedConfig]:
    """Return the configurations with the number of layers, of the modules around the layer list and inside of it."""
    from transformers import PreTrainedConfig

    inside = set(modules.modules())
    distinct: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if module not in inside and modules not in set(module.modules()):
            continue
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            text_config = config.get_text_config()
            distinct[id(config)] = config
            distinct[id(text_config)] = text_config
    return [config for config in distinct.values() if vars(config).get(_num_layers_key(config)) == len(modules)]


def _num_layers_key(config: PreTrainedConfig) -> str:
    return str(config.attribute_map.get(NUM_LAYERS, NUM_LAYERS))


def is_own_index(name: str, value: object, index: int) -> bool:
    """Whether an attribute of a module in a layer is the layer's index, from 0 or from 1."""
    return type(value) is int and bool(_OWN_INDEX.match(name)) and value in (index, index + 1)
