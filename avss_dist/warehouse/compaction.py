"""Compaction: copies of many small files in few large ones, called parts, so that thousands of runs open in a moment.

Opening a Parquet file costs a millisecond, or several requests to an object store, before its first row. The rows of
whole groups of runs are therefore kept once more, in parts, sorted so that a query skips the rows that it does not ask
for. A part lists the size and the time of change of every file that it copies, and is used only while all of them are
as listed. So a part needs no other file, is never changed, and can be deleted at any time: the files are read instead.

Parts lie in two folders. Readers write those in the user's cache, for warehouses of many runs and for those in an
object store. `avss compact` writes those in the warehouse itself, which every reader of it uses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from avss_dist.core.files import cache_folder, remove_leftovers, write_file
from avss_dist.core.streams import tracked
from avss_dist.warehouse.checks import damaged_runs
from avss_dist.warehouse.encoding import UNSIGNED_METADATA, conform, parse, signed, verify_footer
from avss_dist.warehouse.schema import SCHEMA_VERSION, SCHEMAS, Damage
from avss_dist.warehouse.storage import COMPACTED, FILE_NAMES, Storage

DIGESTS = "digests"
"""Name of the table of `digest`, which exists in parts alone."""
SORTED_BY: dict[str, list[str]] = {
    "runs": [],
    "scores": ["site", "recipe", "threshold_kind", "threshold"],
    DIGESTS: [],
    "evaluations": [],
    "expert_stats": [],
}
"""Tables that have parts, with the columns that queries select by. Rows with equal values in them are a row group."""
MIN_RUNS = 64  # least number of runs of a part; of a warehouse on a local disk, fewer are read where they are
MAX_RUNS = 128  # largest number of runs of a part
MAX_SMALL = 8  # parts with less than half of MAX_RUNS, before they are merged
_STAMPS = b"avss_files"  # in the metadata of a part: stamps of the files that it copies
_COLUMNS = b"avss_columns"  # in the metadata of a part: see `_columns`

Stamps = Mapping[str, str]
"""Size and time of change of the file of a table, by run id."""
Parts = Mapping[Path, Stamps]
"""Stamps of the files that each part has copied, by the path of the part."""


@dataclass(frozen=True, kw_only=True)
class _PartContent:
    """Content of a new part.

    Attributes:
        stamps: stamps of the files that it copies.
        rows: their rows.
    """

    stamps: Stamps
    rows: pa.Table


class TableParts:
    """The parts of one table of a warehouse.

    Args:
        storage: storage of the warehouse.
        name: name of the table, a key of `SORTED_BY`.
        damaged: gets the reasons, by run id, for copying no rows of a run.
    """

    def __init__(self, storage: Storage, name: str, damaged: dict[str, Damage]) -> None:
        self._storage = storage
        self._name = name
        self._damaged = damaged
        place = f"{storage.filesystem.type_name}:{storage.base}"
        folder = cache_folder("tables", hashlib.sha256(place.encode()).hexdigest()[:32])
        self._cached = folder / name
        if storage.is_local:
            self._shared = Path(storage.base) / COMPACTED / name
        else:
            self._shared = folder / COMPACTED / name  # copies of the parts of the warehouse
        if name == DIGESTS:
            self._schema = SOURCE
        else:
            self._schema = encoded_schema(name)
        self._used: dict[Path, Stamps] = {}
        self._stamps: dict[Path, Stamps] = {}  # of all parts that were read
        self._unreadable: set[Path] = set()

    @property
    def run_ids(self) -> set[str]:
        """Runs of the parts that were last returned."""
        return set(chain.from_iterable(self._used.values()))

    def covering(self, stamps: Stamps, requested: Collection[str]) -> Collection[Path]:
        """Return the parts to read, with each run in at most one.

        Runs that are in no part are first copied into new ones in the cache. A warehouse on a local disk with few such
        runs gets none.

        Args:
            stamps: stamps of all files of the table.
            requested: runs that are to be read.
        """
        spare = self._select(stamps)
        if not self.run_ids.issuperset(requested) and self._fetch_shared():
            spare = self._select(stamps)
        missing = set(requested) - self.run_ids
        minimum = MIN_RUNS if self._storage.is_local else 1
        if len(missing) >= minimum:
            with suppress(OSError):  # the cache cannot be written
                self._cached.mkdir(parents=True, exist_ok=True, mode=0o700)
                remove_leftovers(self._cached)
                self._copy(stamps, missing, spare, minimum, shared=False)
                self._select(stamps)
        return self._used.keys()

    def compact(self, stamps: Stamps) -> int:
        """Copy the runs that are in no part of the warehouse into new ones there, and return their number.

        Parts that new ones replace are deleted at the end. Every part is whole and tells which files it copies, so the
        warehouse is valid at each moment, also if this is killed or another process does the same.

        Args:
            stamps: stamps of all files of the table.

        Raises:
            StorageFull, WarehouseError: a part cannot be written, or the warehouse cannot be read.
        """
        self._fetch_shared()
        spare = self._select(stamps, shared_alone=True)
        return self._copy(stamps, stamps.keys() - self.run_ids, spare, 1, shared=True)

    def drop_stale(self, stamps: Stamps) -> None:
        """Delete the parts that copy a file which has changed or is gone, and write those of the warehouse anew.

        Parts of the warehouse that cannot be read, or are of another version, are deleted, too: nothing tells which
        files they copy. The others are valid at each moment, as in `compact`.

        Args:
            stamps: stamps of all files of the table.

        Raises:
            StorageFull, WarehouseError: a part cannot be written, or the warehouse cannot be read.
        """
        self._fetch_shared()
        stored = set(self._shared.glob("*.parquet"))
        readable = {path for path, _ in self._listed(self._shared)}
        for path in stored - readable:
            self._storage.delete(self._storage.compacted_path(self._name, path.stem))
        if spare := self._select(stamps, shared_alone=True):
            self._copy(stamps, frozenset(), spare, 1, shared=True)
        for path in self._select(stamps):
            if not self._is_shared(path):
                path.unlink(missing_ok=True)
        self._fetch_shared()

    def _copy(self, stamps: Stamps, missing: Set[str], spare: Parts, minimum: int, *, shared: bool) -> int:
        """Write new parts in place of the spare and of many small ones, and return the number of missing runs in them.

        Args:
            shared: write in the warehouse, where parts are rarely written, and well compressed. Else in the cache,
                which replaces no part of the warehouse.
        """
        replaced = dict(spare)
        small = self._small_parts(shared=shared)
        if (shared and missing) or len(small) > MAX_SMALL:
            replaced |= small
        compression = "zstd" if shared else "lz4"
        number = 0
        written: set[str] = set()
        for content in self._merged(stamps, missing, replaced, minimum):
            data = _to_part(self._name, content.rows, content.stamps, compression)
            stem = _part_stem(self._name, content.stamps)
            if shared:
                self._storage.write(self._storage.compacted_path(self._name, stem), data)
            else:
                write_file(self._cached / f"{stem}.parquet", data)
            written.add(stem)
            number += len(content.stamps.keys() & missing)
        for path in replaced:
            # Beside a run that cannot be read, the new part copies the same files as the one it replaces.
            if path.stem in written:
                continue
            if shared:
                self._storage.delete(self._storage.compacted_path(self._name, path.stem))
            elif not self._is_shared(path):
                path.unlink(missing_ok=True)
        return number

    def _small_parts(self, *, shared: bool) -> dict[Path, Stamps]:
        """Return the used parts of few runs, of the cache alone unless parts of the warehouse may be replaced."""
        small: dict[Path, Stamps] = {}
        for path, copied in self._used.items():
            may_be_replaced = shared or not self._is_shared(path)
            if may_be_replaced and len(copied) < MAX_RUNS // 2:
                small[path] = copied
        return small

    def leave_out_unreadable(self) -> bool:
        """Leave out the parts that cannot be read from now on, and return whether there are any new ones.

        Those in the cache are deleted. A part that another process has deleted since it was listed is one of them.
        """
        before = len(self._unreadable)
        for path in self._used:
            try:
                verify_footer(path)
                pq.ParquetFile(path, page_checksum_verification=True).read()
            except (OSError, pa.ArrowException):
                self._unreadable.add(path)
                if not (self._is_shared(path) and self._storage.is_local):
                    path.unlink(missing_ok=True)
        return len(self._unreadable) > before

    def _is_shared(self, path: Path) -> bool:
        """Whether a part is in the warehouse. Readers delete no such part."""
        return path.parent == self._shared

    def _select(self, stamps: Stamps, *, shared_alone: bool = False) -> Parts:
        """Use the parts whose files have not changed, and no run twice, the largest first. Return the others."""
        listed = list(self._listed(self._shared))
        if not shared_alone:
            listed += self._listed(self._cached)
        self._used = {}
        spare: dict[Path, Stamps] = {}
        for path, copied in sorted(listed, key=lambda part: (-len(part[1]), part[0].name)):
            is_current = copied.items() <= stamps.items()
            if is_current and self.run_ids.isdisjoint(copied):
                self._used[path] = copied
            else:
                spare[path] = copied
        return spare

    def _listed(self, folder: Path) -> Iterator[tuple[Path, Stamps]]:
        """Yield the readable parts in a folder, each with the stamps of the files that it copies."""
        for path in sorted(set(folder.glob("*.parquet")) - self._unreadable):
            with suppress(OSError, pa.ArrowException, KeyError, ValueError, TypeError):
                if path not in self._stamps:  # a part is never changed
                    verify_footer(path)
                    metadata = pq.read_metadata(path).metadata or {}
                    if metadata[_COLUMNS] != _columns(self._name):
                        continue
                    self._stamps[path] = dict(json.loads(metadata[_STAMPS]))
                yield path, self._stamps[path]

    def _fetch_shared(self) -> bool:
        """Copy the parts of a remote warehouse into the cache, each whole, and return whether a copy is new.

        Raises:
            WarehouseError: the storage fails.
        """
        if self._storage.is_local:
            return False
        listed = self._storage.compacted(self._name)
        in_cache = {path.stem for path in self._shared.glob("*.parquet")}
        for stem in in_cache - listed.keys():
            (self._shared / f"{stem}.parquet").unlink(missing_ok=True)
        new = sorted(listed.keys() - in_cache)
        with suppress(OSError):  # the cache cannot be written
            for stem in tracked(new, f"Copying the {self._name} of compacted runs, once"):
                data = self._storage.read(listed[stem])
                if data is not None:
                    self._shared.mkdir(parents=True, exist_ok=True, mode=0o700)
                    write_file(self._shared / f"{stem}.parquet", data)
        return bool(new)

    def _merged(
        self, stamps: Stamps, missing: Collection[str], replaced: Parts, minimum: int
    ) -> Iterator[_PartContent]:
        """Yield the content of new parts.

        They hold the missing runs, and those of the replaced parts whose files have not changed. Runs whose file cannot
        be read are left out.
        """
        run_ids = self._run_ids_to_copy(stamps, missing, replaced)
        chunks: list[list[str]] = []
        for start in range(0, len(run_ids), MAX_RUNS):
            chunk = run_ids[start : start + MAX_RUNS]
            if len(chunk) >= minimum:
                chunks.append(chunk)
        for chunk in tracked(chunks, f"Copying the {self._name} of {len(run_ids):,} runs, once"):
            with ThreadPoolExecutor(self._storage.readers) as pool:
                rows = pa.concat_tables(pool.map(self.rows, chunk))
            copied = {run_id: stamps[run_id] for run_id in sorted(pc.unique(rows["run_id"]).to_pylist())}
            if copied:
                yield _PartContent(stamps=copied, rows=rows)

    def _run_ids_to_copy(self, stamps: Stamps, missing: Collection[str], replaced: Parts) -> list[str]:
        """Return the missing runs, and those of the replaced parts whose files have not changed, in order."""
        run_ids = set(missing)
        for copied in replaced.values():
            for run_id, stamp in copied.items():
                if stamps.get(run_id) == stamp:
                    run_ids.add(run_id)
        for path, copied in self._used.items():
            if path not in replaced:
                run_ids.difference_update(copied)
        return sorted(run_ids)

    def rows(self, run_id: str) -> pa.Table:
        """Return the rows of a run from its file, or their digests. A file that cannot be read is left out.

        Raises:
            WarehouseError: a newer avss_dist wrote it, or the storage fails.
        """
        table = stored_table(self._name)
        path = self._storage.path(table, run_id, FILE_NAMES[table])
        try:
            with self._storage.filesystem.open_input_file(path) as file:
                rows = parse(file.read_buffer(), self._schema)
            run_ids = pa.repeat(run_id, len(rows)).cast(self._schema.field("run_id").type)
            rows = conform(rows.append_column("run_id", run_ids), self._schema)
            if self._name == DIGESTS:
                return digest(rows)
            return rows
        except FileNotFoundError:
            reason = "it is gone"
        except (OSError, pa.ArrowException) as error:
            reason = self._storage.damage(path, error)
        self._damaged.setdefault(run_id, Damage(table, reason))
        return encoded_schema(self._name).empty_table()


def stored_table(name: str) -> str:
    """Return the table whose files hold a table: that of digests is ``layer_stats``, of others itself."""
    return "layer_stats" if name == DIGESTS else name


def _columns(name: str) -> bytes:
    """Return a hash of the columns of a table. Parts of versions with other columns are ignored."""
    digest_version = DIGEST_VERSION if name == DIGESTS else 0
    version = f"{SCHEMA_VERSION} {digest_version}\n{PART_SCHEMAS[name]}"
    return hashlib.sha256(version.encode()).hexdigest().encode()


def _part_stem(name: str, stamps: Stamps) -> str:
    """Return the name of the file of a part, without its suffix. Parts that copy the same files have the same name."""
    content = _columns(name) + json.dumps(stamps, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:32]


def encoded_schema(name: str) -> pa.Schema:
    """Return the schema in which rows of a table are sorted. Then columns of text, of few values, are dictionaries."""
    if not SORTED_BY[name]:
        return PART_SCHEMAS[name]
    fields: list[tuple[str, pa.DataType]] = []
    for field in PART_SCHEMAS[name]:
        if pa.types.is_string(field.type):
            fields.append((field.name, pa.dictionary(pa.int32(), pa.string())))
        else:
            fields.append((field.name, field.type))
    return pa.schema(fields)


def _to_part(name: str, rows: pa.Table, stamps: Stamps, compression: str) -> pa.Buffer:
    """Return the bytes of a part. Rows with equal values in the columns `SORTED_BY` are a row group."""
    table = rows.unify_dictionaries().combine_chunks()
    codes = np.zeros(len(table), np.int64)
    for by in SORTED_BY[name]:
        column = table[by].combine_chunks().dictionary_encode()
        codes = codes * (len(column.dictionary) + 1) + column.indices.fill_null(-1).to_numpy() + 1
    if SORTED_BY[name]:
        order = np.argsort(codes, kind="stable")
        table = table.take(pa.array(order))
        codes = codes[order]
    metadata = {
        _STAMPS: json.dumps(dict(stamps)).encode(),
        _COLUMNS: _columns(name),
        b"avss_schema_version": str(SCHEMA_VERSION).encode(),
        **UNSIGNED_METADATA,
    }
    texts = [field.name for field in PART_SCHEMAS[name] if pa.types.is_string(field.type)]
    first_of_group = np.flatnonzero(np.diff(codes)) + 1
    bounds = [0, *first_of_group.tolist(), len(table)]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=compression,
        use_dictionary=texts,
        write_statistics=["run_id", *SORTED_BY[name]],  # rows of a part are selected by nothing else
        store_schema=False,
        write_page_checksum=True,
    ) as writer:
        for start, stop in pairwise(bounds):
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
        writer.add_key_value_metadata(metadata)
    return signed(sink.getvalue(), footer_alone=True)


DIGEST_VERSION = 1  # of the formulas
_COPIED = (
    "run_id",
    "layer",
    "site",
    "count",
    "mean",
    "m2",
    "thresholds",
    "near_zero",
    "zero_count",
    "nonfinite_count",
    "max_abs",
    "unit_count",
    "token_count",
    "relative_magnitude_sum",
    "first_count",
    "first_mean",
    "first_m2",
)
_UNIT_LISTS = ("unit_sum", "unit_sum_sq")
SOURCE = pa.schema([SCHEMAS["layer_stats"].field(name) for name in (*_COPIED, *_UNIT_LISTS)])
"""Columns of ``layer_stats`` that a digest is made of."""
DIGEST = pa.schema(
    [
        *(SCHEMAS["layer_stats"].field(name) for name in _COPIED),
        ("mean_unit", pa.int64()),
        ("mean_unit_share", pa.float64()),
        ("element_unit", pa.int64()),
        ("element_unit_share", pa.float64()),
    ]
)
"""Columns of a digest: those of ``layer_stats``, and two units with the largest share of a variance.

