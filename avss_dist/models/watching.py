"""Copies of the hidden states that modules take and return in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from avss_dist.models.forward import Arguments, CallAfter, CallBefore, Change, Keywords, Output, changing
from avss_dist.models.structure.layers import Layer, Routing, first_tensor, input_tensor

Key = TypeVar("Key", bound=Hashable)
ReadUnits = Callable[[Arguments, Keywords], Routing]
"""Function of the arguments of a call of routed experts, which returns their units."""


@contextmanager
def recording(layers: Sequence[Layer]) -> Iterator[dict[int, torch.Tensor]]:
    """Record copies of the input hidden states, by index, of the layers with a `Layer.form` inside the context."""
    inputs: dict[int, torch.Tensor] = {}

    def enter(layer: Layer, args: Arguments, kwargs: Keywords) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            inputs[layer.index] = _copied(hidden)

    watched = [CallBefore(layer.module, partial(enter, layer)) for layer in layers if layer.form]
    with changing(watched):
        yield inputs


@dataclass(frozen=True)
class CapturedCall:
    """The input and the output of one call of a module, and its units if it holds routed experts."""

    input: torch.Tensor
    output: torch.Tensor
    units: Routing | None = None


@contextmanager
def captured(
    modules: Mapping[Key, nn.Module], units: Mapping[Key, ReadUnits] | None = None
) -> Iterator[dict[Key, CapturedCall]]:
    """Record copies of the hidden states that modules take and return inside the context. The last call counts.

    Args:
        modules: modules by key.
        units: functions of a call's arguments that return the units of routed experts, by key.
    """
    inputs: dict[Key, torch.Tensor] = {}
    calls: dict[Key, CapturedCall] = {}

    def enter(key: Key, args: Arguments, kwargs: Keywords) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            inputs[key] = _copied(hidden)

    def leave(key: Key, args: Arguments, kwargs: Keywords, output: Output) -> None:
        hidden = first_tensor(output)
        if key not in inputs or hidden is None:
            return
        routing = None
        if units and key in units:
            routing = units[key](args, kwargs)
        calls[key] = CapturedCall(inputs.pop(key), _copied(hidden), routing)

    watched: list[Change] = []
    for key, module in modules.items():
        watched.append(CallBefore(module, partial(enter, key)))
        watched.append(CallAfter(module, partial(leave, key)))
    with changing(watched):
        yield calls


def _copied(hidden: torch.Tensor) -> torch.Tensor:
    """Return a copy of hidden states, because modules may change the originals."""
    return hidden.detach().clone()
