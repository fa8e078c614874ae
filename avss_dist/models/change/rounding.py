"""Weights of linear maps that are rounded to the nearest numbers of a number format.

Whole weights in memory are rounded once, and replaced in place. Weights that are in memory only while their layer runs
(offloaded ones, and those of ranks that gather a layer) are rounded whenever their map runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from avss_dist.core.errors import ModelError, nearest
from avss_dist.core.intervention import (
    Rounding,
)
from avss_dist.models.change.number_formats import NumberFormat, fitting, number_format
from avss_dist.models.forward import (
    around,
    replaced_parameters,
    with_parameters,
)
from avss_dist.models.structure.layers import (
    Layer,
    Projection,
)
from avss_dist.models.structure.linear_maps import layer_at, weight_of

GROUP, MOST_DISTINCT = 32, 16  # neighbours that are looked at together, and values of 4 bits


SAMPLED = 8  # rows of a weight that are looked at


def rounded_weight(module: nn.Module, target: NumberFormat) -> torch.Tensor:
    """Return the weight of a linear map after rounding, [outputs, inputs], in the weight's dtype.

    Raises:
        ModelError: the weight is quantized, or has a shape that the format cannot take.
    """
    weight = weight_of(module)
    if obstacle := target.obstacle(*weight.shape):
        raise ModelError(f"{target.name} cannot round a {type(module).__name__}: its {obstacle}.")
    return target.round(weight).to(weight.dtype)


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
            formats[maps[path]] = number_format(name)
            require_fit(layers, layer, maps[path], formats[maps[path]])
    return formats


def require_fit(layers: Sequence[Layer], layer: Layer, projection: Projection, target: NumberFormat) -> None:
    """Refuse a format that cannot take a linear map.

    Args:
        layers: all layers of the model.

    Raises:
        ModelError: the map has another shape. The hint names formats that can take all maps of the model.
    """
    if obstacle := target.obstacle(projection.outputs, projection.inputs):
        able = fitting((p.outputs, p.inputs) for other in layers for p in other.projections)
        raise ModelError(
            f"The number format {target.name} cannot take '{projection.path}' of layer {layer.index}: its {obstacle}.",
            f"Formats that can take every linear map of this model: {', '.join(able)}.",
        )


def rounded_before(layers: Sequence[Layer]) -> str | None:
    """Return a note that weights of linear maps were rounded before, or None if nothing suggests it.

    Weights of training differ among neighbours, even in bfloat16. Those that were unpacked from a format of 4 bits have
    at most 16 different values in a group. Some rows of every weight that is in memory are looked at.
    """
    maps = [projection for layer in layers for projection in layer.projections]
    coarse = sum(_distinct(projection) <= MOST_DISTINCT for projection in maps)
    if not coarse:
        return None
    return (
        f"{coarse} of {len(maps)} linear maps have at most {MOST_DISTINCT} different values among {GROUP} neighbouring "
        "weights: they were rounded before, and rounding them again says little of the original"
    )


def _distinct(projection: Projection) -> int:
    """Return the largest number of different values in a group of neighbours, or `GROUP` if the weight is not here."""
    weight = projection.module.get_parameter("weight")
    if weight.is_meta or hasattr(weight, "to_local") or weight.numel() != projection.outputs * projection.inputs:
        return GROUP
    sampled = weight_of(projection.module)[:SAMPLED].reshape(-1)
    groups = sampled[: len(sampled) // GROUP * GROUP].reshape(-1, GROUP).sort(dim=1).values
    return 1 + int((groups.diff(dim=1) != 0).sum(dim=1).max()) if len(groups) else GROUP


@contextmanager
def rounded(layers: Sequence[Layer], rounding: Rounding, *, when_called: bool = False) -> Iterator[None]:
    """Have layers compute with rounded weights inside the context, and restore the weights exactly.

    Args:
        when_called: weights are in memory, or whole, only while their layer runs.

    Raises:
        ModelError: see `rounded_maps`.
    """
    maps = {projection.module: target for projection, target in rounded_maps(layers, rounding).items()}

    def current(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        weight = rounded_weight(module, maps[module])
        stored = weight.T.contiguous() if type(module).__name__ == "Conv1D" else weight
        return {module.get_parameter("weight"): stored}

    absent = [module for module in maps if when_called or module.get_parameter("weight").is_meta]
    present = [current(module) for module in maps if module not in absent]
    with (
        replaced_parameters({weight: value for values in present for weight, value in values.items()}),
        around({module: partial(with_parameters, partial(current, module)) for module in absent}, weights=True),
    ):
        yield
