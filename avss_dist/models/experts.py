"""The routed experts of a layer: the module that holds them all, and the router that chooses among them.

transformers fuses the experts of a layer into one module, which is called with the tokens, the experts that each goes
to, and the gates of these. They are found by that call, whatever the family calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        module: is called with a `Routing`.
        number: of experts.
        router: gives [tokens, number]; None where no module does.
        normalized: whether that is probabilities, and not their logits.
    """

    module: nn.Module
    number: int
    router: nn.Module | None
    normalized: bool


@dataclass(frozen=True)
class Routing:
    """What experts are called with.

    Attributes:
        hidden: [tokens, units].
        index: integers [tokens, k], the experts that each token goes to.
        gates: floating [tokens, k], what their outputs are multiplied by.
    """

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor


class _Call(Protocol):
    """See `sites.Call`."""

    path: str
    module: nn.Module
    inputs: list[torch.Tensor]
    output: torch.Tensor


def routing_of(inputs: Sequence[torch.Tensor]) -> Routing | None:
    """The tensors of a call as a routing, if they are one."""
    index = next((t for t in inputs if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if index is None or not inputs[0].is_floating_point() or inputs[0].dim() != 2 or len(inputs[0]) != len(index):
        return None
    gates = next((t for t in inputs[1:] if t.is_floating_point() and t.shape == index.shape), None)
    return None if gates is None else Routing(inputs[0], index, gates)


def find_experts(calls: Sequence[_Call]) -> Experts | None:
    """The experts of a layer, by its modules' calls in order; None where it has none that are called so."""
    for i, call in enumerate(calls):
        routing = routing_of(call.inputs)
        number = _number(call.module)
        if routing is None or number is None or call.output.numel() != routing.hidden.numel():
            continue
        size = len(routing.index) * number
        before = [one for one in calls[:i] if one.output.shape[-1] == number and one.output.numel() == size]
        if not before:
            return Experts(call.module, number, None, normalized=False)
        return Experts(call.module, number, before[-1].module, normalized=_is_normalized(before[-1].output))
    return None


def _number(module: nn.Module) -> int | None:
    """How many experts a module holds: what it says, or as many as its stacked matrices."""
    if isinstance(said := getattr(module, "num_experts", None), int):
        return said
    return next((len(p) for p in module.parameters() if p.dim() == 3), None)


def _is_normalized(output: torch.Tensor) -> bool:
    total = output.double().sum(dim=-1)
    return bool((output >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-2))
