"""Find the layers of any model, and the sites inside them, by watching one tiny forward pass.

Names differ between families, structure does not: the layers are the shallowest module list as long as the config
says, and their order is the order of calls. The pass shows which modules run, how often, in which order and with which
axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from avss_dist.core.settings import INPUT_SITES
from avss_dist.models.layers import (
    PROBE_SHAPE,
    Layer,
    Structure,
    axes_of,
    first_tensor,
    layer_lists,
    layers_not_found,
    probe_tokens,
)
from avss_dist.models.sites import Call, LayerSites, find_sites

_LayerCall = tuple[nn.Module, str, LayerSites]  # layer, axes of its output, its sites


@dataclass
class _Trace:
    """Hooks that record a forward pass. Tensors are held for one layer at a time."""

    layer_calls: list[_LayerCall] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def enter(self, _module: nn.Module, _args: Any) -> None:
        self.calls = []

    def record(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
                self.calls.append(Call(path, module, inputs, tensor.clone()))

        return hook

    def leave(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            sites = find_sites(self.calls, type(module).__name__)
            self.layer_calls.append((module, axes_of(tensor.shape, *PROBE_SHAPE), sites))
        self.calls = []


def find_structure(
    model: nn.Module, forward: Callable[[torch.Tensor], Any], num_layers: int | None, path: str | None = None
) -> Structure:
    """Find layers and sites by one forward pass over ``PROBE_SHAPE`` tokens, and remove all hooks.

    Args:
        model: the backbone, without its head.
        forward: runs the backbone on int64[rows, tokens] token ids.
        num_layers: the config's layer count.
        path: module path of the layer list, or None to find it.

    Raises:
        ModelError: the layers cannot be found, or do not run. Exceptions of the model itself pass through.
    """
    lists = layer_lists(model, num_layers, path)
    layer_calls = _watch([module for modules in lists.values() for module in modules], forward)
    ran = {module for module, _, _ in layer_calls}
    used = {name: modules for name, modules in lists.items() if any(module in ran for module in modules)}
    if len(used) != 1:
        raise layers_not_found(
            model, num_layers, used or lists, "several module lists run" if used else "none of them runs"
        )
    (list_path, modules) = next(iter(used.items()))
    if not all(module in ran for module in modules):
        raise layers_not_found(model, num_layers, used, f"not every module of '{list_path}' runs as a layer")
    order = {module: f"{list_path}.{i}" for i, module in reversed(list(enumerate(modules)))}
    return _structure(layer_calls, dict(reversed(order.items())))


def _watch(modules: Iterable[nn.Module], forward: Callable[[torch.Tensor], Any]) -> list[_LayerCall]:
    """Return each call of these modules in one forward pass, in order: module, axes of its output, sites."""
    trace = _Trace()
    handles: list[Any] = []
    try:
        for module in dict.fromkeys(modules):
            for path, child in module.named_modules():
                if child is not module:
                    handles.append(child.register_forward_hook(trace.record(path), with_kwargs=True))
            handles.append(module.register_forward_pre_hook(trace.enter))
            handles.append(module.register_forward_hook(trace.leave, with_kwargs=True))
        forward(probe_tokens())
    finally:
        for handle in handles:
            handle.remove()
    return trace.layer_calls


def _structure(layer_calls: list[_LayerCall], names: Mapping[nn.Module, str]) -> Structure:
    """Return the layers in list order, or in the order of calls if modules are shared."""
    if len(layer_calls) == len(names):
        order = list(names)
        layer_calls = sorted(layer_calls, key=lambda item: order.index(item[0]))
    layers: list[Layer] = []
    uses: dict[nn.Module, int] = {}
    for index, (module, axes, sites) in enumerate(layer_calls):
        call = uses.get(module, 0)
        uses[module] = call + 1
        name = names[module] if call == 0 else f"{names[module]}#{call}"
        layers.append(Layer(index, name, module, call, axes, sites.taps, sites.projections, sites.experts))
    return Structure(tuple(layers), tuple(_notes(layers)))


def _notes(layers: Sequence[Layer]) -> Iterator[str]:
    yield from absent_sites(layers, ("attention", "mlp", "neuron"))
    shared = [layer for layer in layers if layer.call]
    if shared:
        yield f"layers share modules: {len(layers)} calls of {len(layers) - len(shared)} modules, each call is a layer"


def absent_sites(layers: Sequence[Layer], sites: Sequence[str]) -> Iterator[str]:
    """Yield a line for the user about each site that layers lack."""
    for site in sites:
        without = [layer.index for layer in layers if site not in layer.taps]
        if len(without) == len(layers):
            has = "a linear map of its own that reads it" if site in INPUT_SITES else "it as a module of its own"
            yield f"site '{site}' is absent: no layer of this family has {has}"
        elif without:
            yield f"site '{site}' is absent in layers {', '.join(map(str, without))}"
