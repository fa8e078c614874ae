"""Patches: values of a few parameters in place of a model's own, as bytes, and in an open model for a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from avss_dist.errors import ModelError
from avss_dist.models.layers import Layer, first_tensor
from avss_dist.models.skipping import replaced, replaced_forwards

Parameter = tuple[int, str]
"""A layer of the whole model, and the path of a parameter below it."""
Patch = Mapping[Parameter, torch.Tensor]
STREAM = ""
"""The path of no parameter: what a layer gives is multiplied by this value, a number or [units, units]."""

_ABOUT = "avss"


def encode_patch(patch: Patch, about: str) -> bytes:
    """A patch as a file in safetensors, which is the same for the same patch; ``about`` is kept in its header."""
    tensors = {f"{layer}.{path}": tensor.contiguous() for (layer, path), tensor in patch.items()}
    return save(tensors, {_ABOUT: about})


def decode_patch(data: bytes) -> tuple[dict[Parameter, torch.Tensor], str]:
    """The patch of `encode_patch`, and what is said about it."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = ((name.partition("."), tensor) for name, tensor in load(data).items())
    return {(int(layer), path): tensor for (layer, _, path), tensor in names}, header["__metadata__"][_ABOUT]


@contextmanager
def patched(layers: Sequence[Layer], patch: Patch) -> Iterator[None]:
    """Inside, layers compute with the values of a patch, in the dtypes and on the devices of their own.

    Raises:
        ModelError: a parameter that would change is not whole where the layer is: weights come from elsewhere when they
            are used, or are cut in parts.
    """
    weights = {key: value for key, value in patch.items() if key[1] != STREAM}
    streams = {layers[layer].module: value for (layer, path), value in patch.items() if path == STREAM}
    changed = {layers[layer].module.get_parameter(path): value for (layer, path), value in weights.items()}
    if any(parameter.is_meta or parameter.shape != value.shape for parameter, value in changed.items()):
        raise ModelError(
            "The weights of a layer that is repaired are kept off the devices that compute, and cannot be changed.",
            "Use `partition` single, or device_map with more `max_memory`.",
        )
    forwards = {module: partial(_multiplied, module.forward, value) for module, value in streams.items()}
    with holding(changed), replaced_forwards(forwards):
        yield


def _multiplied(forward: Callable[..., Any], by: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return multiplied(forward(*args, **kwargs), by)


def multiplied(output: Any, by: torch.Tensor | None) -> Any:
    """What a layer returns, its hidden states multiplied by a number, or by [units, units], in float32."""
    hidden = None if by is None else first_tensor(output)
    if by is None or hidden is None:
        return output
    by, wide = by.to(hidden.device, torch.float32), hidden.float()
    return replaced(output, hidden, (wide @ by if by.dim() else wide * by).to(hidden.dtype))


@contextmanager
def holding(values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Inside, parameters hold other values, in the dtypes and on the devices of their own."""
    own = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, before in own.items():
            parameter.data = before
