"""Running a model without some of its layers, in place: what a pruned checkpoint would compute."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from avss_dist.errors import ModelError
from avss_dist.structure import Layer, first_tensor, input_tensor


@contextmanager
def skipping(layers: Sequence[Layer], drop: Collection[int]) -> Iterator[None]:
    """Inside, the layers of these indices return what they are given; a layer runs once, to see what it returns.

    Without a key-value cache: a layer that does not run has none, and the model would take it for an empty one.

    Raises:
        ModelError: a layer is used more than once in a pass, or (from the forward pass) does not keep the shape.
    """
    skipped = [layer for layer in layers if layer.index in drop]
    uses = [layer.module for layer in layers]
    for layer in skipped:
        if uses.count(layer.module) > 1:
            raise ModelError(f"Layer {layer.index} ({layer.name}) is used more than once; it cannot be left out.")
    for layer in skipped:
        layer.module.forward = _Skip(layer)
    try:
        yield
    finally:
        for layer in skipped:
            del layer.module.forward  # the class's own is seen again


class _Skip:
    """The ``forward`` of a layer that is left out."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self._forward = layer, layer.module.forward
        self._alone: type | None = None  # how hidden states that are all of an output are given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = input_tensor(args, kwargs)
        if hidden is None:
            raise ModelError(f"Layer {self._layer.index} ({self._layer.name}) is given no hidden states.")
        if self._alone is not None:
            return hidden if self._alone is torch.Tensor else (hidden,)
        before = hidden.clone()  # which a layer may change
        output = self._forward(*args, **kwargs)
        after = first_tensor(output)
        if after is None or after.shape != before.shape:
            raise ModelError(f"Layer {self._layer.index} ({self._layer.name}) does not keep the shape of its input.")
        if isinstance(output, torch.Tensor) or (isinstance(output, tuple) and len(output) == 1):
            self._alone = type(output)
        return _replaced(output, after, before)


def _replaced(output: Any, after: torch.Tensor, before: torch.Tensor) -> Any:
    if output is after:
        return before
    if isinstance(output, Mapping):
        return type(output)(**{name: before if value is after else value for name, value in output.items()})
    values = [before if value is after else value for value in output]
    return output._make(values) if hasattr(output, "_make") else type(output)(values)
