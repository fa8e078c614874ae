"""Running a model without some of its layers, in place: what a pruned checkpoint would compute.

A pass without one layer is that of the whole model up to it; `recording` keeps what is needed to begin there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.errors import ModelError, first_line
from avss_dist.intervention import Removal, describe_removed
from avss_dist.models.layers import Layer, first_tensor, input_tensor

MOST_TRIED = 8  # layers, and the ends of each kind


@contextmanager
def skipping(
    layers: Sequence[Layer], drop: Collection[int], forms: Mapping[int, type] = {}, residual_scale: float = 0.0
) -> Iterator[None]:
    """Inside, the layers of these indices add nothing, or a share of their own addition, to the residual stream.

    Run the model without a key-value cache: a layer that does not run has none, and the model would take it for an
    empty one.

    Args:
        forms: of `Recorded`; a layer that has none runs once, to see what it returns.
        residual_scale: the share. Where it is not 0, layers run.

    Raises:
        ModelError: a layer is used more than once in a pass, or (from the forward pass) does not keep the shape.
    """
    skipped = require_skippable(layers, drop)
    with replaced_forwards(
        {layer.module: Skip(layer, layer.module.forward, forms.get(layer.index), residual_scale) for layer in skipped}
    ):
        yield


def require_skippable(layers: Sequence[Layer], drop: Collection[int]) -> list[Layer]:
    """The layers of these indices.

    Raises:
        ModelError: one of them is used more than once in a pass.
    """
    uses = [layer.module for layer in layers]
    skipped = [layer for layer in layers if layer.index in drop]
    for layer in skipped:
        if uses.count(layer.module) > 1:
            raise ModelError(f"Layer {layer.index} ({layer.name}) is used more than once; it cannot be left out.")
    return skipped


@contextmanager
def explaining(model: str, removed: Collection[Removal]) -> Iterator[None]:
    """Inside, a model computes without layers and sublayers; why its own code fails there is said.

    Raises:
        ModelError: a layer behind needs more of one that is left out than hidden states, as its keys and values.
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
    """What a forward pass showed of layers that return hidden states and nothing else, of the shape they were given.

    Attributes:
        inputs: what each was given, as it was then; by index.
        forms: how each returns hidden states: ``torch.Tensor``, or the type of a tuple of one.
    """

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    forms: dict[int, type] = field(default_factory=dict)


@contextmanager
def recording(layers: Sequence[Layer]) -> Iterator[Recorded]:
    """Inside, a forward pass is recorded."""
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
    """Inside, the same pass as the recorded one, without the layer ``index``; none of those before it runs.

    The recorded input of that layer is used up. All layers up to it must have been recorded, and nothing but hidden
    states may go from them to the later ones.
    """
    hidden = recorded.inputs.pop(index).clone()  # which later layers may change
    forwards = {layer.module: partial(give, recorded.forms[layer.index], None) for layer in layers[:index]}
    forwards[layers[index].module] = partial(give, recorded.forms[index], hidden)
    with replaced_forwards(forwards):
        yield


def representatives(layers: Sequence[Layer]) -> list[Layer]:
    """Layers on which to try what would take passes of the model for each: all of a few, and of many some.

    These are the first and the last of each kind, and others at equal distances. Layers are of one kind where the
    classes, flags and names in them are equal, such as those of sliding attention, or of shared keys and values.
    """
    if len(layers) <= MOST_TRIED:
        return list(layers)
    kinds: dict[Hashable, list[int]] = {}
    for place, layer in enumerate(layers):
        kinds.setdefault(_kind(layer.module), []).append(place)
    ends = {place for places in kinds.values() for place in (places[0], places[-1])}
    step = (len(layers) - 1) / (MOST_TRIED - 1)
    return [layers[place] for place in sorted(ends | {round(step * number) for number in range(MOST_TRIED)})]


def _kind(module: nn.Module) -> Hashable:
    parts = [(path, type(part), vars(part)) for path, part in module.named_modules()]
    flags = [(path, name, value) for path, _, own in parts for name, value in own.items() if type(value) in (bool, str)]
    return tuple((path, kind) for path, kind, _ in parts), tuple(flags)


def give(form: type, instead: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` of a layer that returns what it is given, or something instead of it."""
    hidden = input_tensor(args, kwargs) if instead is None else instead
    return hidden if form is torch.Tensor else (hidden,)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules compute with other functions."""
    before = {module: vars(module).get("forward") for module in forwards}  # None: the class's own
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


class Skip:
    """The ``forward`` of a layer that is left out; one whose ``form`` is not known runs, to see what it returns.

    Args:
        forward: the layer's own.
        form: see `Recorded`.
        residual_scale: see `skipping`.
    """

    def __init__(
        self, layer: Layer, forward: Callable[..., Any], form: type | None, residual_scale: float = 0.0
    ) -> None:
        self._layer, self._forward, self._residual_scale = layer, forward, residual_scale
        self.form = None if residual_scale else form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = input_tensor(args, kwargs)
        if hidden is None:
            raise ModelError(f"Layer {self._layer.index} ({self._layer.name}) is given no hidden states.")
        if self.form is not None:
            return give(self.form, hidden)
        before = hidden.clone()  # which a layer may change
        output = self._forward(*args, **kwargs)
        after = first_tensor(output)
        if after is None or after.shape != before.shape:
            raise ModelError(f"Layer {self._layer.index} ({self._layer.name}) does not keep the shape of its input.")
        if self._residual_scale:
            return replaced(output, after, torch.lerp(before, after, self._residual_scale))
        if _is_alone(output):
            self.form = type(output)
        return replaced(output, after, before)


def _is_alone(output: Any) -> bool:
    """Whether hidden states are all that a layer returns."""
    return isinstance(output, torch.Tensor) or (isinstance(output, tuple) and len(output) == 1)


def replaced(output: Any, after: torch.Tensor, before: torch.Tensor) -> Any:
    """What a module returns, with a tensor in it in place of another."""
    if output is after:
        return before
    if isinstance(output, Mapping):
        return type(output)(**{name: before if value is after else value for name, value in output.items()})
    values = [before if value is after else value for value in output]
    return output._make(values) if hasattr(output, "_make") else type(output)(values)
