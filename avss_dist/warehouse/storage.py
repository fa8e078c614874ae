"""Storage of a warehouse: its files are listed, read whole, and written in one step."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from avss_dist.core.errors import DamagedFile, StorageFull, WarehouseError, is_full
from avss_dist.core.files import remove_leftovers, write_file
from avss_dist.core.text import RedactedURI, count_of
from avss_dist.warehouse.schema import SCORE_AGAIN, TABLES

SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):/")
_ADDRESS_HINT = "Check the address, and who may {} there."
PLAN = ".plan-"  # before the id of an unfinished run: the name of a file
COMPACTED = "compacted"  # folder of copies of many files, beside the tables: see `compaction`
PATCHES = "patches"  # folder of the weights that repair models
LOCAL_READERS = 2
REMOTE_READERS = 16  # most of their time is waiting
_ONE_FILE = r"[0-9a-f]{20}"  # a part of the fingerprint of a cell, an experiment and so on
FILE_NAMES = {
    "runs": "run",
    "scores": "scores",
    "layer_stats": "layer_stats",
    "shard_stats": r"shard-\d{5,}",
    "evaluations": "evaluations",
    "cells": _ONE_FILE,
    "experiments": _ONE_FILE,
    "sparsity": _ONE_FILE,
    "precision": _ONE_FILE,
    "stratum_stats": "stratum_stats",
    "row_stats": r"shard-\d{5,}",
    "expert_stats": "expert_stats",
    "shard_expert_stats": r"shard-\d{5,}",
}
"""Names of the files in a run's folder, by table. Other files are ignored, such as copies by synchronizing tools."""


