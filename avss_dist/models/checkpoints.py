"""Checkpoints by hub id, folder or ``.gguf`` file, pinned by their content, without loading weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avss_dist.core.errors import ModelError, is_full, unwritable
from avss_dist.core.extras import require_package
from avss_dist.models.content import content_hash
from avss_dist.models.pickled import PICKLED, convert, converted_folder
from avss_dist.models.pickled import WEIGHTS as PICKLED_WEIGHTS
from avss_dist.models.safetensors import WEIGHTS, weight_files

_FETCHED = ("*.json", "*.model", "*.txt", "*.jinja")  # of a hub checkpoint, beside its weights
_READ = {".json", ".safetensors", ".model", ".txt"}  # suffixes of the files that can change a number

SLUG_LENGTH = 237  # characters of the longest name that has room in a folder's: run_id=NAME-0123456789, 255 bytes
SLUG_PREFIX = 80  # characters that stay of a longer one


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint at a fixed revision.

    Attributes:
        name: the checkpoint as the user named it, without a revision.
        source: ``hub``, ``folder`` or ``gguf``.
        path: the local folder, or the ``.gguf`` file.
        revision: the hub's commit, or the SHA-256 of the files that are read.
        revision_name: the branch or tag of a hub id, as the user wrote it.
    """

    name: str
    source: str
    path: str
    revision: str
    revision_name: str = ""

    @property
    def slug(self) -> str:
        """Readable name for run ids: letters, digits, dots, underscores and hyphens."""
        name = self.name if self.source == "hub" else Path(self.path).resolve().name.removesuffix(".gguf")
        return slug(name)

    @property
    def folder(self) -> Path:
        """Folder of the configuration and the tokenizer."""
        return Path(self.path).parent if self.source == "gguf" else Path(self.path)

    @property
    def gguf(self) -> dict[str, str]:
        """Options with which transformers reads a ``.gguf`` file; empty for other sources."""
        return {"gguf_file": Path(self.path).name} if self.source == "gguf" else {}


def slug(name: str) -> str:
    """Return ``name`` with everything but letters, digits, ``.``, ``_`` and ``-`` replaced; never empty, never hidden.

    A name too long for the folder of a run is cut to `SLUG_PREFIX` characters, followed by a hash of the whole name.
    """
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    if len(text) <= SLUG_LENGTH:
        return text
    return f"{text[:SLUG_PREFIX]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def resolve(spec: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Find a checkpoint's files and pin their content; a hub id is downloaded (safetensors, config and tokenizer only).

    Args:
        spec: ``org/name``, ``org/name@revision``, a folder, or a ``.gguf`` file.
        trust_remote_code: also fetch the Python files that a hub checkpoint ships.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened; the message says what to do.
    """
    local = locate(spec)
    if local is None:
        return _fetch(spec, trust_remote_code)
    suffixes = _READ | {".py"} if trust_remote_code else _READ
    path = Path(local.path)
    if not path.is_dir():
        return replace(local, revision=content_hash(path.parent, [path]))
    files = {file for file in path.iterdir() if file.is_file() and file.suffix in suffixes}
    return replace(local, revision=content_hash(path, {*files, *weight_files(path)}))


def locate(spec: str, *, weights: bool = True) -> Checkpoint | None:
    """Return a checkpoint on this machine with an empty revision, or None if ``spec`` is a hub id.

    Args:
        weights: require weight files; a folder with a ``config.json`` alone is a checkpoint otherwise.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened.
    """
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file '{spec}'.", "Check the path of the .gguf file.")
        require_package("gguf", f"'{spec}'")
        return Checkpoint(name=spec, source="gguf", path=str(path.resolve()), revision="")
    if path.is_dir():
        path = path if weight_files(path) else converted_folder(path) or path
        _check_folder(path, spec, weights=weights)
        return Checkpoint(name=spec, source="folder", path=str(path.resolve()), revision="")
    if path.exists():
        raise ModelError(
            f"'{spec}' is a file.", "Name the checkpoint's folder, a .gguf file, or a hub id like org/name."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", spec) or spec.startswith((".", "/")):
        raise ModelError(f"There is no folder '{spec}'.", "Check the path, or name a hub id like org/name.")
    return None


def _fetch(spec: str, trust_remote_code: bool) -> Checkpoint:
    code = ["*.py"] if trust_remote_code else []
    checkpoint = fetch_files(spec, [*_FETCHED, WEIGHTS, *code])
    if not weight_files(checkpoint.folder) and (converted := converted_folder(checkpoint.folder)):
        checkpoint = replace(checkpoint, path=str(converted))
    _check_folder(checkpoint.folder, spec)
    return checkpoint


def convert_pickles(spec: str) -> None:
    """Convert pickled weights to safetensors in the cache, where `resolve` finds them; skip a checkpoint that has some.

    Args:
        spec: see `resolve`.

    Raises:
        ModelError: the checkpoint does not exist, or its files hold more than tensors.
    """
    folder = Path(spec).expanduser()
    if not folder.exists():
        folder = fetch_files(spec, [*_FETCHED, WEIGHTS]).folder
        if not weight_files(folder):
            folder = fetch_files(spec, [*_FETCHED, PICKLED_WEIGHTS]).folder
    if folder.is_dir() and not weight_files(folder):
        convert(folder)


def fetch_files(spec: str, patterns: list[str]) -> Checkpoint:
    """Download the files of a hub checkpoint whose names match patterns.

    Raises:
        ModelError: the checkpoint does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = spec.partition("@")
    with explain_hub_errors(spec):
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    return Checkpoint(name=name, source="hub", path=folder, revision=Path(folder).name, revision_name=revision)


@contextmanager
def explain_hub_errors(spec: str) -> Iterator[None]:
    """Convert the hub's errors to ModelError with a hint."""
    try:
        yield
    except _client_errors() as error:
        if isinstance(error, OSError) and is_full(error):
            raise unwritable(f"The hub's cache on this machine, with '{spec}',", error, "Free some space.") from error
        raise ModelError(
            f"'{spec}' is no folder here, and cannot be fetched from the hub: {' '.join(str(error).split())}",
            "Check the name, the revision and the network; a private or gated model needs `hf auth login`.",
        ) from error


def _check_folder(folder: Path, spec: str, *, weights: bool = True) -> None:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"'{spec}' is an adapter, or has one beside its weights.",
            "Merge it into its base model (peft's merge_and_unload), save that, and name that folder.",
        )
    read_config(folder, spec)
    files = weight_files(folder)
    if missing := [file for file in files if not file.is_file()]:
        raise ModelError(f"'{spec}' lacks the file {missing[0].relative_to(folder)}.", "Is the download complete?")
    if weights and not files:
        pickled = sorted(f.name for pattern in PICKLED for f in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"'{spec}' has pickled weights only ({pickled[0]}), which can run code when they are opened.",
                "avss score --allow-pickle opens them as tensors alone, and keeps them as safetensors.",
            )
        raise ModelError(f"'{spec}' has no weights (*.safetensors).", "Is the download complete?")


def read_config(folder: Path, spec: str) -> dict[str, Any]:
    """Read the checkpoint's ``config.json``.

    Raises:
        ModelError: the file is missing, or is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():  # nothing else is opened: a pipe would be waited for
        raise ModelError(f"'{spec}' has no config.json.", "Name the folder that save_pretrained() wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model's configuration.")
    return config


def _client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the hub's client raises for a failed request, with any HTTP library."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    bases: Any = HfHubHTTPError.__bases__  # of that library, and OSError
    return (HFValidationError, HfHubHTTPError, *bases, OSError)
