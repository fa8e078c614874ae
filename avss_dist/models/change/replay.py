"""Backward passes layer by layer: a forward pass records the calls of layers, and each runs again for its gradients.

The activations of one layer are in memory at a time. The gradients are those of a backward pass through the whole
model, if only hidden states go from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from avss_dist.models.change.skipping import in_form
from avss_dist.models.forward import Arguments, CallAfter, Change, Forward, Keywords, Output, changing
from avss_dist.models.structure.layers import Layer, LayerCall, first_tensor

PROBING = "Trying gradients layer by layer"
MapKey = tuple[int, str]
"""Index of a layer, and path of a linear map below it."""


@dataclass(frozen=True)
class Record:
    """Tensors of a forward pass that its backward pass needs.

    Attributes:
        last: the last layer that runs.
        calls: arguments of the call of every layer that runs, with a copy of its hidden states.
        leaf: the last layer's output, as the only item.
    """

    last: Layer
    calls: dict[nn.Module, LayerCall] = field(default_factory=dict)
    leaf: list[torch.Tensor] = field(default_factory=list)

    def run_without_gradients(self, layer: nn.Module, call: Forward, *args: object, **kwargs: object) -> Output:
        """Record a layer's call, and run it. After the last layer, gradients are enabled.

        All layers are recorded as if their inputs had gradients.
        """
        self._record(layer, LayerCall(args, kwargs), has_gradient=True)
        output = call(*args, **kwargs)
        if layer is not self.last.module:
            return output
        hidden = first_tensor(output)
        assert hidden is not None
        torch.set_grad_enabled(True)
        return self._cut(hidden)

    def run_with_gradients(self, layer: Layer, call: Forward, *args: object, **kwargs: object) -> Output:
        """Record a layer's call, run it as a forward pass with gradients does, and keep none of its activations.

        Whether a tensor has a gradient decides which of its kernels torch takes, and so the last digits.
        """
        recorded = LayerCall(args, kwargs)
        self._record(layer.module, recorded, has_gradient=recorded.hidden.requires_grad)
        _, output = recorded.rerun(call)
        if layer is self.last:
            return self._cut(output)
        return in_form(output.detach().requires_grad_(output.requires_grad), layer)

    def _record(self, layer: nn.Module, call: LayerCall, *, has_gradient: bool) -> None:
        hidden = call.hidden.detach().clone()  # The layer may change the original.
        self.calls[layer] = call.with_hidden(hidden.requires_grad_(has_gradient))

    def _cut(self, hidden: torch.Tensor) -> Output:
        """Return a leaf tensor as the last layer's output, in place of its hidden states."""
        self.leaf.append(hidden.detach().requires_grad_())
        return in_form(self.leaf[0], self.last)

    def pass_back(self, layer: nn.Module, call: Forward, gradients: list[torch.Tensor]) -> None:
        """Run a layer again, and replace gradients of its output by those of its input."""
        with torch.enable_grad():
            leaf, output = self.calls.pop(layer).rerun(call)
        if output.requires_grad:
            pass_back(output, leaf, gradients)


def pass_back(output: torch.Tensor, leaf: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    """Replace each gradient of a tensor by that of the leaf tensor that it was computed from.

    Before a leaf without a gradient nothing has one, and nothing reads what is left in the list.
    """
    last = len(gradients) - 1
    for number, gradient in enumerate(gradients):
        output.backward(gradient, retain_graph=number < last)
        if leaf.requires_grad:
            if leaf.grad is None:
                gradients[number] = torch.zeros_like(leaf)
            else:
                gradients[number] = leaf.grad
            leaf.grad = None


class MapGradients:
    """Watcher of a batch that keeps the gradients of the outputs of linear maps.

    Attributes:
        by_map: gradients of each map in the order of its backward passes.
        activity, keeps, runs_by_layer: see `gradients.Watcher`.
    """

    activity = PROBING
    keeps = 1
    runs_by_layer = False

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.by_map: dict[MapKey, list[torch.Tensor]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Listen to the maps inside the context."""
        listeners: list[Change] = []
        for layer in self._layers:
            for projection in layer.projections:
                listen = partial(self._listen, (layer.index, projection.path))
                listeners.append(CallAfter(projection.module, listen))
        with changing(listeners):
            yield

    def _listen(self, key: MapKey, _args: Arguments, _kwargs: Keywords, output: torch.Tensor) -> None:
        if not output.requires_grad:  # Nothing before the first map has a gradient.
            output.requires_grad_()
        output.register_hook(self.by_map.setdefault(key, []).append)

    def equals(self, other: MapGradients) -> bool:
        """Whether the gradients are those of another watcher, bit by bit."""
        if self.by_map.keys() != other.by_map.keys():
            return False
        for key, gradients in self.by_map.items():
            expected = other.by_map[key]
            if len(gradients) != len(expected):
                return False
            for gradient, other_gradient in zip(gradients, expected, strict=True):
                if not torch.equal(gradient, other_gradient):
                    return False
        return True
