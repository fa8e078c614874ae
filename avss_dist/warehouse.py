"""The warehouse: Hive-partitioned Parquet (``run_id`` is in the path alone), committed atomically."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from avss_dist.config import SCHEMA_VERSION
from avss_dist.errors import WarehouseError, nearest, require_known
from avss_dist.stats import HISTOGRAM_BINS, LayerKey, LayerStats, ShardResult

_VERSION, _HEADER = b"avss_schema_version", b"avss_header"
_ARROW = {"string": pa.string(), "int32": pa.int32(), "int": pa.int64(), "float": pa.float64()}
_ARROW |= {"strings": pa.list_(pa.string()), "Int16": pa.list_(pa.int16()), "time": pa.timestamp("us", "UTC")}
_ARROW |= {"Int64": pa.list_(pa.int64()), "Float64": pa.list_(pa.float64()), "map": pa.map_(pa.string(), pa.string())}
_STATE = [f.name for f in fields(LayerStats) if f.name != "histogram"]


def _schema(*groups: str) -> pa.Schema:
    """A schema from groups such as ``"string: run_id model"``."""
    split = (group.split(": ") for group in groups)
    return pa.schema([(name, _ARROW[kind]) for kind, names in split for name in names.split()])


_RUN, _CREATED = "string: run_id model revision family", "time: created_at"
_PLACE = ("int32: layer", "string: layer_name", "float: depth", "string: site")
_STATS = [f"{f.type}: {f.name}" for f in fields(LayerStats) if f.name in _STATE]
_STATS += ["Int16: histogram_bin", "Int64: histogram_count"]
SCHEMAS: dict[str, pa.Schema] = {
    "runs": _schema(
        *("string: run_id fingerprint status error", _CREATED, "string: model revision family architecture"),
        *("int: num_layers hidden_size num_parameters", "string: dtype attention_implementation partition"),
        *("int: replicas", "string: corpus corpus_fingerprint tokens_fingerprint", "int: num_sequences num_tokens"),
        *("int: sequence_length batch_size", "Float64: thresholds", "strings: sites", "int: num_shards"),
        *("string: device", "int32: threads", "float: wall_seconds tokens_per_second", "int: peak_memory_bytes"),
        *("string: settings", "strings: notes", "map: versions", "int32: schema_version"),
    ),
    "scores": _schema(
        *(_RUN, *_PLACE, "string: recipe", "float: threshold", "string: threshold_kind", "int: count"),
        "float: near_zero_count variance sparsity nav nas avss avss_smoothed avss_normalized avss_cumulative",
        *("int32: rank", "float: avss_low avss_high lowest_set_probability", "string: quality"),
        "float: block_influence angular_distance relative_magnitude update_variance_ratio",
    ),
    "layer_stats": _schema(_RUN, *_PLACE, *_STATS),
    "shard_stats": _schema(_RUN, "int: shard_id", "string: content_hash", *_PLACE, *_STATS),
    "evaluations": _schema(_RUN, "string: plan task metric", "float: value stderr", "int: num_samples", _CREATED),
}
TABLES = ("runs", "scores", "layer_stats", "shard_stats", "evaluations")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Whose rows these are: the columns that every table repeats."""

    run_id: str
    model: str
    revision: str | None
    family: str


