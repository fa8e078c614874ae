"""Layers that are skipped: a pass goes on with their input, or begins behind them.

A pass without one layer equals that of the whole model up to the layer, so it can be resumed from recorded states.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.forward import Change, Forward, Output, RunThrough, actions_of, replace_tensor
from avss_dist.models.structure.layers import Layer, input_tensor, output_tensor, require_single_use


@dataclass
class Skip:
    """Action of a skipped layer, which returns its input. A layer without a `Layer.form` runs for its other outputs.

    Attributes:
        replacement: hidden states to return instead of the input.
    """

    layer: Layer
    replacement: torch.Tensor | None = None

    def __call__(self, forward: Forward, *args: object, **kwargs: object) -> Output:
        hidden = self.replacement
        if hidden is None:
            hidden = input_tensor(args, kwargs)
        if hidden is None:
            raise ModelError(f"{self.layer} is called without hidden states.")
        if self.layer.form:
            return in_form(hidden, self.layer)
        before = hidden.clone()  # The layer may change the original.
        output = forward(*args, **kwargs)
        after = output_tensor(self.layer, output, before)
        return replace_tensor(output, after, before)


def skips(layers: Sequence[Layer], drop: Collection[int]) -> list[Change]:
    """Return the changes by which layers add nothing to the residual stream.

    Run the model without a key-value cache, or only with its remaining layers (see `remaining`): a skipped layer has no
    entry in the cache, and the model would take the cache for an empty one.

    Args:
        drop: indices of the layers.

    Raises:
        ModelError: a layer is used more than once in a pass, or (from the forward pass) does not keep the shape.
    """
    changes: list[Change] = []
    for layer in layers:
        if layer.index in drop:
            require_single_use(layers, layer, "left out")
            changes.append(RunThrough(layer.module, Skip(layer)))
    return changes


def resumption(layers: Sequence[Layer], index: int, hidden: torch.Tensor) -> list[Change]:
    """Return the changes by which a pass begins behind the layer ``index``, without running the layers up to it.

    These layers must have a `Layer.form`, and pass nothing but hidden states to the later ones.

    Args:
        hidden: output of the layer ``index``, which later layers may change.
    """
    changes: list[Change] = [RunThrough(layer.module, Skip(layer)) for layer in layers[:index]]
    last = layers[index]
    changes.append(RunThrough(last.module, Skip(last, hidden)))
    return changes


def skip_of(layer: nn.Module) -> Skip | None:
    """Return the action by which a layer is skipped in the current context, or None."""
    for action in reversed(actions_of(layer)):
        if isinstance(action, Skip):
            return action
    return None


def in_form(hidden: torch.Tensor, layer: Layer) -> Output:
    """Return hidden states as a layer with a `Layer.form` returns them."""
    if layer.form is torch.Tensor:
        return hidden
    return (hidden,)
