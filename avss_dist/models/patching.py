"""Patches: values of a few parameters in place of a model's own, as bytes, and in an open model for a while."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import load, save
from torch import nn

from avss_dist.errors import ModelError
from avss_dist.models.layers import Layer

Parameter = tuple[int, str]
"""A layer of the whole model, and the path of a parameter below it."""
Patch = Mapping[Parameter, torch.Tensor]

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
    changed = {layers[layer].module.get_parameter(path): value for (layer, path), value in patch.items()}
    if any(parameter.is_meta or parameter.shape != value.shape for parameter, value in changed.items()):
        raise ModelError(
            "The weights of a layer that is repaired are kept off the devices that compute, and cannot be changed.",
            "Use `partition` single, or device_map with more `max_memory`.",
        )
    with holding(changed):
        yield


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