class Store:
    """The Parquet contract under a folder or an ``s3://``, ``gs://``, ``hdfs://`` or ``file://`` URI.

    Opening it reads and writes nothing. Every method raises WarehouseError when the storage fails, a file is damaged or
    a newer avss_dist wrote it, and ValueError for a run id that is not made of ``[A-Za-z0-9._-]``.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        is_uri = re.match(r"[A-Za-z][\w+.-]+:/", self.root)
        try:
            uri = self.root if is_uri else Path(self.root).expanduser().absolute().as_uri()
            self._fs, path = pafs.FileSystem.from_uri(uri)
        except (OSError, pa.ArrowException) as error:
            hint = "Give a folder, or an s3://, gs://, hdfs:// or file:// URI."
            raise WarehouseError(f"Cannot open {self.root}: {error}", hint) from error
        self._base = path.rstrip("/")

    def create(self) -> None:
        """Make the warehouse, and prove with a small file that it can be written."""
        probe = f"{self._base}/runs/.probe-{os.getpid()}-{secrets.token_hex(4)}"
        self._commit(probe, b"avss")
        self._fs.delete_file(probe)

    def write_shard(self, run: RunIdentity, result: ShardResult) -> None:
        """Keep one shard's result, lossless to the last bit, so that a resumed run need not compute it again."""
        header = {f.name: getattr(result, f.name) for f in fields(ShardResult) if f.name != "stats"}
        shard = {"shard_id": result.shard_id, "content_hash": result.content_hash}
        rows = [row | shard for row in _to_rows(run, result.layers, result.stats)]
        self._write("shard_stats", run.run_id, rows, header)

    def read_shards(self, run_id: str, expected: Mapping[int, str]) -> list[ShardResult]:
        """The partials of a run, in the order of ``expected`` (content hash by shard id), less those not whole."""

        def read(shard_id: int) -> ShardResult | None:
            data = self._read(self._path("shard_stats", run_id, shard_id))
            shard = data and _to_shard(data, run_id)
            return shard if shard and (shard.shard_id, shard.content_hash) == (shard_id, expected[shard_id]) else None

        with ThreadPoolExecutor() as pool:
            return [shard for shard in pool.map(read, expected) if shard]

    def write_layer_stats(self, run: RunIdentity, layers: Sequence[str], stats: Mapping[LayerKey, LayerStats]) -> None:
        """Write the merged statistics of a run; ``layers`` are the module paths of all its layers, in order."""
        self._write("layer_stats", run.run_id, _to_rows(run, layers, stats))

    def read_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """The merged statistics of a run, as written; WarehouseError when it has none."""
        data = self._read(path := self._path("layer_stats", run_id))
        if data is None:
            known = sorted(set(self._files("layer_stats").values())) or ["none yet"]
            raise WarehouseError(f"{self.root} has no layer statistics of run '{run_id}'.", nearest(run_id, known))
        with _reading(path):
            return _to_stats(_parse(data))

    def write_scores(self, run: RunIdentity, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the scores of a run. Rows lack the columns of RunIdentity; None, NaN and missing become null."""
        self._write("scores", run.run_id, [{**row, **asdict(run)} for row in rows])

    def write_run(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a run exist, after all its other files. A failed run never replaces a done one."""
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status must be done or failed, not {row['status']!r}")
        if row["status"] == "failed" and (self.run(row["run_id"]) or {}).get("status") == "done":
            return
        self._write("runs", row["run_id"], [{**row, "schema_version": SCHEMA_VERSION}])

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The ``runs`` row of a run by column, ``versions`` as a dict; None when it has none."""
        if (data := self._read(path := self._path("runs", run_id))) is None:
            return None
        with _reading(path):
            row = _parse(data).to_pylist(maps_as_pydicts="strict")[0]
        return {**dict.fromkeys(SCHEMAS["runs"].names), **row, "run_id": run_id}

    def table(
        self, name: str, *, run_ids: Collection[str] | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """The rows of `dataset`: of the runs ``run_ids`` (an unknown one adds none), with ``columns`` in that order."""
        dataset, schema = self.dataset(name), SCHEMAS[name]
        wanted = [require_known("column", c, schema.names, WarehouseError) for c in columns or schema.names]
        if dataset is None:
            return schema.empty_table().select(wanted)
        with _reading(f"{self.root}/{name}"):
            return dataset.to_table(wanted, filter=None if run_ids is None else ds.field("run_id").isin(list(run_ids)))

    def dataset(self, name: str) -> ds.Dataset | None:
        """Rows of whole runs in ``SCHEMAS[name]``, or None; every row of ``runs`` and ``evaluations``."""
        require_known("table", name, TABLES, WarehouseError)
        runs, done = self._runs()
        return runs if name == "runs" else self._dataset(name, done)

    def _runs(self) -> tuple[ds.Dataset, set[str]]:
        """The dataset of ``runs``, which this version can read, and the ids of those that are done."""
        runs = self._dataset("runs", ())
        if runs is None:
            exists = self._fs.get_file_info(f"{self._base}/runs").type == pafs.FileType.Directory
            problem = "has no runs yet" if exists else "is not a warehouse: it has no runs folder"
            raise WarehouseError(f"{self.root} {problem}.", "avss score makes one; a run counts once it has finished.")
        with _reading(f"{self.root}/runs"), ThreadPoolExecutor() as pool:
            list(pool.map(lambda f: _refuse_newer((f.metadata.metadata or {}).get(_VERSION)), runs.get_fragments()))
            rows = runs.to_table(["run_id", "status", "schema_version"]).to_pylist()
        _refuse_newer(max(row["schema_version"] or 0 for row in rows))
        return runs, {row["run_id"] for row in rows if row["status"] == "done"}

    def _dataset(self, name: str, done: Collection[str]) -> ds.Dataset | None:
        every = name in ("runs", "evaluations")
        paths = sorted(path for path, run_id in self._files(name).items() if every or run_id in done)
        hive = ds.partitioning(pa.schema([("run_id", pa.string())]), flavor="hive")
        return ds.dataset(paths, SCHEMAS[name], "parquet", self._fs, hive) if paths else None

    def _files(self, name: str) -> dict[str, str]:
        """Run id by path, of every Parquet file of a table."""
        selector = pafs.FileSelector(f"{self._base}/{name}", recursive=True, allow_not_found=True)
        with _reading(f"{self.root}/{name}"):
            paths = [info.path for info in self._fs.get_file_info(selector)]
        matches = ((path, re.search(r"/run_id=([\w.-]+)/[^./][^/]*\.parquet$", path)) for path in paths)
        return {path: match[1] for path, match in matches if match}

    def _path(self, name: str, run_id: str, shard_id: int | None = None) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", run_id):
            raise ValueError(f"a run id is made of letters, digits, dots, hyphens and underscores, not {run_id!r}")
        file = ("run" if name == "runs" else name) if shard_id is None else f"shard-{shard_id:05d}"
        return f"{self._base}/{name}/run_id={run_id}/{file}.parquet"

    def _read(self, path: str) -> pa.Buffer | None:
        """A whole file; None when there is none."""
        with _reading(path), suppress(FileNotFoundError), self._fs.open_input_file(path) as file:
            return file.read_buffer()
        return None

    def _write(self, name: str, run_id: str, rows: Sequence[Mapping[str, Any]], shard: Mapping[str, Any] = {}) -> None:
        for column in {column for row in rows for column in row}:
            require_known("column", column, SCHEMAS[name].names, WarehouseError)
        header = {_VERSION: str(SCHEMA_VERSION), _HEADER: json.dumps({"run_id": run_id, **shard})}
        schema = SCHEMAS[name].remove(0).with_metadata(header)
        nulls = name in ("runs", "scores")  # of NaN; statistics keep theirs
        arrays = [pa.array([row.get(f.name) for row in rows], f.type, from_pandas=nulls) for f in schema]
        table, sink = pa.Table.from_arrays(arrays, schema=schema), pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=1_000_000, write_page_checksum=True)
        self._commit(self._path(name, run_id, shard.get("shard_id")), sink.getvalue())

    def _commit(self, path: str, data: pa.Buffer | bytes) -> None:
        """Write a file in one step. An object of an object store appears whole, when its stream is closed."""
        try:
            if self._fs.type_name == "local":
                return _replace(Path(path), data, Path(self._base))
            with self._fs.open_output_stream(path) as stream:
                stream.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise WarehouseError(
                    f"Cannot write {self.root}: {error.strerror or error}.", "Check who may write there."
                ) from error
            kept = sum(f"/shard_stats/{path.split('/')[-2]}/" in file for file in self._files("shard_stats"))
            hint = f"Free some and run the same command again: {kept} shard{'s are' if kept != 1 else ' is'} kept."
            raise WarehouseError(f"No space left on {self.root}.", hint) from error


def _replace(path: Path, data: pa.Buffer | bytes, staging: Path) -> None:
    """Write a local file aside, in ``staging`` (Polars reads every file of a table's folder), and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = staging / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise WarehouseError(f"Cannot read {path}: {error}", "avss score --fresh mends a damaged file.") from error


def _refuse_newer(version: bytes | int | None) -> None:
    if (number := int(version or 0)) > SCHEMA_VERSION:
        message = f"Written by a newer avss_dist: schema {number}, this one reads up to {SCHEMA_VERSION}."
        raise WarehouseError(message, "pip install -U avss_dist")


def _parse(data: pa.Buffer) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    _refuse_newer((file.schema_arrow.metadata or {}).get(_VERSION))
    return file.read(use_threads=False)


def _to_rows(run: RunIdentity, layers: Sequence[str], stats: Mapping[LayerKey, LayerStats]) -> list[dict[str, Any]]:
    rows = []
    for (layer, site), state in sorted(stats.items(), key=lambda item: item[0]):
        bins = np.flatnonzero(state.histogram)
        place = {"layer": layer, "layer_name": layers[layer], "depth": (layer + 0.5) / len(layers), "site": site}
        histogram = {"histogram_bin": bins.astype(np.int16), "histogram_count": state.histogram[bins]}
        rows.append(asdict(run) | place | {name: getattr(state, name) for name in _STATE} | histogram)
    return rows


def _to_stats(table: pa.Table) -> dict[LayerKey, LayerStats]:
    """The inverse of `_to_rows`; a field that an older file lacks keeps its default."""
    cells = {
        name: [cell.values.to_numpy() for cell in column] if pa.types.is_list(column.type) else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    stats = {}
    for i, key in enumerate(zip(cells["layer"], cells["site"], strict=True)):
        histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        histogram[cells["histogram_bin"][i]] = cells["histogram_count"][i]
        stats[key] = LayerStats(histogram=histogram, **{name: cells[name][i] for name in _STATE if name in cells})
    return stats


def _to_shard(data: pa.Buffer, run_id: str) -> ShardResult | None:
    """A partial, or None when it is damaged or not of this run."""
    try:
        table = _parse(data)
    except (OSError, pa.ArrowException):
        return None
    header = json.loads((table.schema.metadata or {}).get(_HEADER, b"{}"))
    if header.pop("run_id", None) != run_id or "layers" not in header:
        return None
    return ShardResult(**header | {"layers": tuple(header["layers"]), "stats": _to_stats(table)})
