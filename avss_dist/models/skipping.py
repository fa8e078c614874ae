"""Forward passes of an open model without some of its layers, equal to those of a pruned checkpoint.

A pass without one layer equals that of the whole model up to the layer; `recording` keeps the states to resume from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.intervention import Removal, describe_removed
from avss_dist.models.layers import Layer, first_tensor, input_tensor

MAX_REPRESENTATIVES = 8  # layers, beside the ends of each kind


@contextmanager
def skipping(layers: Sequence[Layer], drop: Collection[int], forms: Mapping[int, type] = {}) -> Iterator[None]:
    """Have layers add nothing to the residual stream inside the context.

    Run the model without a key-value cache, or only with its remaining layers (see `remaining`): a skipped layer has no
    entry in the cache, and the model would take the cache for an empty one.

    Args:
        drop: indices of the layers.
        forms: see `Recorded`; a layer without a form runs once, which shows its form.

    Raises:
        ModelError: a layer is used more than once in a pass, or (from the forward pass) does not keep the shape.
    """
    skipped = require_skippable(layers, drop)
    with replaced_forwards(
        {layer.module: Skip(layer, layer.module.forward, forms.get(layer.index)) for layer in skipped}
    ):
        yield


def require_skippable(layers: Sequence[Layer], drop: Collection[int]) -> list[Layer]:
    """Return the layers of these indices.

    Raises:
        ModelError: a layer is used more than once in a pass.
    """
    uses = [layer.module for layer in layers]
    skipped = [layer for layer in layers if layer.index in drop]
    for layer in skipped:
        if uses.count(layer.module) > 1:
            raise ModelError(f"Layer {layer.index} ({layer.name}) is used more than once; it cannot be left out.")
    return skipped


def skipped_layers(layers: Sequence[Layer]) -> frozenset[int]:
    """Return the indices of the layers that `skipping` leaves out now."""
    return frozenset(layer.index for layer in layers if isinstance(vars(layer.module).get("forward"), Skip))


@contextmanager
def explaining(model: str, removed: Collection[Removal]) -> Iterator[None]:
    """Explain exceptions of a model's own code that computes without layers and sublayers inside the context.

    Raises:
        ModelError: the model fails, for example because a later layer reads keys and values of a removed one.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if not removed:
            raise
        raise ModelError(
            f"'{model}' does not run with these layers left out: {describe_removed(removed)}. "
            f"{type(error).__name__}: {first_line(error)}",
            "A layer behind may need what one of them computes. Leave out others.",
        ) from error


@dataclass(frozen=True)
class Recorded:
    """Record of a forward pass, of the layers that return only hidden states, of their input's shape.

    Attributes:
        inputs: copies of the layers' input hidden states, by index.
        forms: types of the layers' outputs, by index: ``torch.Tensor``, or the type of a tuple of one.
    """

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    forms: dict[int, type] = field(default_factory=dict)


@contextmanager
def recording(layers: Sequence[Layer]) -> Iterator[Recorded]:
    """Record a forward pass of layers inside the context."""
    recorded = Recorded()
    modules = [layer.module for layer in layers]

    def enter(layer: Layer, _module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            recorded.inputs[layer.index] = hidden.detach().clone()  # which layers may change

    def leave(layer: Layer, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        before, after = recorded.inputs.get(layer.index), first_tensor(output)
        if before is not None and after is not None and after.shape == before.shape and _is_alone(output):
            recorded.forms[layer.index] = type(output)
        else:
            recorded.inputs.pop(layer.index, None)

    with ExitStack() as stack:
        for layer in layers:
            if modules.count(layer.module) == 1:
                stack.callback(layer.module.register_forward_pre_hook(partial(enter, layer), with_kwargs=True).remove)
                stack.callback(layer.module.register_forward_hook(partial(leave, layer), with_kwargs=True).remove)
        yield recorded


@contextmanager
def resuming(layers: Sequence[Layer], index: int, recorded: Recorded) -> Iterator[None]:
    """Repeat the recorded pass inside the context without the layer ``index``, and without running earlier layers.

    The recorded input of that layer is consumed. All layers up to it must have been recorded, and must pass nothing but
    hidden states to the later ones.
    """
    hidden = recorded.inputs.pop(index).clone()  # which later layers may change
    forwards = {layer.module: partial(identity_forward, recorded.forms[layer.index], None) for layer in layers[:index]}
    forwards[layers[index].module] = partial(identity_forward, recorded.forms[index], hidden)
    with replaced_forwards(forwards):
        yield


def representatives(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers on which to try something that takes passes for each: all of them, or a sample of many.

    The sample is the first and the last layer of each kind, and others at equal distances. Layers are of one kind if
    their modules have equal classes, flags and names, which tell apart sliding attention or shared keys and values.
    """
    if len(layers) <= MAX_REPRESENTATIVES:
        return list(layers)
    kinds: dict[Hashable, list[int]] = {}
    for place, layer in enumerate(layers):
        kinds.setdefault(_kind(layer.module), []).append(place)
    ends = {place for places in kinds.values() for place in (places[0], places[-1])}
    step = (len(layers) - 1) / (MAX_REPRESENTATIVES - 1)
    return [layers[place] for place in sorted(ends | {round(step * number) for number in range(MAX_REPRESENTATIVES)})]


def _kind(module: nn.Module) -> Hashable:
    parts = [(path, type(part), vars(part)) for path, part in module.named_modules()]
    flags = [
        (path, name, value)
        for path, _, attributes in parts
        for name, value in attributes.items()
        if type(value) in (bool, str)
    ]
    return tuple((path, kind) for path, kind, _ in parts), tuple(flags)


def identity_forward(form: type, replacement: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """Return a layer's input, or its replacement, in the form of the layer's output."""
    hidden = input_tensor(args, kwargs) if replacement is None else replacement
    return hidden if form is torch.Tensor else (hidden,)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of modules inside the context."""
    originals = {module: vars(module).get("forward") for module in forwards}  # None: the class's own
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in originals.items():
            if original is None:
                del module.forward
            else:
                module.forward = original


class Skip:
    """Replacement ``forward`` of a skipped layer. Without a known ``form``, the layer runs once to find it.

    Args:
        forward: the layer's own ``forward``.
        form: see `Recorded`.
    """

    def __init__(self, layer: Layer, forward: Callable[..., Any], form: type | None) -> None:
        self._layer, self._forward, self.form = layer, forward, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = input_tensor(args, kwargs)
        if hidden is None:
            raise ModelError(f"Layer {self._layer.index} ({self._layer.name}) is called without hidden states.")
        if self.form is not None:
            return identity_forward(self.form, hidden)
        before = hidden.clone()  # which a layer may change
        output = self._forward(*args, **kwargs)
        after = first_tensor(output)
        if after is None or after.shape != before.shape:
            raise ModelError(f"Layer {self._layer.index} ({self._layer.name}) does not keep the shape of its input.")
        if _is_alone(output):
            self.form = type(output)
        return replace_tensor(output, after, before)


def _is_alone(output: Any) -> bool:
    """Whether a layer's output is hidden states alone."""
    return isinstance(output, torch.Tensor) or (isinstance(output, tuple) and len(output) == 1)


def replace_tensor(output: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """Return a module's output with one tensor in it replaced."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        return type(output)(**{name: new if value is old else value for name, value in output.items()})
    values = [new if value is old else value for value in output]
    return output._make(values) if hasattr(output, "_make") else type(output)(values)
