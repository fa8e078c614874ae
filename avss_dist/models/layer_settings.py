"""Settings of a model that depend on the place of its layers: values by layer, counts, and the layers' own indices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NUM_LAYERS = "num_hidden_layers"
COUNTS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers", "first_num_dense_layers")
"""Settings that give the number of special layers at the start."""
_BY_LAYER = re.compile(r"layer|block_types|block_configs|full_attn_idxs|indexer_types|activation_sparsity_pattern")
_SIZES_BY_LAYER = re.compile(
    r"(num_)?(query|kv|attention|key_value)_heads|num_(query|kv)_heads|intermediate_size|ffn_multipliers"
)
_OF_OTHER_MODULES = re.compile(r"^(mtp|vision|audio|image|encoder|conv)_")
_INDICES = re.compile(r"layer|idx|indices|index")
_OWN_INDEX = re.compile(r"^(layer|block)?_?(idx|index|id|number)$")


def settings_by_layer(config: Mapping[str, Any], num_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    """Return the per-layer settings of a configuration, recognized by name, shortened to the remaining layers.

    Args:
        num_layers: number of layers of the configuration.
        keep: indices of the remaining layers, ascending.
    """
    shortened = {name: _shortened(name, value, num_layers, keep) for name, value in config.items()}
    return {name: value for name, value in shortened.items() if value is not None}


def is_own_index(name: str, value: object, index: int) -> bool:
    """Whether an attribute of a module in a layer is the layer's index, from 0 or from 1."""
    return type(value) is int and bool(_OWN_INDEX.match(name)) and value in (index, index + 1)


def _shortened(name: str, value: Any, num_layers: int, keep: Sequence[int]) -> Any:
    """Return a setting for the remaining layers, or None if it is not per layer."""
    if name in COUNTS:
        special = type(value) is int and value < num_layers
        return sum(layer < value for layer in keep) if special else None
    if _OF_OTHER_MODULES.search(name):
        return None
    if isinstance(value, list) and (_BY_LAYER.search(name) or _SIZES_BY_LAYER.fullmatch(name)):
        return _shortened_list(name, value, num_layers, keep)
    if isinstance(value, Mapping) and _BY_LAYER.search(name):
        return _shortened_mapping(value, num_layers, keep)
    return None


def _shortened_list(name: str, value: list[Any], num_layers: int, keep: Sequence[int]) -> list[Any] | None:
    """Return a per-layer list, or a list of layer indices, for the remaining layers, or None for other lists."""
    are_indices = bool(_INDICES.search(name) or name.endswith("idxs")) and _are_layers(value, num_layers)
    if len(value) == num_layers and not (are_indices and len(set(value)) == len(value) > 2):
        return [value[layer] for layer in keep]
    return [keep.index(layer) for layer in value if layer in keep] if are_indices else None


def _shortened_mapping(value: Mapping[Any, Any], num_layers: int, keep: Sequence[int]) -> dict[str, Any] | None:
    """Return settings by layer index for the remaining layers, or None for other mappings."""
    new = {str(layer): str(i) for i, layer in enumerate(keep)}
    if not value or not {str(key) for key in value} <= {str(layer) for layer in range(num_layers)}:
        return None
    return {new[str(key)]: settings for key, settings in value.items() if str(key) in new}


def _are_layers(values: list[Any], num_layers: int) -> bool:
    return bool(values) and all(type(value) is int and 0 <= value < num_layers for value in values)
