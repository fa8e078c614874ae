"""Conversion to safetensors, in the cache, of weights that are pickles or pieces of a distributed checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from avss_dist.core.errors import AvssError, ModelError, explain_unwritable, first_line, first_names
from avss_dist.core.files import staged_folder
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.complete import missing_weights, weight_names
from avss_dist.models.checkpoint.distributed import (
    METADATA,
    ListedTensor,
    StoredPiece,
    TensorList,
    distributed_files,
    distributed_folder,
    files_beside,
    read_list,
    require_distributed,
)
from avss_dist.models.checkpoint.loading import skeleton, text_config, without_head
from avss_dist.models.checkpoint.locate import (
    CONFIGURATION,
    CONVERTED,
    PICKLED,
    PICKLED_WEIGHTS,
    VERIFIED,
    Checkpoint,
    conversion_place,
    fetch_files,
    pickled_weights,
)
from avss_dist.models.checkpoint.olmo_core import norms_are_behind, transformers_name
from avss_dist.models.checkpoint.safetensors import DTYPES, NewTensor, read_tensor, tensors_of, write_tensors
from avss_dist.models.checkpoint.weight_files import INDEX, SINGLE, WEIGHTS, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "pytorch_model.bin.index.json"
_OF_RANK = re.compile(r"_rank\d+\.bin$")
"""End of the name of a file that a rank of FSDP wrote alone."""
_PREFIXES = ("", "model.", "module.", "model.module.", "state_dict.", "app.model.")
"""Starts of the names of a model's weights in checkpoints of whole trainings."""
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Modules that FSDP, activation checkpointing and ``torch.compile`` put around others."""


def convert_pickles(spec: str, *, trust_remote_code: bool = False) -> None:
    """Convert weights to safetensors in the cache, where `resolve` finds them, unless that was done before.

    The weights are pickles, or pieces that the ranks of a training wrote, whose list is a pickle. The checkpoint's
    other files are copied along. A checkpoint that has safetensors is skipped.

    Args:
        spec: see `resolve`.
        trust_remote_code: run the Python code of a model of which the ranks wrote pieces, to learn its weights' names.

    Raises:
        ModelError: the checkpoint does not exist, or its files hold more than tensors, are damaged, or lack some.
        StorageFull: there is no space left.
    """
    folder = Path(os.path.expanduser(spec))
    if not folder.exists():
        folder = fetch_files(spec, [*CONFIGURATION, WEIGHTS]).folder
        if not weight_files(folder):
            folder = fetch_files(spec, [*CONFIGURATION, PICKLED_WEIGHTS]).folder
    if not folder.is_dir() or weight_files(folder):
        return
    place = conversion_place(folder)
    if place is None or place.is_dir():
        return
    try:
        _convert(folder, spec, place, trust_remote_code=trust_remote_code)
    except AvssError:
        if not place.is_dir():
            raise
        # Another process of this machine was faster.


def _convert(folder: Path, spec: str, place: Path, *, trust_remote_code: bool) -> None:
    """Convert the weights in a folder to a place in the cache.

    Raises:
        ModelError: the files hold more than tensors, are damaged, or lack some.
        StorageFull: there is no space left.
    """
    files = pickled_weights(folder)
    pieces = distributed_folder(folder)
    with (
        explain_unwritable(place, "Free some space, or name another cache with XDG_CACHE_HOME."),
        staged_folder(place) as staged,
    ):
        if files:
            _convert_files(folder, files, staged)
        elif pieces is not None:
            files = distributed_files(pieces)
            _convert_distributed(pieces, spec, staged, trust_remote_code=trust_remote_code)
        names = [f"{file.name}\n" for file in files]
        (staged / CONVERTED).write_text("".join(names), encoding="utf-8")


def _convert_files(folder: Path, files: Sequence[Path], target: Path) -> None:
    """Convert the pickled weights of a folder, file by file, and copy its other files.

    Raises:
        ModelError: a file holds more than tensors, is damaged, or has what one rank of a training had.
    """
    for file in files:
        if _OF_RANK.search(file.name):
            raise ModelError(
                f"{file} has what one rank of a training had of each weight, and not where that belongs.",
                "Save checkpoints with SHARDED_STATE_DICT or FULL_STATE_DICT, and without use_dcp=False.",
            )
    if len(files) == 1 and not (folder / _INDEX).is_file():
        # FSDP's file of the whole model is pytorch_model_fsdp.bin, and transformers takes one file of this name only.
        _convert_file(files[0], target / SINGLE)
    else:
        for file in files:
            _convert_file(file, target / _renamed(file.name))
    for file in folder.iterdir():
        if _is_copied(file):
            shutil.copyfile(file, target / file.name)
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {name: _renamed(file) for name, file in index["weight_map"].items()}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_copied(file: Path) -> bool:
    """Whether a file is copied beside converted weights, because it holds something else."""
    if not file.is_file() or file.name.startswith("."):
        return False
    return not any(file.match(pattern) for pattern in (*PICKLED, _INDEX, VERIFIED))


def _renamed(name: str) -> str:
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _convert_file(file: Path, target: Path) -> None:
    with _explaining_pickles(str(file)):
        tensors = _load(file, mmap=zipfile.is_zipfile(file))
        contiguous = {str(name): tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target, {"format": "pt"})


def _load(file: Path | BytesIO, *, mmap: bool = False) -> Any:
    """Load what ``torch.save`` wrote, as tensors alone."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _explaining_pickles(where: str) -> Iterator[None]:
    """Raise ModelError for the errors inside the context of a pickle that is damaged, or holds more than tensors."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{where} holds more than tensors, or is damaged; torch does not open it: {first_line(error)}",
            "Load it where you trust it, and save it with save_pretrained().",
        ) from error


def _convert_distributed(folder: Path, spec: str, target: Path, *, trust_remote_code: bool) -> None:
    """Convert the weights of a distributed checkpoint, tensor by tensor, and copy the files that belong to it.

    Raises:
        ModelError: it lacks weights of its model, or pieces of them, or is damaged.
    """
    config = require_distributed(folder, spec)
    checkpoint = Checkpoint(
        name=spec, source="folder", path=str(config.parent), revision="", trust_remote_code=trust_remote_code
    )
    settings = Settings(trust_remote_code=trust_remote_code)
    model = skeleton(text_config(checkpoint), settings, torch.float32)
    tensor_list = read_list(folder)
    sources = _find_weights(model, tensor_list, config)
    pieces = {name: tensor_list.pieces(tensor) for name, tensor in sources.items()}

    def read(name: str) -> torch.Tensor:
        return _assemble(sources[name], pieces[name])

    tensors = [NewTensor(name, _dtype(tensor, folder), tensor.shape) for name, tensor in sources.items()]
    write_tensors(target / SINGLE, tensors, read)
    for name, file in files_beside(folder).items():
        shutil.copyfile(file, target / name)


def _find_weights(model: PreTrainedModel, tensor_list: TensorList, config: Path) -> dict[str, ListedTensor]:
    """Return the tensors of a model in a distributed checkpoint, by the model's names.

    What belongs to none of the model's modules, such as the state of an optimizer, is left out. Of tied weights, the
    first is taken.

    Args:
        model: the model on the meta device.
        config: its configuration, for messages.

    Raises:
        ModelError: weights are missing, or have other shapes.
    """
    weights = model.state_dict()
    described = f"the {type(model).__name__} that {config} describes"
    prefixes = [*_PREFIXES]
    if model.base_model is model:  # Of an encoder, the head is not needed, and the training had one.
        prefixes += [f"{prefix}{model.base_model_prefix}." for prefix in _PREFIXES]
    keys = _keys_by_name(tensor_list.tensors, weights, prefixes)
    if not keys:
        raise ModelError(
            f"{tensor_list.folder} has no weight of {described}. It has {first_names(list(tensor_list.tensors))}, and "
            f"the model has {first_names(list(weights))}.",
            "Is it the config.json of this training? Weights of other libraries must be converted by those.",
        )
    missing = missing_weights(model, without_head(model), keys)
    if missing:
        raise ModelError(
            f"{tensor_list.folder / METADATA} lacks weights of {described}: {first_names(missing)}.",
            "Is it the config.json of this training, and the folder of the whole model?",
        )
    for aliases in weight_names(model):
        stored = [name for name in aliases if name in keys]
        for name in stored[1:]:
            del keys[name]
    found: dict[str, ListedTensor] = {}
    for name, key in keys.items():
        tensor = tensor_list.tensors[key]
        if name in weights and tensor.shape != tuple(weights[name].shape):
            raise ModelError(
                f"'{key}' of {tensor_list.folder / METADATA} has the shape {tensor.shape}, and '{name}' of {described} "
                f"has {tuple(weights[name].shape)}.",
                "Is it the config.json of this training?",
            )
        found[name] = tensor
    return found


def _keys_by_name(keys: Iterable[str], weights: Mapping[str, object], prefixes: Sequence[str]) -> dict[str, str]:
    """Return the keys of a distributed checkpoint that are inside of a model's modules, by the model's names.

    Args:
        weights: the model's weights by name.
        prefixes: starts of keys. The one under which most of the model's weights are found is taken.
    """
    best: dict[str, str] = {}
    best_count = 0
    norms_behind = norms_are_behind(weights)
    for prefix in prefixes:
        names: dict[str, str] = {}
        of_olmo_core: dict[str, str] = {}
        for key in keys:
            plain = _without_wrappers(key)
            if plain.startswith(prefix):
                name = plain.removeprefix(prefix)
                names[name] = key
                of_olmo_core[transformers_name(name, norms_behind=norms_behind)] = key
        for candidate in (names, of_olmo_core):
            count = len(candidate.keys() & weights.keys())
            if count > best_count:
                best = candidate
                best_count = count
    modules = {name.partition(".")[0] for name in weights}
    return {name: key for name, key in best.items() if name.partition(".")[0] in modules}


def _without_wrappers(key: str) -> str:
    """Return a name without the modules that trainings put around others."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    return ".".join(parts)


