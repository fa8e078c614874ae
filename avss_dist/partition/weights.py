"""A model whose weights stay in the checkpoint's files, and on the meta device, until a part of them is brought.

transformers builds the model and says what goes where: it is given tensors with a name, a shape and a dtype, and no
numbers. What it only renamed is read straight into its place. What it rearranged (experts that it fuses, say) goes
through its own conversion, with the tensors of one part.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avss_dist.checkpoints import Checkpoint
from avss_dist.config import Settings
from avss_dist.errors import ModelError
from avss_dist.footprint import read_header, weight_files
from avss_dist.models import load_model, quiet, text_config

ALIGNMENT = 64  # of what torch allocates
NOISE_SCALE = 0.02
_NOISE_BLOCK = 1 << 20
_ELSEWHERE = "Use --partition device_map, which has transformers load the whole model."
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: ``size`` bytes from ``start`` on."""

    name: str
    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer: its shape and dtype, the (module, name) of every place, and what it is in the files.

    ``stored`` is None where transformers makes it of other tensors.
    """

    meta: torch.Tensor
    places: tuple[tuple[nn.Module, str], ...]
    stored: Stored | None

    def put(self, tensor: torch.Tensor) -> None:
        """Set the same tensor in every place."""
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        for module, name in self.places:
            if name in module._buffers:
                module._buffers[name] = tensor
            else:
                module._parameters[name] = parameter

    def drop(self) -> None:
        """Leave shape and dtype in its places, and no numbers."""
        self.put(self.meta)

    def now(self) -> torch.Tensor:
        """What its places hold: numbers, if one of them has any."""
        held = [module._buffers.get(name, module._parameters.get(name)) for module, name in self.places]
        return next((tensor for tensor in held if tensor is not None and not tensor.is_meta), self.meta)


@dataclass(frozen=True)
class Part:
    """Weights that come and go together; ``sources`` are the stored tensors that transformers makes some of them of."""

    weights: tuple[Weight, ...]
    sources: tuple[Stored, ...]

    @property
    def stored(self) -> tuple[Stored, ...]:
        """Everything that is read."""
        return (*(weight.stored for weight in self.weights if weight.stored), *self.sources)


class Shelf:
    """Memory to read stored tensors into, one after the other.

    A tensor lies as it does in its file, to the residue of its address: kernels then see what they see of a mapped one.
    """

    def __init__(self, stored: Iterable[Stored], *, pinned: bool = False) -> None:
        size = sum(tensor.size + ALIGNMENT for tensor in stored)
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._used = 0

    def clear(self) -> None:
        """Start again; what was taken will be overwritten."""
        self._used = 0

    def take(self, stored: Stored) -> torch.Tensor:
        """uint8[size]."""
        residue = stored.start % ALIGNMENT if stored.start % stored.dtype.itemsize == 0 else 0
        begin = self._used + (residue - self.memory.data_ptr() - self._used) % ALIGNMENT
        self._used = begin + stored.size
        return self.memory[begin : self._used]

    def holds(self, part: Part) -> bool:
        """Whether weights of a part lie here."""
        mine = self.memory.untyped_storage().data_ptr()
        return any(weight.now().untyped_storage().data_ptr() == mine for weight in part.weights)


class _Unread:
    """A stored tensor as transformers sees it while it loads: wherever it is to go, it is on the meta device."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.dtype = stored.dtype
        self.shape = torch.Size(stored.shape)
        self.placed: torch.Tensor | None = None

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _everything: Any) -> _Unread:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.placed = torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")
        return self.placed

    def is_whole(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that shares its storage is all of it, as it lies."""
        placed = self.placed
        return placed is not None and (tensor.shape, tensor.stride()) == (placed.shape, placed.stride())


class Weights:
    """A checkpoint's weights.

    Attributes:
        model: the transformers model, head and all. What the checkpoint has is on the meta device at first; what it
            lacks is initialized, on the CPU.
        bytes_read: of weights, so far.

    Raises:
        ModelError: the weights cannot be read part by part; the message says why.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        _refuse(checkpoint, settings)
        unread = [_Unread(stored) for stored in _stored(checkpoint.folder)]
        self.model = load_model(checkpoint, settings, state_dict={entry.stored.name: entry for entry in unread})
        self.bytes_read = 0
        self._weights = _weights(self.model, unread)
        taken = {weight.stored for weight in self._weights.values()}
        self._made = _Made(self.model, [entry.stored for entry in unread if entry.stored not in taken])

    def split(self, layers: Sequence[nn.Module], backbone: nn.Module) -> tuple[list[Part], Part]:
        """A part for each layer, and one for all else that the backbone needs, tensors that layers share included.

        Raises:
            ModelError: it cannot be told which stored tensors a weight is made of.
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
        rest = (needed | self._unclear_ties()).difference(*parts)
        return [self._part(keys) for keys in parts], self._part(rest)

    def _part(self, keys: set[int]) -> Part:
        weights = tuple(self._weights[key] for key in self._weights if key in keys)
        made = [weight for weight in weights if weight.stored is None]
        return Part(weights, self._made.sources(keys) if made else ())

    def bring(self, part: Part, device: torch.device, shelf: Shelf | None = None) -> None:
        """Read a part's weights and set them in the model, on a device.

        Args:
            shelf: read into this; weights that are computed with as they are stored then lie there.

        Raises:
            ModelError: a file has changed, or transformers does not make of its tensors what it made before.
        """
        for weight in part.weights:
            if weight.stored:
                tensor = self._read(weight.stored, shelf)
                weight.put(tensor.to(device, weight.meta.dtype, non_blocking=tensor.is_pinned()))
        if part.sources:
            self._made.make({stored.name: self._read(stored, shelf) for stored in part.sources})
        for weight in part.weights:
            if not weight.stored:
                weight.put(_require_numbers(weight).detach().to(device))

    def bring_ties(self, backbone: nn.Module) -> None:
        """Tie what the configuration ties and the files hold twice, if it is equal; nothing above the backbone stays."""
        unclear = self._unclear_ties()
        if not unclear:
            return
        self.model.tie_weights(missing_keys=set(), recompute_mapping=False)
        used = {id(tensor) for tensor in backbone.parameters()}
        for key in unclear:
            if id(self._weights[key].now()) not in used:
                self._weights[key].drop()

    def _unclear_ties(self) -> set[int]:
        """Weights that the configuration ties to others, and that are tensors of their own in the files."""
        names = {f"{path}.{name}": key for key, w in self._weights.items() for path, name in _paths(self.model, w)}
        pairs = [(names.get(a), names.get(b)) for a, b in (self.model.all_tied_weights_keys or {}).items()]
        return {key for a, b in pairs if a is not None and b is not None and a != b for key in (a, b)}

    def _read(self, stored: Stored, shelf: Shelf | None) -> torch.Tensor:
        room = (shelf or Shelf([stored])).take(stored)
        rest, at = memoryview(room.numpy()), stored.start
        with stored.file.open("rb", buffering=0) as file:
            while rest:
                count = os.preadv(file.fileno(), [rest], at)
                if not count:
                    raise ModelError(f"{stored.file} ends before its tensor {stored.name} does.", "Copy it again.")
                rest, at = rest[count:], at + count
        self.bytes_read += stored.size
        return room.view(stored.dtype).view(stored.shape)

    @contextmanager
    def noise(self, parts: Sequence[Part], device: torch.device) -> Iterator[None]:
        """Fill parts with small random numbers, the same few in every weight; nothing is read, and none is left."""
        weights = [weight for part in parts for weight in part.weights]
        sizes: Counter[torch.dtype] = Counter()
        for weight in weights:
            sizes[weight.meta.dtype] = max(sizes[weight.meta.dtype], weight.meta.numel())
        noise = {dtype: _noise(size, dtype).to(device) for dtype, size in sizes.items()}
        try:
            for weight in weights:
                weight.put(noise[weight.meta.dtype][: weight.meta.numel()].view(weight.meta.shape))
            yield
        finally:
            for weight in weights:
                weight.drop()


class _Made:
    """The weights that transformers makes of several stored tensors, through its own conversion.

    Args:
        stored: tensors of the files that are no weight as they are. Some of them may be of no use.
    """

    def __init__(self, model: Any, stored: Sequence[Stored]) -> None:
        self._model = model
        self._stored = stored
        self._targets: dict[str, int] | None = None
        self._mapping: list[Any] = []

    def sources(self, keys: set[int]) -> tuple[Stored, ...]:
        """The stored tensors that weights are made of.

        Raises:
            ModelError: there are none.
        """
        if self._targets is None:
            with _refusing(self._model):
                self._targets = dict(self._match())
        found = tuple(stored for stored in self._stored if self._targets.get(stored.name) in keys)
        if not found:
            raise _unknown_layout(self._model, "its files have other tensors than its layers")
        return found

    def _match(self) -> Iterator[tuple[str, int]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = self._model.state_dict(keep_vars=True)
        for name in sorted(stored.name for stored in self._stored):
            renamed, _ = rename_source_key(name, renamings, converters, self._model.base_model_prefix, state)
            target = state.get(renamed, state.get(name))
            if target is not None:
                yield name, id(target)

    def make(self, tensors: dict[str, torch.Tensor]) -> None:
        """Make weights of the tensors that `sources` named and set them in the model, on the CPU.

        Raises:
            ModelError: transformers refuses.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(dtype=self._model.dtype, weight_mapping=self._mapping)
        with _refusing(self._model), quiet():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, options)
        wrong = [*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)]
        if wrong:
            raise _unknown_layout(self._model, f"{wrong[0]} cannot be made of one layer's tensors")


