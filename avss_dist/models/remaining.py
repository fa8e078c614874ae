"""A model in memory with some of its layers alone, as its pruned checkpoint has them. It shares modules and weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.layer_settings import NUM_LAYERS, is_own_index, settings_by_layer
from avss_dist.models.layers import Layer


@contextmanager
def without_modules(model: nn.Module, layers: Sequence[Layer], removed: Collection[int]) -> Iterator[None]:
    """Have a model hold only its remaining layers inside the context; everything is restored at its end.

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
    configs = _configs(model, modules)
    indices = [
        (vars(module), name, value, value + new - old)
        for new, old in enumerate(keep)
        for module in layers[old].module.modules()
        for name, value in vars(module).items()
        if is_own_index(name, value, old)
    ]
    settings = [dict(vars(config)) for config in configs]
    children = dict(modules._modules)
    try:
        modules._modules.clear()
        modules._modules.update({str(new): layers[old].module for new, old in enumerate(keep)})
        for attributes, name, _, new in indices:
            attributes[name] = new
        for config in configs:
            shortened = settings_by_layer(vars(config), len(layers), keep)
            vars(config).update({**shortened, _num_layers_key(config): len(keep)})
        yield
    finally:
        modules._modules.clear()
        modules._modules.update(children)
        for attributes, name, old, _ in indices:
            attributes[name] = old
        for config, values in zip(configs, settings, strict=True):
            vars(config).clear()
            vars(config).update(values)


def _layer_list(model: nn.Module, layers: Sequence[Layer]) -> nn.ModuleList:
    """Return the module list of a model that holds exactly the layers, in order."""
    wanted = [layer.module for layer in layers]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and [*module] == wanted:  # modules are equal if they are the same
            return module
    raise ModelError("The layers are not the modules of one list, each used once.")


def _configs(model: nn.Module, modules: nn.ModuleList) -> list[Any]:
    """Return the configurations with the number of layers, of the modules around the layer list and inside of it."""
    from transformers import PreTrainedConfig

    inside = set(modules.modules())
    holders = [module for module in model.modules() if module in inside or modules in set(module.modules())]
    configs = [getattr(module, "config", None) for module in holders]
    known = [config for config in configs if isinstance(config, PreTrainedConfig)]
    distinct = {id(part): part for config in known for part in (config, config.get_text_config())}
    return [config for config in distinct.values() if vars(config).get(_num_layers_key(config)) == len(modules)]


def _num_layers_key(config: Any) -> str:
    return str(config.attribute_map.get(NUM_LAYERS, NUM_LAYERS))
