"""Interventions in an open model: layers that are skipped, sublayers that add nothing, and replaced parameters.

Modules run through actions (`around`), which hold for the passes of a context alone: interleaved passes may differ. A
pass without one layer equals that of the whole model up to the layer, so it can be resumed from recorded states.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import PARTS, Removal, Sublayer, sublayers_of
from avss_dist.models.forward import actions_of, around, hooked, replace_tensor, replaced_parameters, with_parameters
from avss_dist.models.structure.layers import (
    Layer,
    Routing,
    first_tensor,
    input_tensor,
    output_tensor,
    require_single_use,
)

MAX_REPRESENTATIVES = 8  # layers, beside the ends of each kind

Key = TypeVar("Key", bound=Hashable)
Parameter = tuple[int, str]
"""Index of a layer in the whole model, and path of a parameter below it."""
Patch = Mapping[Parameter, torch.Tensor]

_ABOUT = "avss"


@contextmanager
def skipping(layers: Sequence[Layer], drop: Collection[int]) -> Iterator[None]:
    """Have layers add nothing to the residual stream inside the context.

    Run the model without a key-value cache, or only with its remaining layers (see `remaining`): a skipped layer has no
    entry in the cache, and the model would take the cache for an empty one.

    Args:
        drop: indices of the layers.

    Raises:
        ModelError: a layer is used more than once in a pass, or (from the forward pass) does not keep the shape.
    """
    skipped = [layer for layer in layers if layer.index in drop]
    for layer in skipped:
        require_single_use(layers, layer, "left out")
    with around({layer.module: Skip(layer) for layer in skipped}):
        yield


def skip_of(layer: nn.Module) -> Skip | None:
    """Return the action by which a layer is skipped in the current context, or None."""
    actions = reversed(actions_of(layer))
    return next((action for action in actions if isinstance(action, Skip)), None)


@contextmanager
def recording(layers: Sequence[Layer]) -> Iterator[dict[int, torch.Tensor]]:
    """Record copies of the input hidden states, by index, of the layers with a `Layer.form` inside the context."""
    inputs: dict[int, torch.Tensor] = {}

    def enter(layer: Layer, args: Any, kwargs: Any) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            inputs[layer.index] = hidden.detach().clone()  # which layers may change

    with hooked(before=[(layer.module, partial(enter, layer)) for layer in layers if layer.form]):
        yield inputs


@dataclass(frozen=True)
class CapturedCall:
    """The input and the output of one call of a module, and its units if it holds routed experts."""

    input: torch.Tensor
    output: torch.Tensor
    units: Routing | None = None


@contextmanager
def captured(
    modules: Mapping[Key, nn.Module], units: Mapping[Key, Callable[..., Routing]] = {}
) -> Iterator[dict[Key, CapturedCall]]:
    """Record copies of the hidden states that modules take and return inside the context. The last call counts.

    Args:
        modules: modules by key.
        units: functions of a call's arguments that return the units of routed experts, by key.
    """
    inputs: dict[Key, torch.Tensor] = {}
    calls: dict[Key, CapturedCall] = {}

    def enter(key: Key, args: Any, kwargs: Any) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            inputs[key] = hidden.detach().clone()  # which modules may change

    def leave(key: Key, args: Any, kwargs: Any, output: Any) -> None:
        hidden = first_tensor(output)
        if key in inputs and hidden is not None:
            read = units[key](args, kwargs) if key in units else None
            calls[key] = CapturedCall(inputs.pop(key), hidden.detach().clone(), read)

    with hooked(
        before=[(module, partial(enter, key)) for key, module in modules.items()],
        after=[(module, partial(leave, key)) for key, module in modules.items()],
    ):
        yield calls


@contextmanager
def resuming(layers: Sequence[Layer], index: int, hidden: torch.Tensor) -> Iterator[None]:
    """Have a pass begin behind the layer ``index`` inside the context, without running the layers up to it.

    These layers must have a `Layer.form`, and pass nothing but hidden states to the later ones.

    Args:
        hidden: output of the layer ``index``, which later layers may change.
    """
    skips = {layer.module: Skip(layer) for layer in layers[:index]}
    with around({**skips, layers[index].module: Skip(layers[index], hidden)}):
        yield


def representatives(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers on which to try something that takes passes for each: all of them, or a sample of many.

    The sample is the first and the last layer of each kind, and others at equal distances. Layers are of one kind if
    their modules have equal classes, flags and names, which tell apart sliding attention or shared keys and values.
    """
    if len(layers) <= MAX_REPRESENTATIVES:
        return list(layers)
    kinds: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, layer in enumerate(layers):
        parts = [
            (path, type(part), tuple(item for item in vars(part).items() if type(item[1]) in (bool, str)))
            for path, part in layer.module.named_modules()
        ]
        kinds[tuple(parts)].append(place)
    ends = {place for places in kinds.values() for place in (places[0], places[-1])}
    step = (len(layers) - 1) / (MAX_REPRESENTATIVES - 1)
    return [layers[place] for place in sorted(ends | {round(step * number) for number in range(MAX_REPRESENTATIVES)})]


