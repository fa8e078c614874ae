"""Conversion of pickled weights, opened by torch as tensors alone, to safetensors in the cache."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from avss_dist.core.errors import ModelError, first_line, unwritable
from avss_dist.models.content import content_hash
from avss_dist.models.safetensors import INDEX
from avss_dist.system.files import cache_folder, staged_folder

WEIGHTS = "pytorch_model*.bin"  # what transformers calls them; others hold optimizers and arguments
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "pytorch_model.bin.index.json"
_NOTE = "converted_from_pickles"


def pickled_weights(folder: Path) -> list[Path]:
    """Return the files of pickled weights in a folder, sorted."""
    return sorted(file for file in folder.glob(WEIGHTS) if file.is_file())


def converted_folder(folder: Path) -> Path | None:
    """Return the cache folder of a folder's converted weights, by content, or None if they were not converted yet.

    Raises:
        ModelError: a file cannot be read.
    """
    if not (files := pickled_weights(folder)):
        return None
    place = _place(folder, files)
    return place if place.is_dir() else None


def is_converted(folder: Path) -> bool:
    """Whether `convert` wrote a folder."""
    return (folder / _NOTE).is_file()


def convert(folder: Path) -> None:
    """Convert the pickled weights of a folder to safetensors in the cache, unless that was done before.

    The folder's other files are copied along.

    Raises:
        ModelError: a file holds more than tensors, or is damaged; the message says which.
        StorageFull: there is no space left.
    """
    if not (files := pickled_weights(folder)) or converted_folder(folder):
        return
    place = _place(folder, files)
    try:
        with staged_folder(place) as staged:
            for file in files:
                _convert_file(file, staged / _renamed(file.name))
            _copy_others(folder, staged)
            (staged / _NOTE).write_text("\n".join(file.name for file in files) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(place, error, "Free some space, or name another cache with XDG_CACHE_HOME.") from error


def _place(folder: Path, files: list[Path]) -> Path:
    beside = [file for file in folder.iterdir() if file.suffix in (".json", ".model", ".txt", ".py") and file.is_file()]
    return cache_folder("converted", content_hash(folder, [*files, *beside]))


def _renamed(name: str) -> str:
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _convert_file(file: Path, target: Path) -> None:
    from safetensors.torch import save_file

    try:
        tensors: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{file} holds more than tensors, or is damaged; torch does not open it: {first_line(error)}",
            "Load it where you trust it, and save it with save_pretrained().",
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelError(f"{file} is no table of tensors.", "Name the folder of a model that save_pretrained() wrote.")
    save_file({str(name): tensor.clone().contiguous() for name, tensor in tensors.items()}, target, {"format": "pt"})


def _copy_others(folder: Path, staged: Path) -> None:
    """Copy all files but pickles, and the index with the new names of the weight files."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(".") and not any(file.match(p) for p in (*PICKLED, _INDEX)):
            shutil.copyfile(file, staged / file.name)
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {name: _renamed(file) for name, file in index["weight_map"].items()}
        (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
