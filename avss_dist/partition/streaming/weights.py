"""A model on the meta device whose weights stay in the checkpoint's files until a part of them is loaded.

transformers builds the model from tensors that have a name, a shape and a dtype, but no data, which shows where each
stored tensor goes. Renamed tensors are read straight into place. Rearranged ones, such as fused experts, and quantized
ones go through transformers' own conversion, one weight at a time. Stored tensors are copied into memory, or mapped
from the page cache.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, starmap
from typing import Any

import numpy as np
import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.memory import populate
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import build_model, text_config
from avss_dist.models.quantization import quantization_method, ready_quantizer, unpacking_bytes
from avss_dist.models.safetensors import DTYPES, StoredTensor, explaining_reads, tensors_of
from avss_dist.models.weight_files import weight_files
from avss_dist.partition.streaming.conversion import ELSEWHERE, Conversion, GgufTensors, Group, refusing

Read = Callable[[Sequence[StoredTensor]], Iterator[torch.Tensor]]
"""Function that yields stored tensors in memory: `copied`, `mapped`, or `copied_into` a buffer."""
_TENSOR_ALIGNMENT = 64  # bytes, of torch's allocations
_READERS = 4  # threads: one alone does not saturate the memory bandwidth
_PIECE = 8 << 20  # bytes that a thread reads at a time
_RANDOM_BLOCK, _RANDOM_OFFSETS, _RANDOM_STEP = 1 << 20, 1 << 16, 997


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
    parts, used = [], 0
    for source in stored:
        residue = source.start % _TENSOR_ALIGNMENT if source.start % DTYPES[source.dtype].itemsize == 0 else 0
        begin = used + (residue - buffer.data_ptr() - used) % _TENSOR_ALIGNMENT
        used = begin + source.size
        parts.append(buffer[begin:used])
    with ThreadPoolExecutor(_READERS, thread_name_prefix="avss-readers") as threads:
        reads = [
            [threads.submit(_fill, source, piece, i * _PIECE) for i, piece in enumerate(part.split(_PIECE))]
            for source, part in zip(stored, parts, strict=True)
        ]
        for source, part, pieces in zip(stored, parts, reads, strict=True):
            with explaining_reads(source):
                for piece in pieces:
                    piece.result()
            yield part.view(DTYPES[source.dtype]).view(source.shape)


def _fill(stored: StoredTensor, piece: torch.Tensor, at: int) -> None:
    """Read a piece of a tensor, from offset ``at`` in it, into memory, uint8[size]."""
    with stored.file.open("rb") as file:
        file.seek(stored.start + at)
        if file.readinto(piece.numpy().data) < len(piece):
            raise EOFError


def copied(stored: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """Copy stored tensors into memory of their own, one after the other. See `copied_into`."""
    buffers = ((torch.empty(buffer_bytes([tensor]), dtype=torch.uint8), [tensor]) for tensor in stored)
    return chain.from_iterable(starmap(copied_into, buffers))


def mapped(stored: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """Map stored tensors for a CPU, one after the other, and read each into memory without holding the GIL.

    Writes to a tensor stay in this process. It is mapped as long as something refers to it.

    Raises:
        ModelError: a file is gone, or ends before its tensor does.
    """
    for source in stored:
        with explaining_reads(source):
            # Copy on write. A shorter file is a ValueError.
            tensor = torch.from_numpy(np.memmap(str(source.file), np.uint8, "c", source.start, (source.size,)))
            populate(tensor.data_ptr(), source.size)
        aligned = tensor.clone() if source.start % DTYPES[source.dtype].itemsize else tensor
        yield aligned.view(DTYPES[source.dtype]).view(source.shape)


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
        # As `single` has it: by weights that want no gradient, torch multiplies in another way.
        wants = self.meta.requires_grad if isinstance(self.meta, nn.Parameter) else tensor.is_floating_point()
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=wants)
        for module, name in self.places:
            if name in module._buffers:
                module._buffers[name] = tensor
            else:
                module._parameters[name] = parameter

    def current(self) -> torch.Tensor:
        """Return the tensor in its places: the loaded one if there is one, else the meta tensor."""
        tensors = [module._buffers.get(name, module._parameters.get(name)) for module, name in self.places]
        return next((tensor for tensor in tensors if tensor is not None and not tensor.is_meta), self.meta)


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
        return (*self.unchanged, *chain.from_iterable(self.groups))

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
        tensors = [tensor for file in weight_files(checkpoint.folder) for tensor in tensors_of(file)]
        if wrong := next((tensor for tensor in tensors if tensor.dtype not in DTYPES), None):
            raise ModelError(
                f"{wrong.file} holds '{wrong.name}' as {wrong.dtype}, which cannot be read layer by layer.", ELSEWHERE
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

        def stand_ins(empty: Any) -> Mapping[str, _Placeholder]:
            with refusing(f"The weights of '{checkpoint.name}'"):
                file.find_names(empty)
            targets = set(file.names.values())
            return {name: _Placeholder(tensor.shape) for name, tensor in empty.state_dict().items() if name in targets}

        self.model = build_model(checkpoint, settings, stand_ins, head=head)
        self.unpacks = True
        self._weights = _weights(self.model, {})
        with refusing(f"The weights of '{checkpoint.name}'"):
            quantizer = file.quantizer(self.model)
        older: dict[str, Any] = {} if quantizer else {"names": file.names, "unpack": file.unpack}
        self._conversion = Conversion(self.model, file.stored, quantizer, **older)

    @property
    def unpacks_on_cpu(self) -> bool:
        """Whether quantized tensors are unpacked on the CPU, on whatever device the model computes."""
        return self._conversion.unpack is not None

    def unpacking_bytes(self, parts: Sequence[Part]) -> int:
        """Return the most bytes of memory that unpacking a weight of these parts takes beside their weights."""
        weights = (weight for part in parts for weight in part.weights if not weight.stored)
        return max((unpacking_bytes(weight.meta) for weight in weights), default=0) if self.unpacks else 0

    def split(self, layers: Sequence[nn.Module], backbone: nn.Module) -> tuple[list[Part], Part]:
        """Return a part for each layer, and one for the other weights of the backbone and those that layers share.

        Raises:
            ModelError: the stored tensors of a converted weight are unknown.
        """
        inside = [set(layer.modules()) for layer in layers]
        uses = Counter(module for modules in inside for module in modules)
        parts = [
            {
                key
                for key, weight in self._weights.items()
                if all(module in modules and uses[module] == 1 for module, _ in weight.places)
            }
            for modules in inside
        ]
        below = set(backbone.modules())
        needed = {key for key, w in self._weights.items() if any(module in below for module, _ in w.places)}
        remaining = (needed | self._unclear_ties()).difference(*parts)
        return [self._part(keys) for keys in parts], self._part(remaining)

    def _part(self, keys: set[int]) -> Part:
        weights = tuple(weight for key, weight in self._weights.items() if key in keys)
        is_converted = any(weight.stored is None for weight in weights)
        return Part(weights, self._conversion.groups(keys) if is_converted else ())

    def load(self, part: Part, device: torch.device, read: Read = copied) -> None:
        """Read a part's weights and set them in the model, on a device.

        Raises:
            ModelError: a file has changed, or transformers cannot convert its tensors.
        """
        self.bytes_read += sum(tensor.size for tensor in part.stored)
        tensors = read(part.stored)
        for weight in [weight for weight in part.weights if weight.stored]:
            weight.assign(next(tensors).to(device, non_blocking=True).to(weight.meta.dtype))  # converted there
        for group in part.groups:
            self._conversion.convert({stored.name: next(tensors) for stored in group}, device)
        for weight in [weight for weight in part.weights if not weight.stored]:
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
        keys = {f"{paths[m]}.{name}": key for key, weight in self._weights.items() for m, name in weight.places}
        pairs = [(keys.get(a), keys.get(b)) for a, b in (self.model.all_tied_weights_keys or {}).items()]
        return {key for a, b in pairs if a is not None and b is not None and a != b for key in (a, b)}

    @contextmanager
    def fill_random(self, parts: Sequence[Part], device: torch.device) -> Iterator[None]:
        """Fill parts with small random numbers inside the context, as views of shared memory, without reading files."""
        weights = [weight for part in parts for weight in part.weights]
        largest = {meta.dtype: meta for meta in sorted((weight.meta for weight in weights), key=torch.Tensor.numel)}
        block = torch.randn(_RANDOM_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
        numbers = {
            dtype: block.to(dtype).repeat(1 + (meta.numel() + _RANDOM_OFFSETS) // _RANDOM_BLOCK).to(device)
            for dtype, meta in largest.items()
        }
        try:
            for i, weight in enumerate(weights):
                start = i * _RANDOM_STEP % _RANDOM_OFFSETS  # equal weights would make queries equal to keys
                part = numbers[weight.meta.dtype][start : start + weight.meta.numel()]
                weight.assign(part.view(weight.meta.shape))
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
        self.shape, self.stored = torch.Size(shape), stored
        self.dtype = DTYPES[stored.dtype] if stored else torch.float32
        self.placed: torch.Tensor | None = None

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _everything: Any) -> _Placeholder:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.placed = torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")
        return self.placed


def _weights(model: nn.Module, unread: Mapping[str, _Placeholder]) -> dict[int, Weight]:
    """Return the weights of a model that are on the meta device, by id of the tensor."""
    placed = {e.placed.untyped_storage()._cdata: (e.placed, e.stored) for e in unread.values() if e.placed is not None}
    places: dict[torch.Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                places.setdefault(tensor, []).append((module, name))
    weights = {}
    for tensor, where in places.items():
        whole, stored = placed.get(tensor.untyped_storage()._cdata, (tensor, None))
        is_whole = (tensor.shape, tensor.stride()) == (whole.shape, whole.stride())  # not a view of a part
        weights[id(tensor)] = Weight(tensor, tuple(where), stored if is_whole else None)
    return weights
