"""The routed experts of a layer: the module that holds them all, and the router that chooses among them.

transformers fuses the experts of a layer into one module, which is called with the tokens, the indices of the experts
of each token, and their gates. The signature of that call identifies the module in every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Experts:
    """Routed experts of a layer.

    Attributes:
        module: the fused experts, called with the tensors of a `Routing`.
        number: number of experts.
        router: the module whose output is [tokens, number]; None if no module has such an output.
        normalized: whether the router's output is probabilities, not logits.
    """

    module: nn.Module
    number: int
    router: nn.Module | None
    normalized: bool


@dataclass(frozen=True)
class Routing:
    """Arguments of a call of the experts.

    Attributes:
        hidden: hidden states, [tokens, units].
        index: integer [tokens, k], the indices of each token's experts.
        gates: floating [tokens, k], the weights of the experts' outputs.
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
    """Return the input tensors of a call as a routing, or None if they do not have its shapes and dtypes."""
    index = next((t for t in inputs if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if index is None or not inputs[0].is_floating_point() or inputs[0].dim() != 2 or len(inputs[0]) != len(index):
        return None
    gates = next((t for t in inputs[1:] if t.is_floating_point() and t.shape == index.shape), None)
    return None if gates is None else Routing(inputs[0], index, gates)


def find_experts(calls: Sequence[_Call]) -> Experts | None:
    """Return the experts of a layer from the calls of its modules, in order; None if no call has a routing."""
    for i, call in enumerate(calls):
        routing = routing_of(call.inputs)
        number = _number(call.module)
        if routing is None or number is None or call.output.numel() != routing.hidden.numel():
            continue
        size = len(routing.index) * number
        routers = [
            earlier for earlier in calls[:i] if earlier.output.shape[-1] == number and earlier.output.numel() == size
        ]
        if not routers:
            return Experts(call.module, number, None, normalized=False)
        return Experts(call.module, number, routers[-1].module, normalized=_is_normalized(routers[-1].output))
    return None


def _number(module: nn.Module) -> int | None:
    """Return the number of experts of a module: its ``num_experts``, or the length of its stacked matrices.

    Where ranks have some of the experts each, ``num_experts`` is the number of a rank, and the length that of all.
    """
    stacked = next((len(p) for p in module.parameters() if p.dim() == 3), 0)
    count = getattr(module, "num_experts", 0)
    return max(count if isinstance(count, int) else 0, stacked) or None


def _is_normalized(output: torch.Tensor) -> bool:
    total = output.double().sum(dim=-1)
    return bool((output >= 0).all() and torch.allclose(total, torch.ones_like(total), atol=1e-2))
