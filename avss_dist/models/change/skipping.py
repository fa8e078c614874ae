"""Layers that are skipped: a pass goes on with their input, or begins behind them.

A pass without one layer equals that of the whole model up to the layer, so it can be resumed from recorded states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.forward import (
    actions_of,
    around,
    replace_tensor,
)
from avss_dist.models.structure.layers import (
    Layer,
    input_tensor,
    output_tensor,
    require_single_use,
)


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
def resuming(layers: Sequence[Layer], index: int, hidden: torch.Tensor) -> Iterator[None]:
    """Have a pass begin behind the layer ``index`` inside the context, without running the layers up to it.

    These layers must have a `Layer.form`, and pass nothing but hidden states to the later ones.

    Args:
        hidden: output of the layer ``index``, which later layers may change.
    """
    skips = {layer.module: Skip(layer) for layer in layers[:index]}
    with around({**skips, layers[index].module: Skip(layers[index], hidden)}):
        yield


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
