"""Checkpoints by hub id, folder or ``.gguf`` file, pinned by their content, without loading weights.

Commands check the paths of their models with this module before torch is imported, which takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss_dist.core.errors import ModelError, first_names, is_full, unwritable
from avss_dist.core.extras import require_package
from avss_dist.core.files import cache_folder, write_file
from avss_dist.core.streams import say
from avss_dist.core.values import JsonObject
from avss_dist.models.checkpoint.distributed import (
    METADATA,
    checkpoint_folder,
    distributed_files,
    distributed_folder,
    files_beside,
    is_written,
    require_distributed,
)
from avss_dist.models.checkpoint.weight_files import WEIGHTS, weight_files

if TYPE_CHECKING:
    from gguf import GGUFReader

    from avss_dist.models.checkpoint.safetensors import TensorInfo

CONFIGURATION = ("*.json", "*.model", "*.txt", "*.jinja", "avss_*.yaml")
"""Patterns of the files of a hub checkpoint that are fetched beside its weights."""
_READ = {".json", ".safetensors", ".model", ".txt"}
"""Suffixes of the files that can change a number."""
VERIFIED = "avss_verified.json"
"""File in a folder with comparisons of the checkpoint. It can change no number, and is not part of a revision."""

SLUG_LENGTH = 237
"""Characters of the longest name that has room in that of a folder: run_id=NAME-0123456789, 255 bytes."""
SLUG_PREFIX = 80
"""Characters that stay of a longer name."""
SLUG_HASH = 16
"""Hexadecimal digits of the hash behind them."""
CACHED_FROM = 1 << 20
"""Bytes of the largest file whose hash is not cached."""
PICKLED_WEIGHTS = "pytorch_model*.bin"
"""Names that transformers gives to pickled weights. Others hold optimizers and arguments."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERTED = "converted_from_pickles"
"""File in a folder of converted weights, with the names of what they were converted from."""
ZERO_PIECES = "*zero_pp_rank*"
"""Names that DeepSpeed gives to the files of ranks, in the folder ``global_step*`` of a step."""
ZERO_SCRIPT = "zero_to_fp32.py"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint at a fixed revision.

    Attributes:
        name: the checkpoint as the user named it, without a revision.
        source: ``hub``, ``folder`` or ``gguf``.
        path: the local folder, or the ``.gguf`` file.
        revision: the hub's commit, or the SHA-256 of the files that are read.
        revision_name: the branch or tag of a hub id, as the user wrote it.
        trust_remote_code: whether Python code that the checkpoint ships may run.
        origin: the folder that the user named, if ``path`` is one in the cache with its converted weights.
    """

    name: str
    source: str
    path: str
    revision: str
    revision_name: str = ""
    trust_remote_code: bool = False
    origin: str = ""

    @property
    def slug(self) -> str:
        """Readable name for run ids: letters, digits, dots, underscores and hyphens."""
        if self.source == "hub":
            return slug(self.name)
        return slug(Path(self.named_path).resolve().name.removesuffix(".gguf"))

    @property
    def named_path(self) -> str:
        """Path of the folder or file that the user named."""
        return self.origin or self.path

    @property
    def folder(self) -> Path:
        """Folder of the configuration and the tokenizer."""
        if self.source == "gguf":
            return Path(self.path).parent
        return Path(self.path)

    @property
    def gguf(self) -> dict[str, str]:
        """Options with which transformers reads a ``.gguf`` file, empty for other sources."""
        if self.source == "gguf":
            return {"gguf_file": Path(self.path).name}
        return {}


def slug(name: str) -> str:
    """Return ``name`` with everything but letters, digits, ``.``, ``_`` and ``-`` replaced.

    The result is never empty and never hidden. A name too long for the folder of a run is cut to `SLUG_PREFIX`
    characters, followed by a hash of the whole name.
    """
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    if len(text) <= SLUG_LENGTH:
        return text
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    return f"{text[:SLUG_PREFIX]}-{digest[:SLUG_HASH]}"


def resolve(
    spec: str, *, trust_remote_code: bool = False, weights: bool = True, unconverted: bool = False
) -> Checkpoint:
    """Find a checkpoint's files and pin their content.

    Files of a hub id are downloaded: safetensors, config and tokenizer only.

    Args:
        spec: ``org/name``, ``org/name@revision``, a folder, or a ``.gguf`` file.
        trust_remote_code: also fetch the Python files that a hub checkpoint ships.
        weights: download the weights of a hub id, too.
        unconverted: take a folder, too, whose weights can be converted to safetensors and were not yet. Its revision is
            the hash of those weights.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened; the message says what to do.
    """
    place = None
    if unconverted:
        place = _place_of_unconverted(Path(os.path.expanduser(spec)))
    local = locate(spec, trust_remote_code=trust_remote_code, weights=place is None)
    if local is None:
        return _resolve_on_hub(spec, trust_remote_code=trust_remote_code, weights=weights)
    if place is not None:
        return replace(local, revision=place.name)
    path = Path(local.path)
    if not path.is_dir():
        return replace(local, revision=content_hash(path.parent, [path]))
    suffixes = set(_READ)
    if trust_remote_code:
        suffixes.add(".py")
    files = {file for file in path.iterdir() if file.suffix in suffixes and file.name != VERIFIED and file.is_file()}
    files.update(weight_files(path))
    return replace(local, revision=content_hash(path, files))


def _resolve_on_hub(spec: str, *, trust_remote_code: bool, weights: bool) -> Checkpoint:
    """Return a checkpoint of the hub, whose files are downloaded.

    Args: see `resolve`.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened.
    """
    patterns = list(CONFIGURATION)
    if weights:
        patterns.append(WEIGHTS)
    fetched = fetch_files(spec, patterns, trust_remote_code=trust_remote_code)
    if not weights:
        return fetched
    if not weight_files(fetched.folder):
        converted = converted_folder(fetched.folder)
        if converted:
            fetched = replace(fetched, path=str(converted))
    _check_folder(fetched.folder, spec)
    return fetched


def find_checkpoint(spec: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Return a checkpoint of which only configuration and headers are read. Of a hub id, only these are fetched.

    Args: see `resolve` and `locate`.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened.
    """
    local = locate(spec, trust_remote_code=trust_remote_code, weights=weights)
    if local is not None:
        return local
    return fetch_files(spec, ["config.json"], trust_remote_code=trust_remote_code)


