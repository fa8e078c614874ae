"""A model on the meta device whose weights stay in the checkpoint's files until a part of them is loaded.

transformers builds the model from tensors that have a name, a shape and a dtype, but no data, which shows where each
stored tensor goes. Renamed tensors are read straight into place. Rearranged ones, such as fused experts, and quantized
ones go through transformers' own conversion, one weight at a time. Stored tensors are copied into memory, or mapped
from the page cache.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.memory import populate
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import build_model, text_config
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import quantization_method, ready_quantizer, unpacking_bytes
from avss_dist.models.checkpoint.safetensors import DTYPES, StoredTensor, explaining_reads, tensors_of
from avss_dist.models.checkpoint.weight_files import weight_files
from avss_dist.partition.streaming.conversion import ELSEWHERE, Conversion, GgufTensors, Group, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[Sequence[StoredTensor]], Iterator[torch.Tensor]]
"""Function that yields stored tensors in memory: `copied`, `mapped`, or `copied_into` a buffer."""
_TENSOR_ALIGNMENT = 64  # bytes, of torch's allocations
_READERS = 4  # threads: one alone does not saturate the memory bandwidth
_PIECE = 8 << 20  # bytes that a thread reads at a time
_RANDOM_BLOCK = 1 << 20  # random numbers that are repeated
_RANDOM_OFFSETS = 1 << 16  # positions at which weights begin in them
_RANDOM_STEP = 997  # positions between the beginnings of two weights; a prime number


def buffer_bytes(stored: Iterable[StoredTensor]) -> int:
    """Return the size of a buffer that holds these tensors, in bytes."""
    return sum(tensor.size + _TENSOR_ALIGNMENT for tensor in stored)


def readahead(stored: Iterable[StoredTensor]) -> None:
    """Ask the system to read tensors ahead of their use, and block while the disk's queue is full."""
    for tensor in stored:
        with suppress(OSError), tensor.file.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), tensor.start, tensor.size, os.POSIX_FADV_WILLNEED)


def copied_into(buffer: torch.Tensor, stored: Sequence[StoredTensor]) -> Iterator[torch.Tensor]:
    """Copy stored tensors into a buffer, over those of earlier calls, and yield each when it is complete.

    Threads read the next tensors in the meantime. Each tensor keeps the alignment of its file, so that kernels compute
    as with a mapped file.

    Args:
        buffer: uint8[size], of the size from `buffer_bytes`.

    Raises:
        ModelError: a file is gone, or ends before its tensor does.
    """
    parts = _aligned_parts(buffer, stored)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="avss-readers") as threads:
        reads_by_tensor = []
        for source, part in zip(stored, parts, strict=True):
            reads = []
            for number, piece in enumerate(part.split(_PIECE)):
                reads.append(threads.submit(_fill, source, piece, number * _PIECE))
            reads_by_tensor.append(reads)
        for source, part, reads in zip(stored, parts, reads_by_tensor, strict=True):
            with explaining_reads(source):
                for read in reads:
                    read.result()
            yield part.view(DTYPES[source.dtype]).view(source.shape)


def _aligned_parts(buffer: torch.Tensor, stored: Sequence[StoredTensor]) -> list[torch.Tensor]:
    """Return the part of a buffer for each stored tensor, uint8[size], in the alignment of its file.

    A tensor that its file does not align to its elements begins at a multiple of `_TENSOR_ALIGNMENT`.
    """
    parts = []
    used = 0
    for source in stored:
        residue = 0
        if source.start % DTYPES[source.dtype].itemsize == 0:
            residue = source.start % _TENSOR_ALIGNMENT
        padding = (residue - buffer.data_ptr() - used) % _TENSOR_ALIGNMENT
        start = used + padding
        used = start + source.size
        parts.append(buffer[start:used])
    return parts


def _fill(stored: StoredTensor, piece: torch.Tensor, at: int) -> None:
    """Read a piece of a tensor, from offset ``at`` in it, into memory, uint8[size]."""
    with stored.file.open("rb") as file:
        file.seek(stored.start + at)
        if file.readinto(piece.numpy().data) < len(piece):
            raise EOFError


