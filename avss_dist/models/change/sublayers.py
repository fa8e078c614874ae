"""Sublayers that run and add nothing, and the layers in which they cannot be left out alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from avss_dist.core.intervention import PARTS, Removal, Sublayer, sublayers_of
from avss_dist.models.change.skipping import Skip
from avss_dist.models.forward import (
    Arguments,
    CallAfter,
    Change,
    Keywords,
    Output,
    RunThrough,
    changing,
    replace_tensor,
)
from avss_dist.models.structure.layers import Layer, first_tensor
from avss_dist.models.watching import CapturedCall, captured


def sublayer_removals(layers: Sequence[Layer], removed: Collection[Removal]) -> list[Change]:
    """Return the changes by which the sublayers in ``removed`` run and add nothing."""
    changes: list[Change] = []
    for part in removed:
        if isinstance(part, Sublayer):
            tap = layers[part.layer].taps[part.part]
            changes.append(CallAfter(tap.module, _add_nothing))
    return changes


def _add_nothing(_args: Arguments, _kwargs: Keywords, output: Output) -> Output:
    """Return the output of a sublayer with zeros as its hidden states."""
    added = first_tensor(output)
    if added is None:
        return None
    return replace_tensor(output, added, torch.zeros_like(added))


def find_obstacles(layers: Sequence[Layer], run: Callable[[], object]) -> dict[int, str]:
    """Return the reasons, by layer, why sublayers of a layer cannot be left out alone.

    Layers whose sublayers can be left out are absent. Two passes are compared in which every layer returns its input,
    so that all have equal inputs: in the first pass layers are skipped, in the second both of their sublayers are
    removed.

    Args:
        run: runs a forward pass over a few tokens.
    """
    obstacles: dict[int, str] = {}
    for layer in layers:
        if obstacle := _obstacle_by_structure(layers, layer):
            obstacles[layer.index] = obstacle
    candidates = [layer for layer in layers if layer.index not in obstacles]
    modules: dict[tuple[int, str], nn.Module] = {}
    for layer in candidates:
        modules[layer.index, "layer"] = layer.module
        modules[layer.index, "mlp"] = layer.taps["mlp"].module

    # A layer without a form runs when it is skipped, so that its modules are called.
    skipped = [RunThrough(layer.module, Skip(replace(layer, form=None))) for layer in layers]
    with changing(skipped), captured(modules) as running:
        run()

    changes: list[Change] = []
    for layer in layers:
        if layer.index in obstacles:
            changes.append(RunThrough(layer.module, Skip(layer)))
    changes += sublayer_removals(layers, sublayers_of(layer.index for layer in candidates))
    with changing(changes), captured(modules) as without:
        run()

    for layer in candidates:
        if obstacle := _obstacle_by_passes(layer, running, without):
            obstacles[layer.index] = obstacle
    return obstacles


def _obstacle_by_structure(layers: Sequence[Layer], layer: Layer) -> str | None:
    """Return why the sublayers of a layer cannot be left out alone, from its modules, or None."""
    uses = [other for other in layers if other.module is layer.module]
    if len(uses) > 1:
        return "the layer is used more than once"
    missing = []
    for part in PARTS:
        tap = layer.taps.get(part)
        if tap is None or tap.reads != "output":
            missing.append(part)
    if missing:
        return f"no module of the layer is its {' or its '.join(missing)}"
    return None


def _obstacle_by_passes(
    layer: Layer,
    running: Mapping[tuple[int, str], CapturedCall],
    without: Mapping[tuple[int, str], CapturedCall],
) -> str | None:
    """Return why the sublayers of a layer cannot be left out alone, from two passes, or None.

    Args:
        running: calls by layer and part in a pass in which the sublayers run.
        without: calls in a pass in which the sublayers add nothing.
    """
    whole = without[layer.index, "layer"]
    if not torch.equal(whole.output, whole.input):
        return "without both of its sublayers, the layer would still change what it is given"
    mlp = without[layer.index, "mlp"]
    if torch.equal(mlp.input, running[layer.index, "mlp"].input):
        return "its attention and its MLP stand side by side (a parallel block)"
    return None
