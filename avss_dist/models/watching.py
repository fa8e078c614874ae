"""Copies of the hidden states that modules take and return in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from avss_dist.models.forward import (
    hooked,
)
from avss_dist.models.structure.layers import (
    Layer,
    Routing,
    first_tensor,
    input_tensor,
)

Key = TypeVar("Key", bound=Hashable)


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
