"""Removal of the attention or the MLP of a layer in an open model: the sublayer adds nothing to the residual stream.

Sublayers are the sites of that name. They can be removed one at a time from a layer that adds them one after the other,
and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import PARTS, Removal, layers_by_part, sublayers_of
from avss_dist.models.layers import Layer, first_tensor, input_tensor
from avss_dist.models.skipping import Skip, replace_tensor, replaced_forwards
from avss_dist.system.process import bound

_LEFT_OUT: ContextVar[frozenset[object]] = ContextVar("left out", default=frozenset())


@contextmanager
def without_sublayers(layers: Sequence[Layer], removed: Collection[Removal]) -> Iterator[None]:
    """Have the sublayers in ``removed`` run and add nothing inside the context; interleaved passes are not affected."""
    token = object()
    with ExitStack() as stack:
        for kind, indices in layers_by_part(removed).items():
            for index in indices:
                module = layers[index].taps[kind].module
                stack.callback(module.register_forward_hook(partial(_nothing, token)).remove)
        stack.enter_context(bound(_LEFT_OUT, _LEFT_OUT.get() | {token}))
        yield


def _nothing(token: object, _module: nn.Module, _args: Any, output: Any) -> Any:
    added = first_tensor(output)
    if token not in _LEFT_OUT.get() or added is None:
        return None
    return replace_tensor(output, added, torch.zeros_like(added))


def require_sublayers(obstacles: Mapping[int, str], removed: Collection[Removal]) -> None:
    """Refuse sublayers that cannot be left out.

    Args:
        obstacles: from `find_obstacles`.

    Raises:
        ModelError: a sublayer cannot be left out; the message has the first one and the reason.
    """
    for kind, layers in layers_by_part(removed).items():
        for layer in layers:
            if layer in obstacles:
                raise ModelError(
                    f"{kind}.{layer} cannot be left out alone: {obstacles[layer]}.",
                    "Leave out whole layers of this model.",
                )


def find_obstacles(layers: Sequence[Layer], run: Callable[[], Any]) -> dict[int, str]:
    """Return the reasons why sublayers of a layer cannot be left out alone, by layer; other layers are absent.

    Two passes are compared in which every layer returns its input, so that all have equal inputs: in the first pass
    layers are skipped, in the second both of their sublayers are removed.

    Args:
        run: runs a forward pass over a few tokens.
    """
    obstacles = {layer.index: why for layer in layers if (why := _lacks(layer, layers))}
    candidates = [layer for layer in layers if layer.index not in obstacles]
    skips = {layer.module: Skip(layer, layer.module.forward, None) for layer in layers}
    with replaced_forwards(skips), _watched(candidates) as running:
        run()
    removed = sublayers_of(layer.index for layer in candidates)
    others = {layer.module: skips[layer.module] for layer in layers if layer not in candidates}
    with replaced_forwards(others), without_sublayers(layers, removed), _watched(candidates) as without:
        run()
    for layer in candidates:
        record = without[layer.index]
        if record.output is None or not torch.equal(record.output, record.input):
            obstacles[layer.index] = "without both of its sublayers, the layer would still change what it is given"
        elif torch.equal(record.mlp_input, running[layer.index].mlp_input):
            obstacles[layer.index] = "its attention and its MLP stand side by side (a parallel block)"
    return obstacles


def _lacks(layer: Layer, layers: Sequence[Layer]) -> str | None:
    if sum(other.module is layer.module for other in layers) > 1:
        return "the layer is used more than once"
    missing = [kind for kind in PARTS if kind not in layer.taps or layer.taps[kind].reads != "output"]
    return f"no module of the layer is its {' or its '.join(missing)}" if missing else None


@dataclass
class _LayerRecord:
    """Copies of the inputs of a layer and of its MLP in a pass, and the layer's output."""

    input: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    mlp_input: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    output: torch.Tensor | None = None


@contextmanager
def _watched(layers: Sequence[Layer]) -> Iterator[dict[int, _LayerRecord]]:
    """Record the inputs and outputs of layers in a pass inside the context, by index."""
    records = {layer.index: _LayerRecord() for layer in layers}

    def enter(record: _LayerRecord, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            setattr(record, name, hidden.detach().clone())

    def leave(record: _LayerRecord, _module: nn.Module, _args: Any, output: Any) -> None:
        record.output = first_tensor(output)

    with ExitStack() as stack:
        for layer in layers:
            record = records[layer.index]
            for module, name in ((layer.module, "input"), (layer.taps["mlp"].module, "mlp_input")):
                hook = partial(enter, record, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(partial(leave, record)).remove)
        yield records
