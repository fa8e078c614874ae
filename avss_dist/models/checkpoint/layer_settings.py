"""Settings of a configuration that concern single layers: by name, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from avss_dist.core.values import JsonObject, NewObject

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
LIST_OF_RULE = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "prefix_dense_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "attn_layer_period": "layers_block_type",
    "attn_layer_offset": "layers_block_type",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "moe_layer_freq": "mlp_layer_types",
    "first_k_dense_replace": "mlp_layer_types",
    "index_topk_freq": "indexer_types",
    "index_skip_topk_offset": "indexer_types",
}
"""Setting with an entry for each layer that says the same as a rule, by the rule. transformers reads the list first."""
DERIVED_LISTS = ("layer_types", "no_rope_layers", "layers_block_type", "indexer_types")
"""Lists that transformers derives from the number of layers where a file has none."""
UNIFORM_FAMILIES = {
    "bloom",
    "falcon",
    "gemma",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "stablelm",
    "starcoder2",
}
"""Model types whose layers are of one kind, unless their file says so."""


def settings_by_layer(config: JsonObject, num_layers: int, keep: Sequence[int]) -> NewObject:
    """Return the per-layer settings of a configuration, recognized by name, shortened to the remaining layers.

    Args:
        num_layers: number of layers of the configuration.
        keep: indices of the remaining layers, ascending.
    """
    shortened: NewObject = {}
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


def _remaining_items(name: str, value: list[object], num_layers: int, keep: Sequence[int]) -> list[object] | None:
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


def _are_layers(value: list[object], num_layers: int) -> bool:
    """Whether all items are indices of layers."""
    for item in value:
        if type(item) is not int or not 0 <= item < num_layers:
            return False
    return True


def _is_by_layer(value: Mapping[object, object], num_layers: int) -> bool:
    """Whether all keys of a mapping are indices of layers, as numbers or texts."""
    layers = {str(layer) for layer in range(num_layers)}
    keys = {str(key) for key in value}
    return bool(keys) and keys.issubset(layers)


def _remaining_entries(value: Mapping[object, object], keep: Sequence[int]) -> NewObject:
    """Return the entries of the remaining layers, by their new indices as texts."""
    new_indices = {str(old): str(new) for new, old in enumerate(keep)}
    entries = {}
    for key, setting in value.items():
        if str(key) in new_indices:
            entries[new_indices[str(key)]] = setting
    return entries


def may_go_by_place(config: JsonObject) -> bool:
    """Whether programs may take the kinds of a model's layers from their places, by the content of its ``config.json``.

    It is false of models whose layers are certainly of one kind, which are most of those that people prune.
    """
    if config.get("model_type") not in UNIFORM_FAMILIES or config.get("use_sliding_window"):
        return True
    if LIST_OF_RULE.keys() & config.keys():
        return True
    for name in DERIVED_LISTS:
        kinds = config.get(name)
        if isinstance(kinds, list) and len(set(kinds)) > 1:
            return True
    return False
