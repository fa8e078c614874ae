"""Patches: values that replace parameters of layers, and their bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load, save

from avss_dist.core.errors import ModelError
from avss_dist.models.forward import Change, ReplaceParameter, while_running
from avss_dist.models.structure.layers import Layer

Parameter = tuple[int, str]
"""Index of a layer in the whole model, and path of a parameter below it."""
Patch = Mapping[Parameter, torch.Tensor]

_ABOUT = "avss"


def encode_patch(patch: Patch, about: str) -> bytes:
    """Return a patch as the bytes of a safetensors file, equal for equal patches, with ``about`` in its header."""
    tensors = {f"{layer}.{path}": tensor.contiguous() for (layer, path), tensor in patch.items()}
    return save(tensors, {_ABOUT: about})


def decode_patch(data: bytes) -> tuple[dict[Parameter, torch.Tensor], str]:
    """Return the patch that `encode_patch` encoded, and its ``about``."""
    patch = {}
    for name, tensor in load(data).items():
        layer, _, path = name.partition(".")
        patch[int(layer), path] = tensor
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    return patch, header["__metadata__"][_ABOUT]


def patch_changes(layers: Sequence[Layer], patch: Patch, *, when_called: bool = False) -> list[Change]:
    """Return the changes by which layers compute with the values of a patch.

    Args:
        when_called: weights are in memory, or whole, only while their layer runs. Backward passes use the unpatched
            weights then.

    Raises:
        ModelError: a parameter is offloaded or partitioned, so that it is not whole where the layer is.
    """
    changes: list[Change] = []
    for (layer, path), value in patch.items():
        owner, _, name = path.rpartition(".")
        change = ReplaceParameter(layers[layer].module.get_submodule(owner), name, value)
        if when_called:
            changes.append(while_running(change))
        else:
            _require_whole(change.module.get_parameter(name), value)
            changes.append(change)
    return changes


def _require_whole(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Refuse a parameter that is not in memory, or only a part of it, where a value replaces it.

    Raises:
        ModelError: the parameter is offloaded or partitioned.
    """
    if parameter.is_meta or parameter.shape != value.shape:
        raise ModelError(
            "The weights of a repaired layer are offloaded or partitioned, and cannot be changed in place.",
            "Use `partition` single, or device_map with more `max_memory`.",
        )
