"""A model in memory with some of its layers alone, as its pruned checkpoint has them. It shares modules and weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.forward import replaced_attributes
from avss_dist.models.structure.layers import Layer

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
_BY_LAYER = re.compile(r"layer|block_types|block_configs|full_attn_idxs|indexer_types|activation_sparsity_pattern")
_SIZES_BY_LAYER = re.compile(
    r"(num_)?(query|kv|attention|key_value)_heads|num_(query|kv)_heads|intermediate_size|ffn_multipliers"
)
_OTHER_MODULES = re.compile(r"^(mtp|vision|audio|image|encoder|conv)_")
_INDICES = re.compile(r"layer|idx|indices|index")
_OWN_INDEX = re.compile(r"^(layer|block)?_?(idx|index|id|number)$")


@contextmanager
def without_modules(model: nn.Module, layers: Sequence[Layer], removed: Collection[int]) -> Iterator[None]:
    """Have a model hold only its remaining layers inside the context, and restore everything at its end.

    Remaining layers are the same modules, with their hooks and their current weights, and have new indices. The
    model's configuration has the settings of the remaining layers. A forward pass equals one that skips the removed
    layers, and a key-value cache has an entry for every layer, if the family has no other setting by layer.

    Args:
        model: model that contains the layers.
        removed: indices of layers.

    Raises:
        ModelError: the layers are not the modules of one list, each used once.
    """
    uses = [layer.module for layer in layers]
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    modules = next((module for module in lists if [*module] == uses), None)  # modules are equal if they are the same
    if modules is None:
        raise ModelError("The layers are not the modules of one list, each used once.")
    keep = [layer.index for layer in layers if layer.index not in removed]
    changes: list[tuple[object, dict[str, Any]]] = [
        (module, {name: value + new - old})
        for new, old in enumerate(keep)
        for module in layers[old].module.modules()
        for name, value in vars(module).items()
        if is_own_index(name, value, old)
    ]
    for config in _configs(model, modules):
        changes.append(
            (config, {**settings_by_layer(vars(config), len(layers), keep), _num_layers_key(config): len(keep)})
        )
    changes.append((modules, {"_modules": {str(new): layers[old].module for new, old in enumerate(keep)}}))
    with replaced_attributes(changes):
        yield


def _configs(model: nn.Module, modules: nn.ModuleList) -> list[Any]:
    """Return the configurations with the number of layers, of the modules around the layer list and inside of it."""
    from transformers import PreTrainedConfig

    inside = set(modules.modules())
    holders = [module for module in model.modules() if module in inside or modules in set(module.modules())]
    configs = [getattr(module, "config", None) for module in holders]
    recognized = [config for config in configs if isinstance(config, PreTrainedConfig)]
    distinct = {id(part): part for config in recognized for part in (config, config.get_text_config())}
    return [config for config in distinct.values() if vars(config).get(_num_layers_key(config)) == len(modules)]


def _num_layers_key(config: Any) -> str:
    return str(config.attribute_map.get(NUM_LAYERS, NUM_LAYERS))


def settings_by_layer(config: Mapping[str, Any], num_layers: int, keep: Sequence[int]) -> dict[str, Any]:
    """Return the per-layer settings of a configuration, recognized by name, shortened to the remaining layers.

    Args:
        num_layers: number of layers of the configuration.
        keep: indices of the remaining layers, ascending.
    """
    shortened: dict[str, Any] = {}
    layers = {*map(str, range(num_layers))}
    new = {str(layer): str(i) for i, layer in enumerate(keep)}
    for name, value in config.items():
        if name in COUNTS:
            if type(value) is int and value < num_layers:
                shortened[name] = sum(layer < value for layer in keep)
        elif name in LAST_INDICES:
            if type(value) is int and 0 <= value < num_layers:
                shortened[name] = sum(layer <= value for layer in keep) - 1
        elif name in PATTERNS:
            if isinstance(value, str | list) and len(value) == num_layers:
                remaining = [value[layer] for layer in keep]
                shortened[name] = "".join(remaining) if isinstance(value, str) else remaining
        elif _OTHER_MODULES.search(name):
            continue
        elif isinstance(value, list) and (_BY_LAYER.search(name) or _SIZES_BY_LAYER.fullmatch(name)):
            indices = all(type(layer) is int and 0 <= layer < num_layers for layer in value)
            indices = indices and bool(value and (_INDICES.search(name) or name.endswith("idxs")))
            if len(value) == num_layers and not (indices and len(set(value)) == len(value) > 2):
                shortened[name] = [value[layer] for layer in keep]
            elif indices:
                shortened[name] = [keep.index(layer) for layer in value if layer in keep]
        elif isinstance(value, Mapping) and _BY_LAYER.search(name) and value and not {*map(str, value)} - layers:
            shortened[name] = {new[str(key)]: setting for key, setting in value.items() if str(key) in new}
    return shortened


def is_own_index(name: str, value: object, index: int) -> bool:
    """Whether an attribute of a module in a layer is the layer's index, from 0 or from 1."""
    return type(value) is int and bool(_OWN_INDEX.match(name)) and value in (index, index + 1)
