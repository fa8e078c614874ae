"""Linear maps of layers, and their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import MapSparsity
from avss_dist.models.structure.layers import Layer, Projection, is_transposed, require_single_use

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights that can be read as numbers. Others are those of quantized weights."""


def find_projection(layers: Sequence[Layer], cut: MapSparsity) -> Projection:
    """Return the linear map that a `MapSparsity` names.

    Raises:
        ModelError: the model has no such map, it has another shape, or its layer is used more than once.
    """
    hint = "The plan was made for another model."
    layer = layer_at(layers, cut.layer, "made sparse", hint)
    maps = {projection.path: projection for projection in layer.projections}
    if cut.path not in maps:
        raise ModelError(
            f"Layer {layer.index} has no linear map '{cut.path}' whose input is seen.",
            f"{hint} It has {', '.join(maps) or 'none: they are fused'}.",
        )
    projection = maps[cut.path]
    if projection.outputs != cut.outputs or projection.inputs != cut.inputs:
        raise ModelError(
            f"'{cut.path}' of layer {layer.index} is {projection.outputs} x {projection.inputs}, "
            f"not {cut.outputs} x {cut.inputs}.",
            hint,
        )
    return projection


def layer_at(layers: Sequence[Layer], index: int, change: str, hint: str | None = None) -> Layer:
    """Return a layer whose linear maps can be changed alone.

    Args:
        change: past participle, for the message.

    Raises:
        ModelError: the model has no such layer, or it is used more than once in a pass.
    """
    if index >= len(layers):
        raise ModelError(f"There is no layer {index}: the model has {len(layers)}, from 0.", hint)
    require_single_use(layers, layers[index], change)
    return layers[index]


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return the weight of a linear map, [outputs, inputs], in its current dtype.

    Raises:
        ModelError: the weight is quantized.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.dim() != 2 or weight.dtype not in _DTYPES:
        raise ModelError(f"The weight of a {type(module).__name__} is quantized: it cannot be read as numbers.")
    weight = weight.detach()
    if is_transposed(module):
        return weight.T
    return weight
