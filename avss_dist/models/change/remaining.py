"""A model in memory with some of its layers alone, as its pruned checkpoint has them. It shares modules and weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.forward import Change, ReplaceAttributes
from avss_dist.models.structure.layers import Layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NUM_LAYERS = "num_hidden_layers"
COUNTS = (
    "first_k_dense_replace",
    "max_window_layers",
    "num_dense_layers",
    "first_num_dense_layers",
    "moe_layer_start_index",
)
"""Settings that give the number of special layers at the start."""
LAST_INDICES = ("moe_layer_end_index",)
"""Settings that give the last layer of a kind; -1 is the last of all."""
PATTERNS = ("hybrid_override_pattern", "index_topk_pattern")
"""Settings with a character for each layer, as a text or a list."""
MAX_AMBIGUOUS = 2
"""Largest number of layers of which a list of all their indices may be a setting of each, such as [0, 1]."""
_BY_LAYER = re.compile(r"layer|block_types|block_configs|full_attn_idxs|indexer_types|activation_sparsity_pattern")
_SIZES_BY_LAYER = re.compile(
    r"(num_)?(query|kv|attention|key_value)_heads|num_(query|kv)_heads|intermediate_size|ffn_multipliers"
)
_OTHER_MODULES = re.compile(r"^(mtp|vision|audio|image|encoder|conv)_")
_INDICES = re.compile(r"layer|idx|indices|index")
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


def settings_by_layer(config: Mapping[str, Any], num_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    """Return the per-layer settings of a configuration, recognized by name, shortened to the remaining layers.

    Args:
        num_layers: number of layers of the configuration.
        keep: indices of the remaining layers, ascending.
    """
    shortened: dict[str, Any] = {}
    for name, value in config.items():
        if name in COUNTS:
            if type(value) is int and value < num_layers:
                shortened[name] = len([layer for layer in keep if layer < value])
        elif name in LAST_INDICES:
            if type(value) is int and 0 <= value < num_layers:
                shortened[name] = len([layer for layer in keep if layer <= value]) - 1
        elif name in PATTERNS:
            if isinstance(value, str | list) and len(value) == num_layers:
                remaining = [value[layer] for layer in keep]
                if isinstance(value, str):
                    shortened[name] = "".join(remaining)
                else:
                    shortened[name] = remaining
        elif _OTHER_MODULES.search(name):
            continue
        elif isinstance(value, list):
            items = _remaining_items(name, value, num_layers, keep)
            if items is not None:
                shortened[name] = items
        elif isinstance(value, Mapping) and _BY_LAYER.search(name) and _is_by_layer(value, num_layers):
            shortened[name] = _remaining_entries(value, keep)
    return shortened


def _remaining_items(name: str, value: list[Any], num_layers: int, keep: Sequence[int]) -> list[Any] | None:
    """Return a list of a configuration, shortened to the remaining layers, or None if it is not one of layers.

    It has an item for each layer, or it is a list of indices of layers.
    """
    if not _BY_LAYER.search(name) and not _SIZES_BY_LAYER.fullmatch(name):
        return None
    may_be_indices = bool(value) and (bool(_INDICES.search(name)) or name.endswith("idxs"))
    indices = may_be_indices and _are_layers(value, num_layers)
    lists_every_layer = indices and len(value) > MAX_AMBIGUOUS and len(set(value)) == len(value)
    if len(value) == num_layers and not lists_every_layer:
        return [value[layer] for layer in keep]
    if indices:
        return [keep.index(layer) for layer in value if layer in keep]
    return None


def _are_layers(value: list[Any], num_layers: int) -> bool:
    """Whether all items are indices of layers."""
    for item in value:
        if type(item) is not int or not 0 <= item < num_layers:
            return False
    return True


def _is_by_layer(value: Mapping[Any, Any], num_layers: int) -> bool:
    """Whether all keys of a mapping are indices of layers, as numbers or texts."""
    layers = {str(layer) for layer in range(num_layers)}
    keys = {str(key) for key in value}
    return bool(keys) and keys.issubset(layers)


def _remaining_entries(value: Mapping[Any, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Return the entries of the remaining layers, by their new indices as texts."""
    new_indices = {str(old): str(new) for new, old in enumerate(keep)}
    entries = {}
    for key, setting in value.items():
        if str(key) in new_indices:
            entries[new_indices[str(key)]] = setting
    return entries


def is_own_index(name: str, value: object, index: int) -> bool:
    """Whether an attribute of a module in a layer is the layer's index, from 0 or from 1."""
    return type(value) is int and bool(_OWN_INDEX.match(name)) and value in (index, index + 1)
