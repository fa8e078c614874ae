"""Patches: values that replace parameters of layers, and their bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from safetensors.torch import load, save
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.forward import (
    around,
    replaced_parameters,
    with_parameters,
)
from avss_dist.models.structure.layers import (
    Layer,
)

Parameter = tuple[int, str]
"""Index of a layer in the whole model, and path of a parameter below it."""


Patch = Mapping[Parameter, torch.Tensor]


_ABOUT = "avss"


def encode_patch(patch: Patch, about: str) -> bytes:
    """Return a patch as the bytes of a safetensors file, equal for equal patches, with ``about`` in its header."""
    return save({f"{layer}.{path}": tensor.contiguous() for (layer, path), tensor in patch.items()}, {_ABOUT: about})


def decode_patch(data: bytes) -> tuple[dict[Parameter, torch.Tensor], str]:
    """Return the patch that `encode_patch` encoded, and its ``about``."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = ((name.partition("."), tensor) for name, tensor in load(data).items())
    return {(int(layer), path): tensor for (layer, _, path), tensor in names}, header["__metadata__"][_ABOUT]


@contextmanager
def patched(layers: Sequence[Layer], patch: Patch, *, when_called: bool = False) -> Iterator[None]:
    """Have layers compute with the values of a patch inside the context, in the parameters' dtypes and devices.

    Args:
        when_called: weights are in memory, or whole, only while their layer runs. Backward passes use the unpatched
            weights then.

    Raises:
        ModelError: a parameter is offloaded or partitioned, so that it is not whole where the layer is.
    """
    if when_called:
        values: dict[nn.Module, dict[str, torch.Tensor]] = {}
        for (layer, path), value in patch.items():
            owner, _, name = path.rpartition(".")
            values.setdefault(layers[layer].module.get_submodule(owner), {})[name] = value

        def current(module: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
            return {module.get_parameter(name): value for name, value in values[module].items()}

        with around({module: partial(with_parameters, partial(current, module)) for module in values}, weights=True):
            yield
        return
    changed = {layers[layer].module.get_parameter(path): value for (layer, path), value in patch.items()}
    if any(parameter.is_meta or parameter.shape != value.shape for parameter, value in changed.items()):
        raise ModelError(
            "The weights of a repaired layer are offloaded or partitioned, and cannot be changed in place.",
            "Use `partition` single, or device_map with more `max_memory`.",
        )
    with replaced_parameters(changed):
        yield