@dataclass
class Skip:
    """Action of a skipped layer, which returns its input. A layer without a `Layer.form` runs for its other outputs.

    Attributes:
        replacement: hidden states to return instead of the input.
    """

    layer: Layer
    replacement: torch.Tensor | None = None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = input_tensor(args, kwargs) if self.replacement is None else self.replacement
        if hidden is None:
            raise ModelError(f"{self.layer} is called without hidden states.")
        if self.layer.form:
            return in_form(hidden, self.layer)
        before = hidden.clone()  # which a layer may change
        output = forward(*args, **kwargs)
        return replace_tensor(output, output_tensor(self.layer, output, before), before)


def in_form(hidden: torch.Tensor, layer: Layer) -> Any:
    """Return hidden states as a layer with a `Layer.form` returns them."""
    return hidden if layer.form is torch.Tensor else (hidden,)


def encode_patch(patch: Patch, about: str) -> bytes:
    """Return a patch as the bytes of a safetensors file, equal for equal patches, with ``about`` in its header."""
    return save({f"{layer}.{path}": tensor.contiguous() for (layer, path), tensor in patch.items()}, {_ABOUT: about})


def decode_patch(data: bytes) -> tuple[dict[Parameter, torch.Tensor], str]:
    """Return the patch that `encode_patch` encoded, and its ``about``."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = ((name.partition("."), tensor) for name, tensor in load(data).items())
    return {(int(layer), path): tensor for (layer, _, path), tensor in names}, header["__metadata__"][_ABOUT]


@contextmanager
def patched(layers: Sequence[Layer], patch: Patch, *, when_called: bool = False) -> Iterator[None]:
    """Have layers compute with the values of a patch inside the context, in the parameters' dtypes and devices.

    Args:
        when_called: weights are in memory, or whole, only while their layer runs. Backward passes use the unpatched
            weights then.

    Raises:
        ModelError: a parameter is offloaded or partitioned, so that it is not whole where the layer is.
    """
    if when_called:
        values: dict[nn.Module, dict[str, torch.Tensor]] = {}
        for (layer, path), value in patch.items():
            owner, _, name = path.rpartition(".")
            values.setdefault(layers[layer].module.get_submodule(owner), {})[name] = value

        def current(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
            return {module.get_parameter(name): value for name, value in values[module].items()}

        with around({module: partial(with_parameters, partial(current, module)) for module in values}, weights=True):
            yield
        return
    changed = {layers[layer].module.get_parameter(path): value for (layer, path), value in patch.items()}
    if any(parameter.is_meta or parameter.shape != value.shape for parameter, value in changed.items()):
        raise ModelError(
            "The weights of a repaired layer are offloaded or partitioned, and cannot be changed in place.",
            "Use `partition` single, or device_map with more `max_memory`.",
        )
    with replaced_parameters(changed):
        yield


@contextmanager
def without_sublayers(layers: Sequence[Layer], removed: Collection[Removal]) -> Iterator[None]:
    """Have the sublayers in ``removed`` run and add nothing inside the context."""

    def add_nothing(_args: Any, _kwargs: Any, output: Any) -> Any:
        added = first_tensor(output)
        return None if added is None else replace_tensor(output, added, torch.zeros_like(added))

    sublayers = [removal for removal in removed if isinstance(removal, Sublayer)]
    with hooked(after=[(layers[part.layer].taps[part.part].module, add_nothing) for part in sublayers]):
        yield


def find_obstacles(layers: Sequence[Layer], run: Callable[[], Any]) -> dict[int, str]:
    """Return the reasons, by layer, why sublayers of a layer cannot be left out alone.

    Layers whose sublayers can be left out are absent. Two passes are compared in which every layer returns its input,
    so that all have equal inputs: in the first pass layers are skipped, in the second both of their sublayers are
    removed.

    Args:
        run: runs a forward pass over a few tokens.
    """
    obstacles = {}
    for layer in layers:
        missing = [kind for kind in PARTS if kind not in layer.taps or layer.taps[kind].reads != "output"]
        if sum(other.module is layer.module for other in layers) > 1:
            obstacles[layer.index] = "the layer is used more than once"
        elif missing:
            obstacles[layer.index] = f"no module of the layer is its {' or its '.join(missing)}"
    candidates = [layer for layer in layers if layer.index not in obstacles]
    skips = {layer.module: Skip(replace(layer, form=None)) for layer in layers}  # which run
    modules = {(layer.index, "layer"): layer.module for layer in candidates}
    modules |= {(layer.index, "mlp"): layer.taps["mlp"].module for layer in candidates}
    with around(skips), captured(modules) as running:
        run()
    removed = sublayers_of(layer.index for layer in candidates)
    with (
        around({layer.module: Skip(layer) for layer in layers if layer.index in obstacles}),
        without_sublayers(layers, removed),
        captured(modules) as without,
    ):
        run()
    for layer in candidates:
        whole, mlp = without[layer.index, "layer"], without[layer.index, "mlp"]
        if not torch.equal(whole.output, whole.input):
            obstacles[layer.index] = "without both of its sublayers, the layer would still change what it is given"
        elif torch.equal(mlp.input, running[layer.index, "mlp"].input):
            obstacles[layer.index] = "its attention and its MLP stand side by side (a parallel block)"
    return obstacles
