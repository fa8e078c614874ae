"""Reading of a checkpoint's weights into the module of an earlier checkpoint of the same shape.

The checkpoints of a training differ in their weights alone. For each of them, transformers builds the same module and
sets its weights to tensors of the files: mapped, and converted to the dtype of the weight. Here the module stays, and
its weights are set in the same way, so that it computes what a new module would, to the bit.

A model is loaded anew unless all of this holds:

- The settings and the device are the same. So is ``config.json``, but for names of models and versions.
- The files have the same tensors by name and shape. None is quantized. A .gguf file and a checkpoint with Python code
  of its own are always loaded anew.
- Each weight of the backbone, and each buffer that is stored with weights, is one stored tensor: in the earlier files,
  it has the bits of the module. This leaves out weights that transformers computes from several tensors, rearranges or
  initializes.
- Weights that the configuration ties are one weight, and are stored once.
- No module has changed an attribute or a buffer since it was loaded. Buffers that are not stored, such as the
  frequencies of rotary embeddings, follow from the configuration, and stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.values import JsonObject
from avss_dist.models.checkpoint.complete import is_number
from avss_dist.models.checkpoint.loading import renaming, without_head
from avss_dist.models.checkpoint.locate import Checkpoint, read_config
from avss_dist.models.checkpoint.quantization import quantization_method
from avss_dist.models.checkpoint.safetensors import DTYPES, StoredTensor, tensors_of
from avss_dist.models.checkpoint.weight_files import INDEX, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Json = TypeVar("Json")
_UNREADABLE = (
    ModelError,
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
)
"""Errors over a bad checkpoint. Loading it anew explains them."""
_NAMES = ("name_or_path", "transformers_version")
"""Ends of the keys of ``config.json`` that change no number."""
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of every module that torch itself sets: parameters, buffers, hooks and children."""


