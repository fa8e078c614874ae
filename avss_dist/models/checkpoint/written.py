"""Whether a folder has all of a checkpoint that another program may still be writing, and the states of its files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoint.distributed import (
    METADATA,
    distributed_files,
    distributed_folder,
    files_beside,
    is_written,
)
from avss_dist.models.checkpoint.locate import read_config
from avss_dist.models.checkpoint.safetensors import tensors_of
from avss_dist.models.checkpoint.weight_files import INDEX, weight_files

TRAINER_STATE = "trainer_state.json"
"""File that the Trainer of transformers writes last into a checkpoint."""
_TRAINER_ARGUMENTS = "training_args.bin"
"""File that the Trainer writes right after the weights."""
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
_PART = re.compile(r".+-\d+-of-\d+\.safetensors")
"""Name of a file with a part of the weights. The index is written after all parts."""


def missing_part(folder: Path, *, pickles: bool = False) -> str:
    """Return what a folder lacks to be a complete checkpoint, such as ``no config.json``, or an empty text.

    The header of a safetensors file tells its size, so that one that is being written or copied is told from a whole
    one. The list of a distributed checkpoint is written after all of its pieces.

    Args:
        pickles: a distributed checkpoint may be opened, whose list is a pickle.
    """
    try:
        pieces = _pieces_alone(folder)
        if pieces is not None:
            problem = _missing_pieces(pieces, pickles=pickles)
        elif (folder / "config.json").is_file():
            read_config(folder, folder.name)
            problem = _missing_weights(folder)
        else:
            return "no config.json"
        if not problem and _lacks_trainer_state(folder):
            problem = f"no complete {TRAINER_STATE}, which the Trainer writes last"
    except ModelError as error:
        return error.message.removeprefix(f"{folder}/").removesuffix(".")
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return problem


def _pieces_alone(folder: Path) -> Path | None:
    """Return the folder of a distributed checkpoint in a folder without safetensors, or None.

    Raises:
        ModelError: the index of safetensors cannot be read.
    """
    if weight_files(folder):
        return None
    return distributed_folder(folder)


def _missing_pieces(pieces: Path, *, pickles: bool) -> str:
    """Return what a distributed checkpoint lacks, or an empty text.

    Raises:
        ModelError: its configuration cannot be read.
    """
    if not is_written(pieces):
        return f"no {METADATA} in {pieces.name}, which is written last"
    config = files_beside(pieces).get("config.json")
    if config is None:
        return "no config.json, nor is one above"
    read_config(config.parent, pieces.name)
    if not pickles:
        return "no weights (*.safetensors), and its pieces of tensors need allow_pickle"
    return ""


def _missing_weights(folder: Path) -> str:
    """Return what the weights of a folder lack, or an empty text.

    Raises:
        ModelError: the index, or the header of a file, cannot be read or is not complete.
        OSError: a file cannot be read.
    """
    files = weight_files(folder)
    if not files:
        return "no weights (*.safetensors)"
    for file in files:
        name = file.relative_to(folder)
        if not file.is_file():
            return f"no {name}"
        if _PART.fullmatch(file.name) and not (folder / INDEX).is_file():
            return f"no {INDEX}"
        size = file.stat().st_size
        whole = max((tensor.start + tensor.size for tensor in tensors_of(file)), default=size)
        if size != whole:
            return f"{name} has {size:,} of {whole:,} bytes"
    return ""


def _lacks_trainer_state(folder: Path) -> bool:
    """Whether a folder is a checkpoint of the Trainer whose last file is missing or is not written to its end."""
    file = folder / TRAINER_STATE
    if not file.is_file():
        is_trainers = _TRAINER_FOLDER.fullmatch(folder.name) is not None
        return is_trainers and (folder / _TRAINER_ARGUMENTS).is_file()
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return False


@dataclass(frozen=True)
class FileState:
    """State of a file. Equal states at two times say that it was not written to between them.

    Attributes:
        time: time of the last change, in nanoseconds of the clock of the file system. It is compared with earlier ones
            of the same file, and with no other clock.
        inode: number of the file, which a new file of the same name does not have.
    """

    path: str
    size: int
    time: int
    inode: int


def file_states(folder: Path) -> tuple[FileState, ...]:
    """Return the states of the files in a folder, and of the pieces of tensors in one inside of it, by path.

    Raises:
        OSError: the folder or a file is gone, or cannot be read.
    """
    with os.scandir(folder) as entries:
        files = [entry.path for entry in entries if entry.is_file()]
    pieces = distributed_folder(folder)
    if pieces is not None and pieces != folder:
        files += [str(file) for file in distributed_files(pieces) if file.is_file()]
    return tuple(file_state(file) for file in sorted(files))


def is_written_to(file: FileState) -> bool:
    """Whether a file was written to, or replaced, since it had this state. One that is gone was not."""
    try:
        return file_state(file.path) != file
    except OSError:
        return False


def file_state(path: str) -> FileState:
    """Return the state of a file.

    Raises:
        OSError: it is gone, or cannot be read.
    """
    stat = os.stat(path)
    return FileState(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
