"""Folders of ``torch.distributed.checkpoint``: found, and their lists of tensors read, without torch.

Ranks of a training write pieces of tensors into ``.distcp`` files. The file ``.metadata``, which is written last, lists
the tensors and says where their pieces are. It is a pickle, and torch opens it with ``pickle.load``. This module opens
it with an unpickler that knows the few classes of such lists, and makes objects of its own of them, which do nothing.
"""

from __future__ import annotations

import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Never

from avss_dist.core.errors import ModelError, first_line

METADATA = ".metadata"
PIECES = "*.distcp"
FOLDERS = ("pytorch_model_fsdp_0", "model_and_optim")
"""Names of the folder inside of a checkpoint's folder: those of Accelerate and the Trainer, and of OLMo-core."""
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.py",
)
"""Patterns of the files that are looked for in and above such a folder. Others there change as the training goes on."""
_DTYPES = frozenset(
    {
        *("float64", "float32", "float16", "bfloat16"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2", "complex64", "complex128"),
    }
)
"""Names of dtypes in torch."""


def distributed_folder(folder: Path) -> Path | None:
    """Return the folder of a distributed checkpoint: the folder itself, or the one of a usual name inside of it."""
    if _has_pieces(folder):
        return folder
    for name in FOLDERS:
        if _has_pieces(folder / name):
            return folder / name
    return None


def _has_pieces(folder: Path) -> bool:
    return (folder / METADATA).is_file() or any(folder.glob(PIECES))


def is_written(folder: Path) -> bool:
    """Whether a distributed checkpoint is whole. Its list gets its name after all pieces have been written."""
    return (folder / METADATA).is_file()


def checkpoint_folder(folder: Path) -> Path:
    """Return the folder of the checkpoint, by whose name it is known, that a distributed checkpoint belongs to."""
    if folder.name in FOLDERS:
        return folder.parent
    return folder


def distributed_files(folder: Path) -> list[Path]:
    """Return the files of a distributed checkpoint."""
    return sorted([folder / METADATA, *folder.glob(PIECES)])


def files_beside(folder: Path) -> dict[str, Path]:
    """Return the files of the configuration and the tokenizer of a distributed checkpoint, by name.

    They are looked for in its folder, the folder of the checkpoint, and the one above. The nearest one is taken.
    """
    places = [folder, checkpoint_folder(folder), checkpoint_folder(folder).parent]
    files: dict[str, Path] = {}
    for place in places:
        for pattern in _BESIDE:
            for file in sorted(place.glob(pattern)):
                if file.name not in files and file.is_file() and _is_usable(file):
                    files[file.name] = file
    return files


def _is_usable(file: Path) -> bool:
    """Whether a file is not the configuration of a training, which OLMo-core calls ``config.json``, too."""
    if file.name != "config.json":
        return True
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # It is refused where it is read.
    return not isinstance(config, dict) or "model_type" in config


def require_distributed(folder: Path, spec: str) -> Path:
    """Return the ``config.json`` of a distributed checkpoint.

    Raises:
        ModelError: the checkpoint is not whole, or has no configuration.
    """
    if not is_written(folder):
        raise ModelError(
            f"'{spec}' has pieces of a distributed checkpoint, and no list of them, {folder / METADATA}.",
            "The list is written last. Does the training still write it? Otherwise it ended in the middle of it.",
        )
    config = files_beside(folder).get("config.json")
    if config is None:
        raise ModelError(
            f"'{spec}' is a distributed checkpoint without the config.json of a model in {folder} or above it.",
            f"Copy config.json and the tokenizer's files of its base model into {folder}.",
        )
    return config


@dataclass(frozen=True)
class Chunk:
    """Part of a tensor: its offset and its size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def overlaps(self, other: Chunk) -> bool:
        """Whether two parts of one tensor have an element in common."""
        for axis, offset in enumerate(self.offsets):
            if offset >= other.offsets[axis] + other.sizes[axis]:
                return False
            if other.offsets[axis] >= offset + self.sizes[axis]:
                return False
        return True


@dataclass(frozen=True)
class StoredPiece(Chunk):
    """Part of a tensor that a file has, in ``length`` bytes from ``start``."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class ListedTensor:
    """Tensor of a distributed checkpoint: its name there, its dtype's name in torch, its shape, and its parts."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class _Place:
    """Place of a part of a tensor. ``is_transformed`` tells that an extension has compressed the bytes, say."""

    file: str
    start: int
    length: int
    is_transformed: bool


class TensorList:
    """The list of the tensors of a distributed checkpoint.

    Attributes:
        folder: its folder.
        tensors: the tensors by their names there. Optimizers have theirs among them.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, ListedTensor],
        places: Mapping[tuple[str, tuple[int, ...]], _Place],
    ) -> None:
        self.folder = folder
        self.tensors = tensors
        self._places = places

    def pieces(self, tensor: ListedTensor) -> list[StoredPiece]:
        """Return the parts of a tensor that have elements, by their offsets.

        Raises:
            ModelError: parts are missing, overlap, or reach over the tensor; their files are not there, or too short.
        """
        chunks = [chunk for chunk in tensor.chunks if chunk.count]
        chunks.sort(key=lambda chunk: chunk.offsets)
        self._require_cover(tensor, chunks)
        return [self._stored(tensor, chunk) for chunk in chunks]

    def _require_cover(self, tensor: ListedTensor, chunks: Sequence[Chunk]) -> None:
        """Refuse parts, sorted by offsets, that are not all of a tensor, each element once."""
        where = f"'{tensor.key}' of {self.folder / METADATA}"
        for chunk in chunks:
            if len(chunk.offsets) != len(tensor.shape) or len(chunk.sizes) != len(tensor.shape):
                raise _damaged(f"{where} has the shape {tensor.shape}, and a piece of another number of dimensions.")
            for axis, size in enumerate(tensor.shape):
                if chunk.offsets[axis] + chunk.sizes[axis] > size:
                    raise _damaged(f"{where} has the shape {tensor.shape}, and a piece of {chunk.sizes} beyond it.")
        for index, chunk in enumerate(chunks):
            for later in chunks[index + 1 :]:
                # Trainings divide tensors by rows, so that the next piece begins behind this one.
                if chunk.offsets and later.offsets[0] >= chunk.offsets[0] + chunk.sizes[0]:
                    break
                if chunk.overlaps(later):
                    raise _damaged(f"{where} has pieces that overlap, at {chunk.offsets} and {later.offsets}.")
        covered = sum(chunk.count for chunk in chunks)
        if covered != math.prod(tensor.shape):
            raise _damaged(
                f"{where} has the shape {tensor.shape}, and pieces of {covered:,} of its "
                f"{math.prod(tensor.shape):,} elements."
            )

    def _stored(self, tensor: ListedTensor, chunk: Chunk) -> StoredPiece:
        """Return a part of a tensor with its place in a file.

        Raises:
            ModelError: the list has no place of it, or its file is not there, or too short.
        """
        place = self._places.get((tensor.key, chunk.offsets))
        if place is None:
            raise _damaged(f"{self.folder / METADATA} has no place of the piece {chunk.offsets} of '{tensor.key}'.")
        if place.is_transformed:
            raise ModelError(
                f"'{tensor.key}' of {self.folder} was written through an extension of torch.distributed.checkpoint.",
                "Save the checkpoint without extensions.",
            )
        name = PurePosixPath(place.file)
        if name.is_absolute() or ".." in name.parts:
            raise ModelError(
                f"{self.folder / METADATA} names the file '{place.file}', which is outside of its folder.",
                "Put all pieces into the folder.",
            )
        file = self.folder / name
        if not file.is_file():
            raise ModelError(
                f"{self.folder} lacks the file {place.file}, with a piece of '{tensor.key}'.", "Is the copy complete?"
            )
        if file.stat().st_size < place.start + place.length:
            raise ModelError(f"{file} ends before its piece of '{tensor.key}' does.", "Copy it again.")
        return StoredPiece(chunk.offsets, chunk.sizes, file, place.start, place.length)


