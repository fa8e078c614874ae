"""Patches: replacement values of some parameters, encoded as bytes, and applied to an open model for a while."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.models.layers import Layer

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
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    names = ((name.partition("."), tensor) for name, tensor in load(data).items())
    return {(int(layer), path): tensor for (layer, _, path), tensor in names}, header["__metadata__"][_ABOUT]


@contextmanager
def patched(layers: Sequence[Layer], patch: Patch) -> Iterator[None]:
    """Have layers compute with the values of a patch inside the context, in the parameters' dtypes and devices.

    Raises:
        ModelError: a parameter is offloaded or partitioned, so that it is not whole where the layer is.
    """
    changed = {layers[layer].module.get_parameter(path): value for (layer, path), value in patch.items()}
    if any(parameter.is_meta or parameter.shape != value.shape for parameter, value in changed.items()):
        raise ModelError(
            "The weights of a repaired layer are offloaded or partitioned, and cannot be changed in place.",
            "Use `partition` single, or device_map with more `max_memory`.",
        )
    with replaced_parameters(changed):
        yield


@contextmanager
def replaced_parameters(values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Replace the values of parameters inside the context, in the parameters' dtypes and devices."""
    originals = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original


@contextmanager
def patched_when_called(layers: Sequence[Layer], patch: Patch) -> Iterator[None]:
    """Have layers compute with the values of a patch inside the context, of weights that are whole while layers run.

    Backward passes use the unpatched weights.
    """
    values: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for (layer, path), value in patch.items():
        owner, _, name = path.rpartition(".")
        values.setdefault(layers[layer].module.get_submodule(owner), {})[name] = value

    def replaced(module: nn.Module) -> AbstractContextManager[None]:
        return replaced_parameters({module.get_parameter(name): value for name, value in values[module].items()})

    with changed_when_called({module: partial(replaced, module) for module in values}):
        yield


@contextmanager
def changed_when_called(changes: Mapping[nn.Module, Callable[[], AbstractContextManager[None]]]) -> Iterator[None]:
    """Enter a context whenever a module runs, while its weights are in memory, inside the context."""

    def call(
        change: Callable[[], AbstractContextManager[None]], forward: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        with change():
            return forward(*args, **kw)

    with ExitStack() as stack:
        for module, change in changes.items():
            name = forward_name(module)
            original, forward = vars(module).get(name), getattr(module, name)
            setattr(module, name, partial(call, change, forward))
            stack.callback(_restore, module, name, original)
        yield


def forward_name(module: nn.Module) -> str:
    """Return the attribute with a module's own forward; Accelerate's wrapper of it loads the weights first."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"


def _restore(module: nn.Module, name: str, original: Any) -> None:
    if original is None:
        delattr(module, name)
    else:
        setattr(module, name, original)