``mean_unit`` is the unit with the largest share of the variance over unit means, ``element_unit`` the one with the
largest share of the variance over elements. They are null if a site has no units, or no variance.
"""
PART_SCHEMAS = {**SCHEMAS, DIGESTS: DIGEST}
"""Schemas of the tables that may have parts."""


def digest(stats: pa.Table) -> pa.Table:
    """Return the digest of rows of ``layer_stats``, in their order.

    Args:
        stats: rows with the columns `SOURCE`.

    Raises:
        pa.ArrowInvalid: a row is damaged.
    """
    for reason in damaged_runs("layer_stats", stats).values():
        raise pa.ArrowInvalid(reason)
    table = stats.combine_chunks()
    columns = {name: table[name] for name in _COPIED}
    sum_starts, sums = _lists(table, "unit_sum")
    square_starts, squares = _lists(table, "unit_sum_sq")
    counts = table["unit_count"].to_numpy()
    sizes = np.diff(sum_starts)
    has_units = (sizes > 0) & (np.diff(square_starts) == sizes) & (counts > 0)
    of_means = _LargestUnits(len(table))
    of_elements = _LargestUnits(len(table))
    # Rows with equally many units are computed together.
    for size in np.unique(sizes[has_units]):
        rows = np.flatnonzero((sizes == size) & has_units)
        places = np.arange(size)
        unit_sums = sums[sum_starts[rows, None] + places]
        unit_squares = squares[square_starts[rows, None] + places]
        tokens = counts[rows, None].astype(np.float64)
        means = unit_sums / tokens
        of_means.set(rows, (means - means.mean(axis=1, keepdims=True)) ** 2)
        mean = unit_sums.sum(axis=1, keepdims=True) / (tokens * size)
        of_elements.set(rows, np.maximum(unit_squares - 2 * mean * unit_sums + tokens * mean**2, 0))
    columns |= of_means.columns("mean_unit") | of_elements.columns("element_unit")
    return pa.table([columns[field.name] for field in DIGEST], schema=DIGEST)


class _LargestUnits:
    """The unit with the largest share of a variance, for each row."""

    def __init__(self, num_rows: int) -> None:
        self._units = np.zeros(num_rows, np.int64)
        self._shares = np.full(num_rows, np.nan)

    def set(self, rows: NDArray[np.int64], variances: NDArray[np.float64]) -> None:
        """Set the units of some rows, whose variance over units is ``variances``, [rows, units]."""
        total = variances.sum(axis=1, keepdims=True)
        shares = np.divide(variances, total, out=np.full(variances.shape, np.nan), where=total > 0)
        self._shares[rows] = shares.max(axis=1)
        self._units[rows] = shares.argmax(axis=1)

    def columns(self, name: str) -> dict[str, pa.Array]:
        """Return the columns of a digest. They are null in rows without units, or without a variance."""
        undefined = ~np.isfinite(self._shares)
        return {
            name: pa.array(self._units, pa.int64(), mask=undefined),
            f"{name}_share": pa.array(self._shares, pa.float64(), mask=undefined),
        }


def _lists(table: pa.Table, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the offsets of a column of lists, and the values of all lists."""
    column = table[name].combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.to_numpy(zero_copy_only=False).astype(np.float64)
    return offsets, values