def read_list(folder: Path) -> TensorList:
    """Return the list of the tensors of a distributed checkpoint.

    Raises:
        ModelError: the list cannot be read, or names anything but classes of such lists.
    """
    file = folder / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
        tensors = _tensors(metadata)
        places = _places(metadata)
    except _NotInLists as error:
        raise ModelError(
            f"{file} is refused: it names {error}, which no list of tensors needs. Nothing of it was run.",
            "Load it with torch where you trust it, and save the model with save_pretrained().",
        ) from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from error
    except _DAMAGE as error:
        reason = first_line(error).removesuffix(".")
        raise _damaged(
            f"{file} is no list of the tensors of a distributed checkpoint, or damaged: {reason}."
        ) from error
    return TensorList(folder, tensors, places)


def _damaged(message: str) -> ModelError:
    return ModelError(message, "Copy the checkpoint again, or take another one of the training.")


class _NotInLists(pickle.UnpicklingError):
    """A pickle names something that is not in lists of tensors."""


_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,  # A damaged number may ask for any amount of memory.
    RecursionError,
)
"""Errors that a damaged pickle raises."""


class _Record:
    """Object of a list, of whatever class it was: its state, and nothing that acts.

    Attributes:
        state: the fields by name, or a tuple of them.
    """

    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        # Without it, a pickle could set the attributes of this class.
        self.state = state