def require_checkpoint(spec: str, *, weights: bool = True) -> None:
    """Refuse a checkpoint that is neither on this machine nor on the hub.

    Of one that has never been fetched, the configuration is fetched.

    Args:
        weights: see `locate`.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened.
    """
    if locate(spec, weights=weights) is not None:
        return
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = spec.partition("@")
    with explain_hub_errors(spec):
        cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if not isinstance(cached, str):
        say(f"There is no folder '{spec}' here: looking for it on the hub.")
        fetch_files(spec, ["config.json"])


def locate(spec: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint | None:
    """Return a checkpoint on this machine with an empty revision, or None if ``spec`` is a hub id.

    Args:
        weights: require weight files; a folder with a ``config.json`` alone is a checkpoint otherwise.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file '{spec}'.", "Check the path of the .gguf file.")
        require_package("gguf", f"'{spec}'")
        return Checkpoint(
            name=spec, source="gguf", path=str(path.resolve()), revision="", trust_remote_code=trust_remote_code
        )
    if path.is_dir():
        return _locate_folder(path, spec, trust_remote_code=trust_remote_code, weights=weights)
    if path.exists():
        raise ModelError(
            f"'{spec}' is a file.", "Name the checkpoint's folder, a .gguf file, or a hub id like org/name."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", spec) or spec.startswith((".", "/")):
        raise ModelError(f"There is no folder '{spec}'.", "Check the path, or name a hub id like org/name.")
    return None


def _locate_folder(folder: Path, spec: str, *, trust_remote_code: bool, weights: bool) -> Checkpoint:
    """Return the checkpoint in a folder, or that of its converted weights in the cache, with an empty revision.

    Args: see `locate`.

    Raises:
        ModelError: the checkpoint cannot be opened.
    """
    checkpoint = Checkpoint(
        name=spec, source="folder", path=str(folder.resolve()), revision="", trust_remote_code=trust_remote_code
    )
    if not weight_files(folder):
        origin = str(checkpoint_folder(folder.resolve()))
        converted = converted_folder(folder)
        if converted is not None:
            _check_folder(converted, spec)
            return replace(checkpoint, path=str(converted.resolve()), origin=origin)
        pieces = distributed_folder(folder)
        if pieces is not None:
            config = _require_pieces(pieces, spec, weights=weights)
            return replace(checkpoint, path=str(config.parent.resolve()), origin=origin)
    _check_folder(folder, spec, weights=weights)
    return checkpoint


def _require_pieces(folder: Path, spec: str, *, weights: bool) -> Path:
    """Return the ``config.json`` of a distributed checkpoint that was not converted.

    Raises:
        ModelError: its weights are needed, or it is not whole.
    """
    config = require_distributed(folder, spec)
    read_config(config.parent, spec)
    if weights:
        raise ModelError(
            f"'{spec}' is a distributed checkpoint: pieces of tensors, and their list {folder / METADATA}, which is a "
            "pickle and can run code when it is opened.",
            "avss score --allow-pickle opens it as tensors alone, and keeps them as safetensors.",
        )
    return config


def fetch_files(spec: str, patterns: list[str], *, trust_remote_code: bool = False) -> Checkpoint:
    """Download the files of a hub checkpoint whose names match patterns, and its Python files if they are trusted.

    Raises:
        ModelError: the checkpoint does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = spec.partition("@")
    if trust_remote_code:
        patterns = [*patterns, "*.py"]
    with explain_hub_errors(spec):
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    return Checkpoint(
        name=name,
        source="hub",
        path=folder,
        revision=Path(folder).name,
        revision_name=revision,
        trust_remote_code=trust_remote_code,
    )


@contextmanager
def explain_hub_errors(spec: str) -> Iterator[None]:
    """Convert the errors of the hub's client, with any HTTP library, to ModelError with a hint."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    bases: Any = HfHubHTTPError.__bases__  # Those of that library, and OSError.
    try:
        yield
    except (HFValidationError, HfHubHTTPError, *bases, OSError) as error:
        if isinstance(error, OSError) and is_full(error):
            raise unwritable(f"The hub's cache on this machine, with '{spec}',", error, "Free some space.") from error
        reason = " ".join(str(error).split())
        raise ModelError(
            f"'{spec}' is no folder here, and cannot be fetched from the hub: {reason}",
            "Check the name, the revision and the network; a private or gated model needs `hf auth login`.",
        ) from error


def _check_folder(folder: Path, spec: str, *, weights: bool = True) -> None:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"'{spec}' is an adapter, or has one beside its weights.",
            "Merge it into its base model (peft's merge_and_unload), save that, and name that folder.",
        )
    files = weight_files(folder)
    if not files and not pickled_weights(folder):
        _refuse_zero(folder, spec)
    read_config(folder, spec)
    for file in files:
        if not file.is_file():
            raise ModelError(f"'{spec}' lacks the file {file.relative_to(folder)}.", "Is the download complete?")
    if weights and not files:
        pickled: list[str] = []
        for pattern in PICKLED:
            pickled += [file.name for file in folder.glob(pattern)]
        pickled.sort()
        if pickled:
            raise ModelError(
                f"'{spec}' has pickled weights only ({pickled[0]}), which can run code when they are opened.",
                "avss score --allow-pickle opens them as tensors alone, and keeps them as safetensors.",
            )
        raise ModelError(f"'{spec}' has no weights (*.safetensors).", "Is the download complete?")


def _refuse_zero(folder: Path, spec: str) -> None:
    """Refuse what the ranks of a training with DeepSpeed's ZeRO wrote, which only its own script puts together.

    Raises:
        ModelError: the folder holds such files, or is the one of a step of them.
    """
    place = folder
    if any(folder.glob(ZERO_PIECES)):
        place = folder.resolve().parent
    elif not any(folder.glob(f"global_step*/{ZERO_PIECES}")):
        return
    script = place / ZERO_SCRIPT
    command = shlex.join(["python", str(script), str(place), str(place), "--safe_serialization"])
    if script.is_file():
        hint = f"DeepSpeed put a script beside them that writes safetensors: {command}"
    else:
        hint = f"DeepSpeed has a script that writes safetensors, {ZERO_SCRIPT}. Copy it to {place}, and type: {command}"
    raise ModelError(
        f"'{spec}' holds pieces of weights and of an optimizer that ranks of DeepSpeed's ZeRO wrote.", hint
    )


def read_config(folder: Path, spec: str) -> JsonObject:
    """Read the checkpoint's ``config.json``.

    Raises:
        ModelError: the file is missing, or is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():  # Nothing else is opened: a pipe would be waited for.
        raise ModelError(f"'{spec}' has no config.json.", "Name the folder that save_pretrained() wrote.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model's configuration.")
    return config


def stored_tensors(checkpoint: Checkpoint) -> Sequence[TensorInfo]:
    """Return the tensors of the weight files that transformers loads. Headers that are not here come from the hub.

    Raises:
        ModelError: a file has no valid header, or the hub cannot be reached.
    """
    from avss_dist.models.checkpoint.safetensors import TensorInfo, tensors_of

    tensors: list[TensorInfo] = []
    if checkpoint.gguf:
        for tensor in read_gguf(checkpoint).tensors:
            tensors.append(TensorInfo(tensor.name, tensor.tensor_type.name, int(tensor.n_bytes)))
        return tensors
    files = weight_files(checkpoint.folder)
    are_here = bool(files) and all(file.is_file() for file in files)
    if checkpoint.source == "hub" and not are_here:
        return _hub_tensors(checkpoint)
    for file in files:
        tensors += tensors_of(file)
    return tensors


def _hub_tensors(checkpoint: Checkpoint) -> Sequence[TensorInfo]:
    """Return the tensors of a checkpoint on the hub, without downloading its weights.

    Raises:
        ModelError: the checkpoint has no weights with a header, or the hub cannot be reached.
    """
    from huggingface_hub import errors, get_safetensors_metadata

    from avss_dist.models.checkpoint.safetensors import TensorInfo

    spec = checkpoint.name
    if checkpoint.revision_name:
        spec += f"@{checkpoint.revision_name}"
    with explain_hub_errors(spec):
        try:
            metadata = get_safetensors_metadata(checkpoint.name, revision=checkpoint.revision)
        except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
            raise ModelError(f"'{spec}' has no weights (*.safetensors) with a header: {error}") from error
    tensors = []
    for file in metadata.files_metadata.values():
        for name, tensor in file.tensors.items():
            first, last = tensor.data_offsets
            tensors.append(TensorInfo(name, tensor.dtype, last - first))
    return tensors


def read_gguf(checkpoint: Checkpoint) -> GGUFReader:
    """Return the gguf package's reader of a checkpoint's file.

    Raises:
        ModelError: the file has no valid header.
    """
    from gguf import GGUFReader

    try:
        return GGUFReader(checkpoint.path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(
            f"{checkpoint.path} has no header of a .gguf file: {error}.", "Download or copy it again."
        ) from error


def converted_folder(folder: Path) -> Path | None:
    """Return the cache folder of a folder's converted weights, by content, or None if they were not converted yet.

    Raises:
        ModelError: a file cannot be read.
    """
    place = conversion_place(folder)
    if place is None or not place.is_dir():
        return None
    return place


def pickled_weights(folder: Path) -> list[Path]:
    """Return the pickled weights of a folder under the names that transformers gives to them."""
    return sorted(file for file in folder.glob(PICKLED_WEIGHTS) if file.is_file())


def conversion_place(folder: Path) -> Path | None:
    """Return the cache folder for a folder's converted weights, by content, or None if it has none to convert.

    Raises:
        ModelError: a file cannot be read.
    """
    files = pickled_weights(folder)
    if files:
        return cache_folder("converted", content_hash(folder, [*files, *_files_beside(folder)]))
    pieces = distributed_folder(folder)
    if pieces is None or not is_written(pieces):
        return None
    digest = hashlib.sha256(content_hash(pieces, distributed_files(pieces)).encode())
    for file in files_beside(pieces).values():
        digest.update(content_hash(file.parent, [file]).encode())
    return cache_folder("converted", digest.hexdigest())


def _place_of_unconverted(folder: Path) -> Path | None:
    """Return the cache folder that a folder's weights will be converted to, or None if they need no conversion."""
    if not folder.is_dir() or weight_files(folder):
        return None
    place = conversion_place(folder)
    if place is None or place.is_dir():
        return None
    return place


def _files_beside(folder: Path) -> list[Path]:
    """Return the files beside pickled weights that belong to the checkpoint."""
    suffixes = (".json", ".model", ".txt", ".py")
    return [file for file in folder.iterdir() if file.suffix in suffixes and file.name != VERIFIED and file.is_file()]


def content_hash(folder: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 over the bytes of files and their paths in a folder.

    Hashes of large files are cached.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        path = file.relative_to(folder).as_posix()
        try:
            digest.update(f"{path}\0{_file_hash(file.resolve())}\n".encode())
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from error
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    stat = file.stat()
    # Who writes a file can set back its mtime, but not its ctime.
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    cache = cache_folder("sha256", hashlib.sha256(f"{file}|{state}".encode()).hexdigest())
    is_cached = stat.st_size > CACHED_FROM
    if is_cached and cache.is_file():
        return cache.read_text(encoding="ascii")
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if is_cached:
        with suppress(OSError):  # The cache is a convenience: without it the file is hashed again.
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_file(cache, value)
    return value


def matching_revisions(name: str, pattern: str) -> list[str]:
    """Return the branches and tags of a hub id that match a pattern such as ``stage1-step*``, in natural order.

    Raises:
        ModelError: no revision matches, there is no such model, or the hub cannot be reached.
    """
    revisions = list_revisions(name)
    matches = [revision for revision in revisions if fnmatchcase(revision, pattern)]
    if not matches:
        raise ModelError(
            f"No revision of '{name}' matches '{pattern}'.",
            f"There are: {first_names(revisions, 5)}.",
        )
    return matches


def list_revisions(name: str) -> list[str]:
    """Return the branches and tags of a hub id, in natural order.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with explain_hub_errors(name):
        refs = HfApi().list_repo_refs(name)
    names = dict.fromkeys(ref.name for ref in (*refs.branches, *refs.tags))
    return sorted(names, key=natural_key)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names as numbers: step9 is before step10."""
    key = []
    for part in re.split(r"(\d+)", name):
        if part.isdecimal():
            key.append((int(part), ""))
        else:
            key.append((-1, part))
    return key
