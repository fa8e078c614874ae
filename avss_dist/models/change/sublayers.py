"""Sublayers that run and add nothing, and the layers in which they cannot be left out alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from avss_dist.core.intervention import (
    PARTS,
    Removal,
    Sublayer,
    sublayers_of,
)
from avss_dist.models.change.skipping import Skip
from avss_dist.models.forward import (
    around,
    hooked,
    replace_tensor,
)
from avss_dist.models.structure.layers import (
    Layer,
    first_tensor,
)
from avss_dist.models.watching import captured


@contextmanager
def without_sublayers(layers: Sequence[Layer], removed: Collection[Removal]) -> Iterator[None]:
    """Have the sublayers in ``removed`` run and add nothing inside the context."""

    def add_nothing(_args: Any, _kwargs: Any, output: Any) -> Any:
        added = first_tensor(output)
        return None if added is None else replace_tensor(output, added, torch.zeros_like(added))

    sublayers = [removal for removal in removed if isinstance(removal, Sublayer)]
    with hooked(after=[(layers[part.layer].taps[part.part].module, add_nothing) for part in sublayers]):
        yield


def find_obstacles(layers: Sequence[Layer], run: Callable[[], Any]) -> dict[int, str]:
    """Return the reasons, by layer, why sublayers of a layer cannot be left out alone.

    Layers whose sublayers can be left out are absent. Two passes are compared in which every layer returns its input,
    so that all have equal inputs: in the first pass layers are skipped, in the second both of their sublayers are
    removed.

    Args:
        run: runs a forward pass over a few tokens.
    """
    obstacles = {}
    for layer in layers:
        missing = [kind for kind in PARTS if kind not in layer.taps or layer.taps[kind].reads != "output"]
        if sum(other.module is layer.module for other in layers) > 1:
            obstacles[layer.index] = "the layer is used more than once"
        elif missing:
            obstacles[layer.index] = f"no module of the layer is its {' or its '.join(missing)}"
    candidates = [layer for layer in layers if layer.index not in obstacles]
    skips = {layer.module: Skip(replace(layer, form=None)) for layer in layers}  # which run
    modules = {(layer.index, "layer"): layer.module for layer in candidates}
    modules |= {(layer.index, "mlp"): layer.taps["mlp"].module for layer in candidates}
    with around(skips), captured(modules) as running:
        run()
    removed = sublayers_of(layer.index for layer in candidates)
    with (
        around({layer.module: Skip(layer) for layer in layers if layer.index in obstacles}),
        without_sublayers(layers, removed),
        captured(modules) as without,
    ):
        run()
    for layer in candidates:
        whole, mlp = without[layer.index, "layer"], without[layer.index, "mlp"]
        if not torch.equal(whole.output, whole.input):
            obstacles[layer.index] = "without both of its sublayers, the layer would still change what it is given"
        elif torch.equal(mlp.input, running[layer.index, "mlp"].input):
            obstacles[layer.index] = "its attention and its MLP stand side by side (a parallel block)"
    return obstacles