class _Tensor(_Record):
    """``TensorStorageMetadata``: ``properties``, ``size`` and ``chunks``."""


_DCP = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_CLASSES: Mapping[tuple[str, str], type] = {
    (_DCP, "TensorStorageMetadata"): _Tensor,
    (_DCP, "Metadata"): _Record,
    (_DCP, "ChunkStorageMetadata"): _Record,
    (_DCP, "BytesStorageMetadata"): _Record,
    (_DCP, "MetadataIndex"): _Record,
    (_DCP, "StorageMeta"): _Record,
    (_DCP, "TensorProperties"): _Record,
    (_DCP, "_MEM_FORMAT_ENCODING"): _Record,
    (_DCP, "MEM_FORMAT_ENCODING"): _Record,
    (_SHARDED, "TensorProperties"): _Record,  # torch 2.2 and before
    (_SHARDED, "MEM_FORMAT_ENCODING"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("builtins", "getattr"): _Record,  # Early versions of Python 3.11 write members of enumerations by it.
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "WindowsPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,  # Python 3.13
    ("pathlib._local", "WindowsPath"): _Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
}
"""Classes and functions that lists name, and what takes their places."""


class _Unpickler(pickle.Unpickler):
    """Unpickler of lists of tensors, which makes records, tuples, dictionaries, numbers and texts alone."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what takes the place of a class, or the name of a dtype.

        Raises:
            _NotInLists: lists of tensors have no such class.
        """
        if module == "torch" and name in _DTYPES:
            return name
        replacement = _CLASSES.get((module, name))
        if replacement is None:
            raise _NotInLists(f"{module}.{name}")
        return replacement

    def persistent_load(self, pid: Any) -> Never:
        """Refuse objects that are stored elsewhere."""
        raise _NotInLists(f"the object {pid!r} outside of it")


def _tensors(metadata: Any) -> dict[str, ListedTensor]:
    """Return the tensors of an unpickled list. Objects that are no tensors are left out."""
    tensors: dict[str, ListedTensor] = {}
    for key, entry in metadata.state["state_dict_metadata"].items():
        if not isinstance(entry, _Tensor):
            continue
        chunks = []
        for chunk in entry.state["chunks"]:
            chunks.append(Chunk(_numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])))
        dtype = entry.state["properties"].state[0]
        if dtype not in _DTYPES:
            raise ValueError(f"'{key}' has no dtype")
        tensors[str(key)] = ListedTensor(str(key), dtype, _numbers(entry.state["size"]), tuple(chunks))
    return tensors


def _places(metadata: Any) -> dict[tuple[str, tuple[int, ...]], _Place]:
    """Return the places of an unpickled list, by the names of tensors and the offsets of their parts."""
    places: dict[tuple[str, tuple[int, ...]], _Place] = {}
    for index, info in metadata.state["storage_data"].items():
        offset = index.state.get("offset")
        if offset is None:  # It is of an object that is no tensor.
            continue
        file = info.state["relative_path"]
        if not isinstance(file, str):
            raise TypeError("the name of a file is no text")
        start, length = _numbers((info.state["offset"], info.state["length"]))
        is_transformed = bool(info.state.get("transform_descriptors"))
        places[str(index.state["fqn"]), _numbers(offset)] = _Place(file, start, length, is_transformed)
    return places


def _numbers(values: Any) -> tuple[int, ...]:
    """Return offsets or sizes.

    Raises:
        ValueError: they are no whole numbers from 0.
    """
    numbers = tuple(values)
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{numbers} are no sizes")
    return numbers
