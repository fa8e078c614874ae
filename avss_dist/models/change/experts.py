"""Routed experts that are removed from an open model.

Inside its ``forward`` a router holds the rows of the remaining experts alone, so that it computes exactly what the
router of a pruned checkpoint does. The indices that it returns are those of the whole model, and the logits of removed
experts are minus infinity.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Removal, experts_by_layer
from avss_dist.models.forward import (
    Change,
    Forward,
    Output,
    ReplaceAttributes,
    RunThrough,
    actions_of,
    changing,
    replace_tensor,
)
from avss_dist.models.structure.experts import COUNT, ELSEWHERE, ROUTER_TENSORS, require_routed_experts
from avss_dist.models.structure.layers import Layer, first_tensor


def require_experts(layers: Sequence[Layer], removed: Collection[Removal]) -> None:
    """Refuse experts that the model does not have, or that cannot be removed.

    Raises:
        ModelError: an expert cannot be removed; the message names the layer, and has the reason.
    """
    for index, experts in experts_by_layer(removed).items():
        layer = layers[index]
        routed = require_routed_experts(layer.module, index, experts)
        called = layer.experts
        if called is None or called.module is not layer.module.get_submodule(routed.experts):
            raise ModelError(
                f"Layer {index} calls its routed experts in a way that is not seen, so none can be removed.",
                ELSEWHERE,
            )


def expert_removals(layers: Sequence[Layer], removed: Collection[Removal]) -> list[Change]:
    """Return the changes by which routers choose among the remaining experts.

    Args:
        layers: layers of the model, for which `require_experts` passes.
    """
    changes: list[Change] = []
    for index, experts in experts_by_layer(removed).items():
        layer = layers[index].module
        routed = require_routed_experts(layer, index, experts)
        router = layer.get_submodule(routed.router)
        action = ChooseRemaining(router, routed.number, frozenset(experts))
        changes.append(RunThrough(router, action, needs_weights=True))
    return changes


@dataclass(frozen=True, eq=False)
class ChooseRemaining:
    """Action of a router, which holds the rows of its remaining experts alone while it runs.

    Of several such actions, the outermost one removes the experts of all.

    Attributes:
        number: number of experts of the whole router.
        removed: indices of the experts that this action removes.
    """

    router: nn.Module
    number: int
    removed: frozenset[int]

    def __call__(self, forward: Forward, *args: object, **kwargs: object) -> Output:
        actions = [
            action for action in actions_of(self.router, needs_weights=True) if isinstance(action, ChooseRemaining)
        ]
        if self is not actions[-1]:
            return forward(*args, **kwargs)
        removed: set[int] = set()
        for action in actions:
            removed |= action.removed
        remaining = [expert for expert in range(self.number) if expert not in removed]
        keep = torch.tensor(remaining, device=self.router.get_parameter("weight").device)
        # Instance attributes hide the tensors of the router.
        attributes: dict[str, object] = {COUNT: len(keep)}
        for name in ROUTER_TENSORS:
            tensor = getattr(self.router, name, None)
            if isinstance(tensor, torch.Tensor):
                attributes[name] = tensor.index_select(0, keep)
        shortened = [self._shorten(value, keep) for value in args]
        shortened_keywords = {name: self._shorten(value, keep) for name, value in kwargs.items()}
        with changing([ReplaceAttributes(self.router, attributes)]):
            output = forward(*shortened, **shortened_keywords)
        return self._lengthen(output, keep)

    def _shorten(self, value: object, keep: torch.Tensor) -> object:
        """Return an argument without the removed experts, if it is a vector with an element for each expert."""
        if isinstance(value, torch.Tensor) and value.shape == (self.number,):
            return value.index_select(0, keep)
        return value

    def _lengthen(self, output: Output, keep: torch.Tensor) -> Output:
        """Return the output of the shortened router as one of the whole router.

        Args:
            keep: indices of the remaining experts.
        """
        kind = type(self.router).__name__
        logits = first_tensor(output)
        if logits is None or logits.shape[-1] != len(keep):
            raise ModelError(f"A {kind} returns no logits of its experts.", ELSEWHERE)
        index = _first_integers(output)
        if index is None:
            raise ModelError(f"A {kind} does not choose experts itself.", ELSEWHERE)
        removed = logits.new_full((*logits.shape[:-1], self.number), -torch.inf)
        whole = removed.index_copy(-1, keep, logits)
        output = replace_tensor(output, logits, whole)
        return replace_tensor(output, index, keep[index].to(index.dtype))


def _first_integers(output: Output) -> torch.Tensor | None:
    """Return the first tensor of integers in a tuple, or None."""
    for value in output:
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return value
    return None