def copied(stored: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """Copy stored tensors into memory of their own, one after the other. See `copied_into`."""
    for tensor in stored:
        buffer = torch.empty(buffer_bytes([tensor]), dtype=torch.uint8)
        yield from copied_into(buffer, [tensor])


def mapped(stored: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """Map stored tensors for a CPU, one after the other, and read each into memory without holding the GIL.

    Writes to a tensor stay in this process. It is mapped as long as something refers to it.

    Raises:
        ModelError: a file is gone, or ends before its tensor does.
    """
    for source in stored:
        with explaining_reads(source):
            # Copy on write. A shorter file is a ValueError.
            pages = np.memmap(str(source.file), np.uint8, "c", source.start, (source.size,))
            tensor = torch.from_numpy(pages)
            populate(tensor.data_ptr(), source.size)
        dtype = DTYPES[source.dtype]
        if source.start % dtype.itemsize:
            tensor = tensor.clone()  # torch views only aligned bytes as larger elements
        yield tensor.view(dtype).view(source.shape)


@dataclass(frozen=True, eq=False)
class Weight:
    """Parameter or buffer of the model that is loaded on demand.

    Attributes:
        meta: meta tensor with its shape and dtype.
        places: (module, name) of every place that holds it.
        stored: the stored tensor that it is equal to; None if transformers converts it from other tensors.
    """

    meta: torch.Tensor
    places: tuple[tuple[nn.Module, str], ...]
    stored: StoredTensor | None

    def assign(self, tensor: torch.Tensor) -> None:
        """Set a tensor in every place."""
        parameter = self._as_parameter(tensor)  # one for all places, so that they stay tied
        for module, name in self.places:
            if name in module._buffers:
                module._buffers[name] = tensor
            else:
                module._parameters[name] = parameter

    def _as_parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        """Return a tensor as a parameter that wants a gradient if that of partition `single` does.

        By weights that want no gradient, torch multiplies in another way.
        """
        if isinstance(tensor, nn.Parameter):
            return tensor
        wants_gradient = tensor.is_floating_point()
        if isinstance(self.meta, nn.Parameter):
            wants_gradient = self.meta.requires_grad
        return nn.Parameter(tensor, requires_grad=wants_gradient)

    def is_inside(self, modules: Set[nn.Module]) -> bool:
        """Whether every place that holds it is one of these modules."""
        return all(module in modules for module, _ in self.places)

    def is_used_by(self, modules: Set[nn.Module]) -> bool:
        """Whether one of these modules holds it."""
        return any(module in modules for module, _ in self.places)

    def current(self) -> torch.Tensor:
        """Return the tensor in its places: the loaded one if there is one, else the meta tensor."""
        for module, name in self.places:
            tensor = module._buffers.get(name, module._parameters.get(name))
            if tensor is not None and not tensor.is_meta:
                return tensor
        return self.meta


@dataclass(frozen=True)
class Part:
    """Weights that are loaded together, and the groups of stored tensors from which some of them are converted."""

    weights: tuple[Weight, ...]
    groups: tuple[Group, ...]

    @property
    def unchanged(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that are weights as they are."""
        return tuple(weight.stored for weight in self.weights if weight.stored)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All stored tensors that are read for this part."""
        stored = list(self.unchanged)
        for group in self.groups:
            stored += group
        return tuple(stored)

    @property
    def loaded_bytes(self) -> int:
        """Number of bytes of memory that its weights take when they are loaded."""
        return buffer_bytes(self.unchanged) + sum(weight.meta.nbytes for weight in self.weights if not weight.stored)

    def unload(self) -> None:
        """Remove its weights from the model."""
        for weight in self.weights:
            weight.assign(weight.meta)


class StreamedWeights:
    """Weights of a checkpoint that are loaded part by part.

    Attributes:
        model: the transformers model with its head. Stored weights are on the meta device at first; others are
            initialized on the CPU.
        unpacks: whether stored tensors are quantized, and unpacked when they are loaded.
        bytes_read: number of bytes of weights read so far.

    Raises:
        ModelError: the weights cannot be read part by part; the message says why.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, *, head: bool = False) -> None:
        self.bytes_read = 0
        if checkpoint.gguf:
            self._open_gguf(checkpoint, settings, head=head)
        else:
            self._open_safetensors(checkpoint, settings, head=head)

    def _open_safetensors(self, checkpoint: Checkpoint, settings: Settings, *, head: bool) -> None:
        config = text_config(checkpoint)
        method = quantization_method(config)
        if method and not settings.dequantize:
            raise ModelError(
                f"'{checkpoint.name}' is quantized ({method}); `partition` streaming computes with unpacked weights.",
                "Set `dequantize`.",
            )
        quantizer = ready_quantizer(checkpoint, config, settings) if method else None
        tensors: list[StoredTensor] = []
        for file in weight_files(checkpoint.folder):
            tensors += tensors_of(file)
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise ModelError(
                    f"{tensor.file} holds '{tensor.name}' as {tensor.dtype}, which cannot be read layer by layer.",
                    ELSEWHERE,
                )
        unread = {tensor.name: _Placeholder(tensor.shape, tensor) for tensor in tensors}
        self.model = build_model(checkpoint, settings, lambda _: unread, head=head)
        self.unpacks = quantizer is not None
        self._weights = _weights(self.model, unread)
        taken = {weight.stored for weight in self._weights.values()}
        converted = [entry.stored for entry in unread.values() if entry.stored and entry.stored not in taken]
        self._conversion = Conversion(self.model, converted, quantizer)

    def _open_gguf(self, checkpoint: Checkpoint, settings: Settings, *, head: bool) -> None:
        file = GgufTensors(checkpoint)

        def stand_ins(empty: PreTrainedModel) -> Mapping[str, _Placeholder]:
            with refusing(f"The weights of '{checkpoint.name}'"):
                file.find_names(empty)
            targets = set(file.names.values())
            return {name: _Placeholder(tensor.shape) for name, tensor in empty.state_dict().items() if name in targets}

        self.model = build_model(checkpoint, settings, stand_ins, head=head)
        self.unpacks = True
        self._weights = _weights(self.model, {})
        with refusing(f"The weights of '{checkpoint.name}'"):
            quantizer = file.quantizer(self.model)
        if quantizer:
            self._conversion = Conversion(self.model, file.stored, quantizer)
        else:
            self._conversion = Conversion(self.model, file.stored, names=file.names, unpack=file.unpack)

    @property
    def unpacks_on_cpu(self) -> bool:
        """Whether quantized tensors are unpacked on the CPU, on whatever device the model computes."""
        return self._conversion.unpack is not None

    def unpacking_bytes(self, parts: Sequence[Part]) -> int:
        """Return the most bytes of memory that unpacking a weight of these parts takes beside their weights."""
        if not self.unpacks:
            return 0
        most = 0
        for part in parts:
            for weight in part.weights:
                if not weight.stored:
                    most = max(most, unpacking_bytes(weight.meta))
        return most

    def split(self, layers: Sequence[nn.Module], backbone: nn.Module) -> tuple[list[Part], Part]:
        """Return a part for each layer, and one for the other weights of the backbone and those that layers share.

        Raises:
            ModelError: the stored tensors of a converted weight are unknown.
        """
        uses = Counter[nn.Module]()
        for layer in layers:
            uses.update(set(layer.modules()))
        keys_by_layer = []
        for layer in layers:
            own_modules = {module for module in layer.modules() if uses[module] == 1}
            keys_by_layer.append({key for key, weight in self._weights.items() if weight.is_inside(own_modules)})
        modules_of_backbone = set(backbone.modules())
        needed = {key for key, weight in self._weights.items() if weight.is_used_by(modules_of_backbone)}
        remaining = (needed | self._unclear_ties()).difference(*keys_by_layer)
        return [self._part(keys) for keys in keys_by_layer], self._part(remaining)

    def _part(self, keys: set[int]) -> Part:
        weights = tuple(weight for key, weight in self._weights.items() if key in keys)
        groups: tuple[Group, ...] = ()
        if any(weight.stored is None for weight in weights):
            groups = self._conversion.groups(keys)
        return Part(weights, groups)

    def load(self, part: Part, device: torch.device, read: Read = copied) -> None:
        """Read a part's weights and set them in the model, on a device.

        Raises:
            ModelError: a file has changed, or transformers cannot convert its tensors.
        """
        self.bytes_read += sum(tensor.size for tensor in part.stored)
        tensors = read(part.stored)
        for weight in part.weights:
            if weight.stored:
                on_device = next(tensors).to(device, non_blocking=True)
                weight.assign(on_device.to(weight.meta.dtype))
        for group in part.groups:
            self._conversion.convert({stored.name: next(tensors) for stored in group}, device)
        for weight in part.weights:
            if weight.stored:
                continue
            tensor = weight.current()
            if tensor.is_meta:
                module, name = weight.places[0]
                raise ModelError(
                    f"The weights cannot be read layer by layer: '{name}' of a {type(module).__name__} is not made of "
                    "its layer's tensors alone.",
                    ELSEWHERE,
                )
            weight.assign(tensor.detach().to(device))

    def resolve_ties(self, backbone: nn.Module) -> None:
        """Tie equal weights that the configuration ties and the files store twice, and keep those of the backbone."""
        unclear = self._unclear_ties()
        if not unclear:
            return
        self.model.tie_weights(missing_keys=set(), recompute_mapping=False)
        used = {id(tensor) for tensor in backbone.parameters()}
        for key in unclear:
            if id(self._weights[key].current()) not in used:
                self._weights[key].assign(self._weights[key].meta)

    def _unclear_ties(self) -> set[int]:
        """Return the ids of weights that the configuration ties although the files store them separately."""
        paths = {module: path for path, module in self.model.named_modules()}
        key_of_name = {}
        for key, weight in self._weights.items():
            for module, name in weight.places:
                key_of_name[f"{paths[module]}.{name}"] = key
        unclear = set()
        for name, tied_name in (self.model.all_tied_weights_keys or {}).items():
            if name in key_of_name and tied_name in key_of_name:
                keys = {key_of_name[name], key_of_name[tied_name]}
                if len(keys) > 1:
                    unclear |= keys
        return unclear

    @contextmanager
    def fill_random(self, parts: Sequence[Part], device: torch.device) -> Iterator[None]:
        """Fill parts with small random numbers inside the context, as views of shared memory, without reading files."""
        weights: list[Weight] = []
        for part in parts:
            weights += part.weights
        largest: dict[torch.dtype, int] = {}
        for weight in weights:
            dtype = weight.meta.dtype
            largest[dtype] = max(largest.get(dtype, 0), weight.meta.numel())
        block = torch.randn(_RANDOM_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
        numbers_by_dtype = {}
        for dtype, size in largest.items():
            repeats = 1 + (size + _RANDOM_OFFSETS) // _RANDOM_BLOCK
            numbers_by_dtype[dtype] = block.to(dtype).repeat(repeats).to(device)
        try:
            for number, weight in enumerate(weights):
                # Equal weights would make queries equal to keys.
                start = number * _RANDOM_STEP % _RANDOM_OFFSETS
                numbers = numbers_by_dtype[weight.meta.dtype]
                values = numbers[start : start + weight.meta.numel()]
                weight.assign(values.view(weight.meta.shape))
            yield
        finally:
            for weight in weights:
                weight.assign(weight.meta)


class _Placeholder:
    """Stand-in of a tensor while transformers loads the model, which places it on the meta device.

    Attributes:
        stored: the stored tensor that it stands for; None if it is made of several.
    """

    def __init__(self, shape: Sequence[int], stored: StoredTensor | None = None) -> None:
        self.shape = torch.Size(shape)
        self.stored = stored
        self.dtype = DTYPES[stored.dtype] if stored else torch.float32
        self.placed: torch.Tensor | None = None

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _everything: object) -> _Placeholder:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.placed = torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")
        return self.placed

    def is_placed_as(self, tensor: torch.Tensor) -> bool:
        """Whether it was placed as this tensor, and not as a tensor of which that is a view of a part."""
        if self.placed is None:
            return False
        return (tensor.shape, tensor.stride()) == (self.placed.shape, self.placed.stride())


def _weights(model: nn.Module, unread: Mapping[str, _Placeholder]) -> dict[int, Weight]:
    """Return the weights of a model that are on the meta device, by id of the tensor."""
    by_storage: dict[int, _Placeholder] = {}
    for placeholder in unread.values():
        if placeholder.placed is not None:
            by_storage[placeholder.placed.untyped_storage()._cdata] = placeholder
    places: dict[torch.Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                places.setdefault(tensor, []).append((module, name))
    weights = {}
    for tensor, places_of_tensor in places.items():
        stored = None
        origin = by_storage.get(tensor.untyped_storage()._cdata)
        if origin and origin.is_placed_as(tensor):
            stored = origin.stored
        weights[id(tensor)] = Weight(tensor, tuple(places_of_tensor), stored)
    return weights