@contextmanager
def _refusing(model: Any) -> Iterator[None]:
    try:
        yield
    except (ImportError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise _unknown_layout(model, f"this version of transformers converts them in another way ({error})") from error


def _unknown_layout(model: Any, why: str) -> ModelError:
    return ModelError(f"The weights of {type(model).__name__} cannot be read layer by layer: {why}.", _ELSEWHERE)


def _require_numbers(weight: Weight) -> torch.Tensor:
    tensor = weight.now()
    if tensor.is_meta:
        module, name = weight.places[0]
        raise ModelError(
            f"The weights cannot be read layer by layer: '{name}' of {type(module).__name__} is not made of its layer's "
            "tensors alone.",
            _ELSEWHERE,
        )
    return tensor


def _refuse(checkpoint: Checkpoint, settings: Settings) -> None:
    if checkpoint.gguf:
        raise ModelError(
            f"'{checkpoint.name}' is a .gguf file, whose weights cannot be read layer by layer.",
            "Use --partition device_map, or save it as safetensors.",
        )
    if getattr(text_config(checkpoint, trust_remote_code=settings.trust_remote_code), "quantization_config", None):
        raise ModelError(
            f"'{checkpoint.name}' is quantized; quantized weights cannot be read layer by layer.", _ELSEWHERE
        )


def _stored(folder: Path) -> Iterator[Stored]:
    for file in weight_files(folder):
        header, data = read_header(file)
        for name, tensor in header.items():
            first, last = tensor["data_offsets"]
            if tensor["dtype"] not in _DTYPES:
                raise ModelError(
                    f"{file} holds '{name}' as {tensor['dtype']}, which cannot be read layer by layer.", _ELSEWHERE
                )
            yield Stored(name, file, data + first, last - first, _DTYPES[tensor["dtype"]], tuple(tensor["shape"]))


def _weights(model: nn.Module, unread: Iterable[_Unread]) -> dict[int, Weight]:
    """Everything in a model that is on the meta device, by id."""
    by_storage = {entry.placed.untyped_storage()._cdata: entry for entry in unread if entry.placed is not None}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_meta:
                places.setdefault(id(tensor), []).append((module, name))
                tensors[id(tensor)] = tensor
    found = {}
    for key, tensor in tensors.items():
        entry = by_storage.get(tensor.untyped_storage()._cdata)
        stored = entry.stored if entry and entry.is_whole(tensor) else None
        found[key] = Weight(tensor, tuple(places[key]), stored)
    return found


def _paths(model: nn.Module, weight: Weight) -> Iterator[tuple[str, str]]:
    """(module path, name) of each place."""
    paths = {module: path for path, module in model.named_modules()}
    return ((paths[module], name) for module, name in weight.places)


def _noise(size: int, dtype: torch.dtype) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype)
    block = torch.randn(min(size, _NOISE_BLOCK), generator=torch.Generator().manual_seed(0)) * NOISE_SCALE
    return block.to(dtype).repeat(-(-size // max(1, len(block))))[:size]