def _dtype(tensor: ListedTensor, folder: Path) -> torch.dtype:
    """Return the dtype of a tensor of a distributed checkpoint.

    Raises:
        ModelError: safetensors has no such dtype.
    """
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if dtype not in DTYPES.values():
        raise ModelError(f"'{tensor.key}' of {folder / METADATA} is of {tensor.dtype}, which safetensors do not have.")
    return dtype


def _assemble(tensor: ListedTensor, pieces: Sequence[StoredPiece]) -> torch.Tensor:
    """Return a tensor of a distributed checkpoint.

    Raises:
        ModelError: a piece is damaged.
    """
    if len(pieces) == 1:
        return _read_piece(tensor, pieces[0])
    whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    for piece in pieces:
        part = whole
        for axis, offset in enumerate(piece.offsets):
            part = part.narrow(axis, offset, piece.sizes[axis])
        part.copy_(_read_piece(tensor, piece))
    return whole


def _read_piece(tensor: ListedTensor, piece: StoredPiece) -> torch.Tensor:
    """Return a piece of a tensor.

    Raises:
        ModelError: it is damaged.
    """
    where = f"The piece {piece.offsets} of '{tensor.key}' in {piece.file}"
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    # What torch.save writes is longer than the elements. For safetensors, torch lists the bytes of the elements.
    if piece.length == piece.count * dtype.itemsize:
        value = _read_safetensors(tensor, piece)
    else:
        value = _read_saved(piece, where)
    if not isinstance(value, torch.Tensor):
        raise ModelError(f"{where} is no tensor.", "Copy the checkpoint again.")
    shape = tuple(value.shape)
    if value.dtype != dtype or shape != piece.sizes:
        raise ModelError(
            f"{where} is {value.dtype} of the shape {shape}, and its list says {dtype} of {piece.sizes}.",
            "Copy the checkpoint again: are files of two checkpoints mixed?",
        )
    return value


def _read_safetensors(tensor: ListedTensor, piece: StoredPiece) -> torch.Tensor | None:
    """Return a piece from safetensors, which newer versions of torch can write, or None if they do not have it."""
    for stored in tensors_of(piece.file, piece.start):
        if stored.name == tensor.key:
            return read_tensor(stored)
    return None


def _read_saved(piece: StoredPiece, where: str) -> Any:
    """Return what ``torch.save`` wrote of a piece.

    Raises:
        ModelError: it is damaged, or holds more than a tensor.
    """
    try:
        with piece.file.open("rb") as file:
            file.seek(piece.start)
            data = file.read(piece.length)
    except OSError as error:
        raise ModelError(f"{piece.file} cannot be read: {error.strerror}.", "Does it still exist?") from error
    with _explaining_pickles(where):
        return _load(BytesIO(data))
