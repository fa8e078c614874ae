"""The attention and the MLP of a layer, left out in place: each adds nothing to what the layer is given.

They are the sites of that name. A layer can be without one of them if that is all that it adds, one after the other.
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

from avss_dist.errors import ModelError
from avss_dist.intervention import PARTS, Removal, layers_by_part, sublayers_of
from avss_dist.models.layers import Layer, first_tensor, input_tensor
from avss_dist.models.skipping import Skip, replaced, replaced_forwards
from avss_dist.system.context import bound

_LEFT_OUT: ContextVar[frozenset[object]] = ContextVar("left out", default=frozenset())


@contextmanager
def without_sublayers(layers: Sequence[Layer], removed: Collection[Removal]) -> Iterator[None]:
    """Inside, the sublayers in ``removed`` add nothing; they still run. Passes that interleave do not see it."""
    mine = object()
    with ExitStack() as stack:
        for kind, indices in layers_by_part(removed).items():
            for index in indices:
                module = layers[index].taps[kind].module
                stack.callback(module.register_forward_hook(partial(_nothing, mine)).remove)
        stack.enter_context(bound(_LEFT_OUT, _LEFT_OUT.get() | {mine}))
        yield


def _nothing(mine: object, _module: nn.Module, _args: Any, output: Any) -> Any:
    added = first_tensor(output)
    if mine not in _LEFT_OUT.get() or added is None:
        return None
    return replaced(output, added, torch.zeros_like(added))


def require_sublayers(obstacles: Mapping[int, str], removed: Collection[Removal]) -> None:
    """Refuse sublayers that cannot be left out.

    Args:
        obstacles: of `find_obstacles`.

    Raises:
        ModelError: the message says which, and why.
    """
    for kind, layers in layers_by_part(removed).items():
        for layer in layers:
            if layer in obstacles:
                raise ModelError(
                    f"The {'MLP' if kind == 'mlp' else kind} of layer {layer} cannot be left out alone: "
                    f"{obstacles[layer]}.",
                    "Leave out whole layers of this model.",
                )


def find_obstacles(layers: Sequence[Layer], run: Callable[[], Any]) -> dict[int, str]:
    """Why sublayers of a layer cannot be left out alone, of those of which that is so; tried on a few tokens.

    In both passes all layers are given the same, for each gives on what it is given: once although its sublayers run,
    and once because they add nothing.

    Args:
        run: a forward pass over a few tokens.
    """
    obstacles = {layer.index: why for layer in layers if (why := _lacks(layer, layers))}
    able = [layer for layer in layers if layer.index not in obstacles]
    skips = {layer.module: Skip(layer, layer.module.forward, None) for layer in layers}
    with replaced_forwards(skips), _watched(able) as running:
        run()
    removed = sublayers_of(layer.index for layer in able)
    others = {layer.module: skips[layer.module] for layer in layers if layer not in able}
    with replaced_forwards(others), without_sublayers(layers, removed), _watched(able) as without:
        run()
    for layer in able:
        seen = without[layer.index]
        if seen.gives is None or not torch.equal(seen.gives, seen.given):
            obstacles[layer.index] = "without both of its sublayers, the layer would still change what it is given"
        elif torch.equal(seen.given_to_mlp, running[layer.index].given_to_mlp):
            obstacles[layer.index] = "its attention and its MLP stand side by side (a parallel block)"
    return obstacles


def _lacks(layer: Layer, layers: Sequence[Layer]) -> str | None:
    if sum(other.module is layer.module for other in layers) > 1:
        return "the layer is used more than once"
    missing = [kind for kind in PARTS if kind not in layer.taps or layer.taps[kind].reads != "output"]
    return f"no module of the layer is its {' or its '.join(missing)}" if missing else None


@dataclass
class _Watched:
    """What a layer and its MLP were given in a pass, as it was then, and what the layer gave."""

    given: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    given_to_mlp: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gives: torch.Tensor | None = None


@contextmanager
def _watched(layers: Sequence[Layer]) -> Iterator[dict[int, _Watched]]:
    """Inside, a pass is watched, layer by layer."""
    seen = {layer.index: _Watched() for layer in layers}

    def enter(into: _Watched, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = input_tensor(args, kwargs)
        if hidden is not None:
            setattr(into, name, hidden.detach().clone())

    def leave(into: _Watched, _module: nn.Module, _args: Any, output: Any) -> None:
        into.gives = first_tensor(output)

    with ExitStack() as stack:
        for layer in layers:
            into = seen[layer.index]
            for module, name in ((layer.module, "given"), (layer.taps["mlp"].module, "given_to_mlp")):
                hook = partial(enter, into, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(partial(leave, into)).remove)
        yield seen