class Storage:
    """The files under a folder or an ``s3://``, ``gs://``, ``hdfs://`` or ``file://`` URI. Opening it touches nothing.

    Args:
        root: address of the folder.
        snapshot: list every folder once, so that all reads see it as it was at the first.

    Attributes:
        root: its name, without the keys of a URI.
        is_local: whether the files are on this machine's disks.
        readers: number of files that are read at once. Those on a disk come faster than one thread decodes them.

    Raises:
        WarehouseError: there is no such kind of storage.
    """

    def __init__(self, root: str | Path, *, snapshot: bool = False) -> None:
        self.root = RedactedURI(root)
        self._snapshot = snapshot
        self._listings: dict[tuple[str, bool], list[pafs.FileInfo]] = {}
        """Listings of a snapshot, by folder and whether what is below its folders is listed, too."""
        scheme = _SCHEME.match(self.root)
        try:
            if scheme and scheme[1].lower() not in SCHEMES:
                raise pa.ArrowInvalid(f"a warehouse cannot be kept at {scheme[1]}://")
            self.filesystem, path = pafs.FileSystem.from_uri(_uri(self.root.full))
        except (OSError, pa.ArrowException) as error:
            hint = "Give a folder, or an s3://, gs://, hdfs:// or file:// URI."
            if isinstance(error, OSError):
                hint = _ADDRESS_HINT.format("read")
            raise WarehouseError(f"Cannot open {self.root}: {_reason(error)}.", hint) from None
        self.base = path.rstrip("/")
        self.is_local = self.filesystem.type_name == "local"
        self.readers = LOCAL_READERS if self.is_local else REMOTE_READERS

    def create(self) -> None:
        """Create the warehouse, and check with a small file that it can be written."""
        path = f"{self.base}/runs/.trial-{secrets.token_hex(8)}"
        self.write(path, b"avss")
        self.delete(path)
        if self.is_local:
            remove_leftovers(Path(self.base))

    def path(self, table: str, run_id: str, name: str) -> str:
        """Return the path of a file.

        Raises:
            ValueError: ``run_id`` is invalid, or ``name`` is invalid for a file of this table.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]+", run_id):
            raise ValueError(f"a run id is made of letters, digits, dots, hyphens and underscores, not {run_id!r}")
        if not re.fullmatch(FILE_NAMES[table], name):
            raise ValueError(f"'{name}' is not the name of a file of {table}")
        return f"{self.base}/{table}/run_id={run_id}/{name}.parquet"

    def shard_path(self, run_id: str, shard_id: int, table: str = "shard_stats") -> str:
        """Return the path of the file of a shard."""
        return self.path(table, run_id, f"shard-{shard_id:05d}")

    def files(self, table: str, run_id: str | None = None) -> dict[str, tuple[str, str]]:
        """Return run id and stamp (size and time of change) of every file of a table, by path.

        Args:
            run_id: list only the folder of this run.
        """
        listed = table if run_id is None else f"{table}/run_id={run_id}"
        name = re.compile(rf"/run_id=([\w.-]+)/{FILE_NAMES[table]}\.parquet")
        start = len(f"{self.base}/{table}")
        files = {}
        for info in self._list(listed, recursive=True):
            match = name.fullmatch(info.path, start)
            if match:
                files[info.path] = (match[1], f"{info.size} {info.mtime_ns}")
        return files

    def folders(self, table: str) -> dict[str, list[pafs.FileInfo]]:
        """Return all files in the folder of each run of a table, also those that `files` ignores, by run id."""
        folder = re.compile(r"/run_id=([\w.-]+)(/.*)?")
        contents: dict[str, list[pafs.FileInfo]] = {}
        start = len(f"{self.base}/{table}")
        for info in self._list(table, recursive=True):
            match = folder.fullmatch(info.path, start)
            if match:
                files = contents.setdefault(match[1], [])
                if info.is_file:
                    files.append(info)
        return contents

    def patches(self) -> dict[str, pafs.FileInfo]:
        """Return the files of all patches, by key."""
        patches = {}
        for info in self._list(PATCHES, recursive=False):
            match = re.fullmatch(r"([0-9a-f]{64})\.safetensors", info.base_name)
            if match:
                patches[match[1]] = info
        return patches

    def names(self, folder: str) -> set[str]:
        """Return the names of the files and folders right below a folder, such as that of a table."""
        return {info.base_name for info in self._list(folder, recursive=False)}

    def _list(self, folder: str, *, recursive: bool) -> list[pafs.FileInfo]:
        """Return the files and folders below a folder of the warehouse, or an empty list if it does not exist."""
        if (folder, recursive) in self._listings:
            return self._listings[folder, recursive]
        selector = pafs.FileSelector(f"{self.base}/{folder}", recursive=recursive, allow_not_found=True)
        with self.reading(f"{self.root}/{folder}"):
            infos: list[pafs.FileInfo] = self.filesystem.get_file_info(selector)
        if self._snapshot:
            self._listings[folder, recursive] = infos
        return infos

    def compacted_path(self, table: str, stem: str) -> str:
        """Return the path of a part of a table, see `compaction`."""
        return f"{self.base}/{COMPACTED}/{table}/{stem}.parquet"

    def compacted(self, table: str) -> dict[str, str]:
        """Return the paths of the parts of a table, by the stem of their names."""
        parts = {}
        for info in self._list(COMPACTED, recursive=True):
            path = PurePosixPath(info.path)
            if path.match(f"{COMPACTED}/{table}/*.parquet"):
                parts[path.stem] = str(path)
        return parts

    def plan_path(self, run_id: str) -> str:
        """Return the path of the file that describes an unfinished run. Readers of tables ignore it."""
        return f"{self.base}/runs/{PLAN}{run_id}"

    def delete(self, path: str) -> None:
        """Delete a file. Errors are ignored."""
        with suppress(OSError, pa.ArrowException):
            self.filesystem.delete_file(path)

    def remove_folder(self, table: str, run_id: str) -> None:
        """Delete the folder of a run in a table with all that is in it, if it exists.

        Raises:
            WarehouseError: it cannot be deleted.
        """
        path = f"{self.base}/{table}/run_id={run_id}"
        with self._removing(path):
            self.filesystem.delete_dir(path)

    def remove_patch(self, key: str) -> None:
        """Delete a patch, if it exists.

        Raises:
            WarehouseError: it cannot be deleted.
        """
        path = self._patch_path(key)
        with self._removing(path):
            self.filesystem.delete_file(path)

    @contextmanager
    def _removing(self, path: str) -> Iterator[None]:
        """Raise errors of deleting a file or folder inside the block as a WarehouseError. It may be gone already."""
        try:
            yield
        except FileNotFoundError:
            return
        except (OSError, pa.ArrowException) as error:
            hint = "Check who may delete there, and run the same command again: it removes what remains."
            raise WarehouseError(f"Cannot delete {path}: {_reason(error)}.", hint) from error

    def read(self, path: str) -> pa.Buffer | None:
        """Read a whole file, or return None if it does not exist."""
        with self.reading(path), suppress(FileNotFoundError), self.filesystem.open_input_file(path) as file:
            return file.read_buffer()
        return None

    def write(self, path: str, data: pa.Buffer | bytes) -> None:
        """Write a file in one step. An object of an object store appears whole, when its stream is closed.

        Raises:
            StorageFull: there is no space left.
            WarehouseError: it cannot be written.
        """
        try:
            if self.is_local:  # staged in the root: Polars reads every file of a table's folder
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_file(Path(path), data, folder=Path(self.base), durable=True)
                return
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(data)
        except OSError as error:
            if is_full(error):
                hint = f"Free some and run the same command again: {self._describe_kept(path)} kept."
                raise StorageFull(f"No space left on {self.root}.", hint) from error
            raise WarehouseError(
                f"Cannot write {self.root}: {_reason(error)}.", _ADDRESS_HINT.format("write")
            ) from error

    def _describe_kept(self, path: str) -> str:
        """Describe what is stored of the run that a file belongs to: its shards, if it has any, with the verb."""
        folder, name = path.split("/")[-2:]
        if name.startswith(PLAN):
            run_id = name.removeprefix(PLAN)
        else:
            run_id = folder.removeprefix("run_id=")
        stored = len(self.files("shard_stats", run_id))
        if not stored:
            return "what was measured is"
        verb = "is" if stored == 1 else "are"
        return f"{count_of(stored, 'shard')} {verb}"

    def write_patch(self, data: bytes) -> str:
        """Write weights that repair a model, in safetensors, and return their key: their SHA-256, in hex."""
        key = hashlib.sha256(data).hexdigest()
        self.write(self._patch_path(key), data)
        return key

    def patch_keys(self) -> set[str]:
        """Return the keys of all patches."""
        return {*self.patches()}

    def read_patch(self, key: str) -> bytes:
        """Read a patch.

        Raises:
            DamagedFile: it is missing, or its content does not match the key.
        """
        path = self._patch_path(key)
        data = self.read(path)
        if data is None:
            problem = "gone"
        elif hashlib.sha256(data).hexdigest() == key:
            return bytes(data)
        else:
            problem = "not what was written"
        hint = "Delete it, and run the same command again: it is fitted again."
        raise DamagedFile(f"Cannot read {path}: it is {problem}.", hint)

    def _patch_path(self, key: str) -> str:
        return f"{self.base}/{PATCHES}/{key}.safetensors"

    def damage(self, path: str, error: Exception) -> str:
        """Return the reason why a file cannot be read.

        Raises:
            WarehouseError: the storage failed, and not the file.
        """
        # Errors of the library by which pyarrow asks an object store have no class of their own.
        is_of_object_store = type(error) is pa.ArrowException
        # On a local disk, errors without a number are of the content of a file.
        is_of_system = isinstance(error, OSError) and (error.errno is not None or not self.is_local)
        if is_of_object_store or is_of_system:
            raise WarehouseError(f"Cannot read {path}: {_reason(error)}", _ADDRESS_HINT.format("read")) from error
        return _reason(error)

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Raise errors of reading a file inside the block as a WarehouseError that names the file."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise DamagedFile(f"Cannot read {path}: {self.damage(path, error)}", _replaced_by(path)) from error


def _replaced_by(path: str) -> str:
    """Return a sentence with the command that replaces a damaged file of a table."""
    tables = [folder for folder in path.split("/") if folder in TABLES]
    if not tables:
        return SCORE_AGAIN
    return TABLES[tables[-1]].replaced_by


def _uri(root: str) -> str:
    """Return a folder as a URI. On S3, a small file is written in one request, which leaves no partial file."""
    if not _SCHEME.match(root):
        return Path(os.path.expanduser(root)).absolute().as_uri()
    if not root.startswith("s3:") or "allow_delayed_open=" in root:
        return root
    separator = "&" if "?" in root else "?"
    return f"{root}{separator}allow_delayed_open=true"


def _reason(error: Exception) -> str:
    """Return the reason of a failure of storage, without the parts of an object store's message for machines."""
    text = getattr(error, "strerror", None) or str(error)
    text = re.sub(r"^.*AWS Error | \(Request ID: .*\)$", "", text, flags=re.DOTALL)
    return re.sub(r"^Unknown error: |\bN\d+Azure\w+E: |\n.*", "", text, flags=re.DOTALL).rstrip(".")
