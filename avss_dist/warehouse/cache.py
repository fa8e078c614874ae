"""Copies of many small files as few large ones, in the user's cache, so that thousands of runs open in a moment.

Reading a Parquet file costs a millisecond before its first row, so a table of thousands of runs is seconds. The rows
of whole groups of runs are therefore kept once more, in a cache, sorted so that a query skips what it does not ask for.
A part of the cache is valid only while every file that it copies has the same size and time of change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from avss_dist.system.folders import cache_folder
from avss_dist.system.progress_bar import tracked
from avss_dist.system.staging import remove_leftovers, staged_file
from avss_dist.warehouse.schema import SCHEMA_VERSION

PICKED_BY = {"runs": [], "scores": ["site", "recipe", "threshold_kind", "threshold"]}
"""Tables that are copied, with the columns that queries select by. Rows with equal values in them are a row group."""

MIN_FILES, MAX_FILES = 64, 128  # files that make a part; fewer are read where they are
_FILES = b"avss_files"

Files = Mapping[str, str]  # by path: what tells whether the file has changed


def copied_rows(
    name: str, root: str, files: Files, schema: pa.Schema, read: Callable[[str, Files], ds.Dataset]
) -> tuple[ds.Dataset | None, Files]:
    """Return the copied rows of a table, and the files that still have to be read where they are.

    Args:
        name: name of the table.
        root: address of the warehouse.
        files: its valid files.
        schema: schema of the table.
        read: opens files of a table.
    """
    if name not in PICKED_BY or len(files) < MIN_FILES:
        return None, files
    key = hashlib.sha256(f"{root}\n{SCHEMA_VERSION}\n{schema}".encode()).hexdigest()[:32]
    folder = cache_folder("tables", key, name)
    parts = _current_parts(folder, files)
    missing = sorted(files.keys() - {path for holds in parts.values() for path in holds})
    chunks = [missing[i : i + MAX_FILES] for i in range(0, len(missing), MAX_FILES) if len(missing) - i >= MIN_FILES]
    for chunk in tracked(chunks, f"Copying the {name} of {len(missing):,} runs, once"):
        holds = {path: files[path] for path in chunk}
        with suppress(OSError, pa.ArrowException):  # where a file is damaged, all of the chunk are read where they are
            written = _write(folder, name, read(name, holds), holds)
            if written is None:
                break
            parts[written] = holds
    uncopied = sorted(files.keys() - {path for holds in parts.values() for path in holds})
    dataset = ds.dataset([str(part) for part in parts], schema, "parquet", pafs.LocalFileSystem()) if parts else None
    return dataset, {path: files[path] for path in uncopied}


def _current_parts(folder: Path, files: Files) -> dict[Path, Files]:
    """Return the parts of the cache whose files have not changed, each file in one part. Other parts are deleted."""
    parts: dict[Path, Files] = {}
    copied: set[str] = set()
    for part, holds in _parts(folder):
        if not holds.items() <= files.items():
            part.unlink(missing_ok=True)
        elif not copied & holds.keys():
            parts[part] = holds
            copied |= holds.keys()
    return parts


def _parts(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield every readable part of the cache, with the files that it copies."""
    for part in sorted(folder.glob("*.parquet")):
        with suppress(OSError, pa.ArrowException, KeyError, ValueError):
            yield part, json.loads((pq.read_schema(part).metadata or {})[_FILES])


def _write(folder: Path, name: str, dataset: ds.Dataset, holds: Files) -> Path | None:
    """Copy files into a part and return its path, or None if the cache cannot be written."""
    order = [*PICKED_BY[name], "run_id", *(["layer"] if "layer" in dataset.schema.names else [])]
    table = dataset.to_table().sort_by([(column, "ascending") for column in order])
    listed = json.dumps(dict(holds))
    table = table.replace_schema_metadata({_FILES: listed.encode(), b"avss_schema_version": str(SCHEMA_VERSION)})
    part = folder / f"{hashlib.sha256(listed.encode()).hexdigest()[:32]}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_leftovers(folder)
        with staged_file(part) as staged, pq.ParquetWriter(staged, table.schema, compression="zstd") as writer:
            for group in _groups(table, PICKED_BY[name]):
                writer.write_table(group)
    except OSError:
        return None
    return part


def _groups(table: pa.Table, columns: list[str]) -> Iterator[pa.Table]:
    """Yield slices of a sorted table whose rows have equal values in ``columns``."""
    begins = np.zeros(len(table), bool)
    for column in columns:
        codes = table[column].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
        begins[1:] |= codes[1:] != codes[:-1]
    bounds = [0, *np.flatnonzero(begins).tolist(), len(table)]
    yield from (table.slice(start, end - start) for start, end in pairwise(bounds))