class ReloadableModel:
    """A loaded model, whose weights those of another checkpoint can replace.

    Args:
        checkpoint: the checkpoint of its weights.
        settings: settings with which it was loaded.
        device: device of its weights.
        model: the model, after a forward pass.

    Attributes:
        model: the model; None after it could not take the weights of a checkpoint, or was dropped.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, device: torch.device, model: PreTrainedModel
    ) -> None:
        self.model: PreTrainedModel | None = model
        self._checkpoint = checkpoint
        self._settings = settings
        self._device = device
        self._state = _state_of(model)
        self._files: _ComparedFiles | None = None  # of its first checkpoint, once another one is to replace it

    def drop(self) -> None:
        """Forget the model, so that its memory is free once nothing else refers to it."""
        self.model = None
        self._files = None
        self._state.clear()

    def reload(self, checkpoint: Checkpoint, settings: Settings, device: torch.device) -> bool:
        """Set the weights to those of another checkpoint, and return whether that was possible.

        If it was not, the model is dropped, as some of its weights may have been set. Its checkpoint is then to be
        loaded anew, which also explains what is wrong with it.
        """
        with suppress(*_UNREADABLE):
            if self._fits(checkpoint, settings, device):
                self._read_weights(checkpoint)
                return True
        self.drop()
        return False

    def _fits(self, checkpoint: Checkpoint, settings: Settings, device: torch.device) -> bool:
        """Whether the module of a checkpoint would differ from this one in nothing but its weights."""
        if self.model is None or settings != self._settings or device != self._device:
            return False
        for either in (self._checkpoint, checkpoint):
            if either.gguf or either.trust_remote_code:
                return False
        config = self.model.config
        if quantization_method(config) or getattr(type(config), "extra_files", None):
            return False
        if self._files is None:
            self._files = _compare(self.model, self._checkpoint)
        stored = _stored_by_name(checkpoint)
        if config_without_names(checkpoint) != self._files.config or _shapes(stored) != self._files.shapes:
            return False
        for name, weight in self._files.weights.items():
            if not _is_plain(stored[name], weight):
                return False
        return _is_same(self._state, _state_of(self.model))

    def _read_weights(self, checkpoint: Checkpoint) -> None:
        assert self._files is not None
        stored = _stored_by_name(checkpoint)
        with _Reader() as reader:
            for name, weight in self._files.weights.items():
                weight.data = reader.read(stored[name], weight)


@dataclass(frozen=True)
class _ComparedFiles:
    """Properties that a model's checkpoint shares with those whose weights the model can take.

    Attributes:
        config: its ``config.json``, without names.
        shapes: shapes of its stored tensors by name.
        weights: weights and stored buffers of the model, by the name of the stored tensor that each is.
    """

    config: JsonObject
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, torch.Tensor]


def _compare(model: PreTrainedModel, checkpoint: Checkpoint) -> _ComparedFiles:
    """Compare a model with the files that it was loaded from.

    Raises:
        ValueError: its backbone is not made of its stored tensors as they are.
    """
    stored = _stored_by_name(checkpoint)
    weights = _weights_by_name(model, stored)
    if not _is_whole(model, weights) or not _are_equal(weights, stored):
        raise ValueError(checkpoint.name)
    return _ComparedFiles(config_without_names(checkpoint), _shapes(stored), weights)


class _Reader:
    """Reader of stored tensors by the library that transformers reads them with, which maps them into memory."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, stored: StoredTensor, weight: torch.Tensor) -> torch.Tensor:
        """Return a stored tensor on the device and in the dtype of a weight, in the memory that transformers takes."""
        if stored.file not in self._files:
            self._files[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt"))
        tensor: torch.Tensor = self._files[stored.file].get_slice(stored.name)[...]
        return tensor.to(weight.device, weight.dtype)


def config_without_names(checkpoint: Checkpoint) -> JsonObject:
    """Return a checkpoint's ``config.json`` without names of models and versions."""
    return _without_names(read_config(checkpoint.folder, checkpoint.name))


def _without_names(value: Json) -> Json:
    """Return a part of a configuration without names of models and versions, at any depth."""
    if not isinstance(value, dict):
        return value
    without: Any = {}
    for key, part in value.items():
        if not key.endswith(_NAMES):
            without[key] = _without_names(part)
    return without


def _stored_by_name(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint's weight files by name.

    Raises:
        ValueError: two of them have one name.
        KeyError: the index of several files lacks the metadata that transformers reads.
    """
    stored: dict[str, StoredTensor] = {}
    files = weight_files(checkpoint.folder)
    if len(files) > 1:
        json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))["metadata"]
    for file in files:
        for tensor in tensors_of(file):
            if tensor.name in stored:
                raise ValueError(tensor.name)
            stored[tensor.name] = tensor
    return stored


def _shapes(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in stored.items()}


def _weights_by_name(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Return the weight that each stored tensor is, by the stored name, without tensors that the model does not use.

    Raises:
        ValueError: a weight has two stored tensors.
    """
    rename, _, state = renaming(model)
    weights: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name in stored:
        weight = state.get(rename(name), state.get(name))
        if weight is None:
            continue
        if id(weight) in taken:
            raise ValueError(name)
        taken.add(id(weight))
        weights[name] = weight
    return weights


def _are_equal(weights: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor]) -> bool:
    """Whether weights have the bits of their stored tensors in the weights' dtype."""
    with _Reader() as reader:
        for name, weight in weights.items():
            if not _is_plain(stored[name], weight):
                return False
            tensor = reader.read(stored[name], weight)
            if tensor.shape != weight.shape or not torch.equal(_bits(tensor), _bits(weight)):
                return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, uint8[bytes]: NaN is not equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _is_plain(stored: StoredTensor, weight: torch.Tensor) -> bool:
    """Whether a stored tensor becomes a weight by a conversion of its numbers, if that is needed at all."""
    dtype = DTYPES.get(stored.dtype)
    if dtype is None or not weight.is_floating_point():
        return dtype == weight.dtype
    return is_number(stored)


def _is_whole(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether all weights and stored buffers of the backbone are among these, and all that are tied are one weight."""
    taken = {id(weight) for weight in weights.values()}
    for tensor in without_head(model).state_dict(keep_vars=True).values():
        if id(tensor) not in taken:
            return False
    state = model.state_dict(keep_vars=True)
    ties: Mapping[str, str] = model.all_tied_weights_keys or {}
    return all(state[name] is state[source] for name, source in ties.items())


def _state_of(model: nn.Module) -> dict[str, tuple[object, object]]:
    """Return the attributes and buffers of all modules by path, each with a number that changes if it does."""
    state: dict[str, tuple[object, object]] = {}
    for path, module in model.named_modules():
        attributes = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
        for name, value in (attributes | module._buffers).items():
            state[f"{path}.{name}"] = value, _version(value)
    return state


def _version(value: object) -> object:
    """Return a number that changes when a tensor or a container changes in place, as far as that can be told."""
    if isinstance(value, torch.Tensor):
        return value._version
    if isinstance(value, (dict, list, set)):
        return len(value)
    return None


def _is_same(before: Mapping[str, tuple[object, object]], after: Mapping[str, tuple[object, object]]) -> bool:
    """Whether all attributes are as they were: plain values by their value, others by their identity."""
    if before.keys() != after.keys():
        return False
    for name, (value, version) in before.items():
        value_after, version_after = after[name]
        if version_after != version:
            return False
        if value_after is value:
            continue
        if not isinstance(value, (bool, int, float, str)) or type(value_after) is not type(value):
            return False
        if value_after != value:
            return False
    return True
