"""Weights of linear maps that are rounded to the nearest numbers of a number format.

Whole weights in memory are rounded once, and replaced in place. Weights that are in memory only while their layer runs
(offloaded ones, and those of ranks that gather a layer) are rounded whenever their map runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from avss_dist.core.errors import ModelError, nearest
from avss_dist.core.intervention import Rounding
from avss_dist.models.change.number_formats import NumberFormat, fitting, number_format
from avss_dist.models.forward import Change, ReplaceParameter, while_running
from avss_dist.models.structure.layers import Layer, Projection, is_transposed
from avss_dist.models.structure.linear_maps import layer_at, weight_of

MOST_DISTINCT = 16
"""Largest number of different values in a group of weights that seem to be rounded: those of 4 bits."""
GROUP = 32
"""Number of neighbouring weights in such a group. Formats of 4 bits share a scale among 32 or more."""
SAMPLED = 8
"""Number of rows of a weight that are looked at."""


def rounded_weight(module: nn.Module, target: NumberFormat) -> torch.Tensor:
    """Return the weight of a linear map after rounding, [outputs, inputs], in the weight's dtype.

    Raises:
        ModelError: the weight is quantized, or has a shape that the format cannot take.
    """
    weight = weight_of(module)
    if obstacle := target.obstacle(*weight.shape):
        raise ModelError(f"{target.name} cannot round a {type(module).__name__}: its {obstacle}.")
    return target.round(weight).to(weight.dtype)


def _rounded_parameter(module: nn.Module, target: NumberFormat) -> torch.Tensor:
    """Return the weight of a linear map after rounding, as the module stores it."""
    weight = rounded_weight(module, target)
    if is_transposed(module):
        return weight.T.contiguous()
    return weight


def rounding_changes(layers: Sequence[Layer], rounding: Rounding, *, when_called: bool = False) -> list[Change]:
    """Return the changes by which layers compute with rounded weights.

    Args:
        layers: all layers of the model.
        when_called: weights are in memory, or whole, only while their layer runs.

    Raises:
        ModelError: see `rounded_maps`. A weight that cannot be rounded is refused when the changes are made.
    """
    changes: list[Change] = []
    for projection, target in rounded_maps(layers, rounding).items():
        module = projection.module
        change = ReplaceParameter(module, "weight", partial(_rounded_parameter, module, target))
        if when_called or module.get_parameter("weight").is_meta:
            changes.append(while_running(change))
        else:
            changes.append(change)
    return changes


def rounded_maps(layers: Sequence[Layer], rounding: Rounding) -> dict[Projection, NumberFormat]:
    """Return the linear maps that a rounding names, each with its format.

    Args:
        layers: all layers of the model.

    Raises:
        ModelError: the model lacks a layer or a map, a layer is used more than once, or a format cannot take a map.
    """
    formats: dict[Projection, NumberFormat] = {}
    for index in sorted(rounding.layers):
        layer = layer_at(layers, index, "rounded alone")
        maps = {projection.path: projection for projection in layer.projections}
        for place in rounding.places:
            if place.layer == index and place.path is not None and place.path not in maps:
                raise ModelError(f"Layer {index} has no linear map '{place.path}'.", nearest(place.path, maps))
        for path, name in rounding.formats(index, maps).items():
            target = number_format(name)
            require_fit(layers, layer, maps[path], target)
            formats[maps[path]] = target
    return formats


def require_fit(layers: Sequence[Layer], layer: Layer, projection: Projection, target: NumberFormat) -> None:
    """Refuse a format that cannot take a linear map.

    Args:
        layers: all layers of the model.

    Raises:
        ModelError: the map has another shape. The hint names formats that can take all maps of the model.
    """
    obstacle = target.obstacle(projection.outputs, projection.inputs)
    if obstacle is None:
        return
    shapes = []
    for other in layers:
        for linear in other.projections:
            shapes.append((linear.outputs, linear.inputs))
    raise ModelError(
        f"The number format {target.name} cannot take '{projection.path}' of layer {layer.index}: its {obstacle}.",
        f"Formats that can take every linear map of this model: {', '.join(fitting(shapes))}.",
    )


def rounded_before(layers: Sequence[Layer]) -> str | None:
    """Return a note that weights of linear maps were rounded before, or None if nothing suggests it.

    Weights of training differ among neighbours, even in bfloat16. Those that were unpacked from a format of 4 bits have
    at most 16 different values in a group. Some rows of every weight that is in memory are looked at.
    """
    number = 0
    coarse = 0
    for layer in layers:
        for projection in layer.projections:
            number += 1
            if _distinct(projection) <= MOST_DISTINCT:
                coarse += 1
    if coarse == 0:
        return None
    return (
        f"{coarse} of {number} linear maps have at most {MOST_DISTINCT} different values among {GROUP} neighbouring "
        "weights: they were rounded before, and rounding them again says little of the original"
    )


def _distinct(projection: Projection) -> int:
    """Return the largest number of different values in a group of neighbours, or `GROUP` if the weight is not here."""
    weight = projection.module.get_parameter("weight")
    if weight.is_meta or hasattr(weight, "to_local") or weight.numel() != projection.outputs * projection.inputs:
        return GROUP
    sampled = weight_of(projection.module)[:SAMPLED].reshape(-1)
    number = len(sampled) // GROUP
    if number == 0:
        return GROUP
    groups = sampled[: number * GROUP].reshape(-1, GROUP).sort(dim=1).values
    steps = (groups.diff(dim=1) != 0).sum(dim=1)
    return 1 + int(steps.max())
