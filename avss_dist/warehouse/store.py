"""The warehouse: Hive-partitioned Parquet (``run_id`` is in the path alone), committed atomically."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from avss_dist.errors import StorageFull, WarehouseError, nearest, require_known, without_secrets
from avss_dist.settings import SCHEMA_VERSION
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult
from avss_dist.system.staging import remove_leftovers, staged_file
from avss_dist.warehouse.encoding import (
    decode_shard,
    encode,
    encode_shard,
    parse,
    refuse_newer,
    refuse_newer_version,
    to_columns,
    to_stats,
)
from avss_dist.warehouse.schema import SCHEMAS, TABLES, RunIdentity

AT_ONCE = 8  # partials that are read together
_WITH_SECRETS: dict[str, str] = {}  # by root: a warehouse is opened again by its name while the process lives


class Store:
    """The Parquet contract under a folder or an ``s3://``, ``gs://``, ``hdfs://`` or ``file://`` URI.

    Opening it reads and writes nothing. ``root`` is its name, without any secret that the URI has. Every method raises
    WarehouseError when the storage fails, a file is damaged or a newer avss_dist wrote it, and ValueError for a run id
    that is not made of ``[A-Za-z0-9._-]``.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = without_secrets(str(root))
        if self.root != str(root):
            _WITH_SECRETS[self.root] = str(root)
        try:
            self._fs, path = pafs.FileSystem.from_uri(_uri(_WITH_SECRETS.get(self.root, self.root)))
        except (OSError, pa.ArrowException) as error:
            hint = "Give a folder, or an s3://, gs://, hdfs:// or file:// URI."
            raise WarehouseError(f"Cannot open {self.root}: {_reason(error)}", hint) from None
        self._base = path.rstrip("/")

    def create(self) -> None:
        """Make the warehouse, and prove with a small file that it can be written."""
        probe = f"{self._base}/runs/.probe-{os.getpid()}-{secrets.token_hex(4)}"
        self._commit(probe, b"avss")
        self._fs.delete_file(probe)
        if self._fs.type_name == "local":
            remove_leftovers(Path(self._base))

    def write_shard(self, run: RunIdentity, result: ShardResult) -> None:
        """Keep one shard's result, lossless to the last bit, so that a resumed run need not compute it again."""
        path = self._path("shard_stats", run.run_id, result.shard_id)
        self._commit(path, encode_shard(run, result).data)

    def read_shards(self, run_id: str, expected: Mapping[int, str]) -> list[ShardResult]:
        """The partials of a run, in the order of ``expected`` (content hash by shard id), less those not whole."""

        def read(shard_id: int) -> ShardResult | None:
            data = self._read(self._path("shard_stats", run_id, shard_id))
            shard = data and decode_shard(data, run_id)
            return shard if shard and (shard.shard_id, shard.content_hash) == (shard_id, expected[shard_id]) else None

        with ThreadPoolExecutor() as pool:
            return [shard for shard in pool.map(read, expected) if shard]

    def each_shard(self, run_id: str, expected: Mapping[int, str]) -> Iterator[ShardResult]:
        """As `read_shards`, in the order of the ids, a few in memory at a time."""
        ids = sorted(expected)
        for i in range(0, len(ids), AT_ONCE):
            yield from self.read_shards(run_id, {k: expected[k] for k in ids[i : i + AT_ONCE]})

    def write_layer_stats(self, run: RunIdentity, layers: Sequence[str], stats: Mapping[LayerKey, LayerStats]) -> None:
        """Write the merged statistics of a run; ``layers`` are the module paths of all its layers, in order."""
        columns = to_columns(run, layers, stats)
        self._commit(self._path("layer_stats", run.run_id), encode("layer_stats", run.run_id, columns))

    def read_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """The merged statistics of a run, as written; WarehouseError when it has none."""
        data = self._read(path := self._path("layer_stats", run_id))
        if data is None:
            known = sorted(set(self._files("layer_stats").values())) or ["none yet"]
            raise WarehouseError(f"{self.root} has no layer statistics of run '{run_id}'.", nearest(run_id, known))
        with _reading(path):
            return to_stats(parse(data))

    def write_scores(self, run: RunIdentity, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the scores of a run. Rows lack the columns of RunIdentity; None, NaN and missing become null."""
        self._write_rows("scores", run.run_id, [{**row, **asdict(run)} for row in rows])

    def write_run(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a run exist, after all its other files. A failed run never replaces a done one."""
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status must be done or failed, not {row['status']!r}")
        if row["status"] == "failed" and (self.run(row["run_id"]) or {}).get("status") == "done":
            return
        clean = {name: without_secrets(value) if isinstance(value, str) else value for name, value in row.items()}
        self._write_rows("runs", row["run_id"], [{**clean, "schema_version": SCHEMA_VERSION}])

    def write_cell(self, run: RunIdentity, cell_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep what one cell of an evaluation measured; rows lack the columns of RunIdentity."""
        self._write_rows("cells", run.run_id, [{**row, **asdict(run)} for row in rows], file=cell_id)

    def cell_ids(self, run_id: str) -> set[str]:
        """The cells of an evaluation that are measured."""
        return {Path(path).stem for path, run in self._files("cells").items() if run == run_id}

    def write_evaluations(self, run: RunIdentity, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what the cells of an evaluation say together; rows lack the columns of RunIdentity."""
        self._write_rows("evaluations", run.run_id, [{**row, **asdict(run)} for row in rows])

    def write_experiment(self, run: RunIdentity, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what an experiment says of the scores of a run; rows lack the columns of RunIdentity."""
        self._write_rows("experiments", run.run_id, [{**row, **asdict(run)} for row in rows], file=name)

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The ``runs`` row of a run by column, ``versions`` as a dict; None when it has none."""
        if (data := self._read(path := self._path("runs", run_id))) is None:
            return None
        with _reading(path):
            row = parse(data).to_pylist(maps_as_pydicts="strict")[0]
        return {**dict.fromkeys(SCHEMAS["runs"].names), **row, "run_id": run_id}

    def table(
        self,
        name: str,
        *,
        run_ids: Collection[str] | None = None,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
    ) -> pa.Table:
        """The rows of `dataset`: of the runs ``run_ids`` (an unknown one adds none), with ``columns`` in that order.

        ``where`` is true of each, such as ``pc.field("site") == "block"``.
        """
        dataset, schema = self.dataset(name), SCHEMAS[name]
        wanted = [require_known("column", c, schema.names, WarehouseError) for c in columns or schema.names]
        if dataset is None:
            return schema.empty_table().select(wanted)
        if run_ids is not None:
            chosen = pc.field("run_id").isin(pa.array(run_ids, pa.string()))
            where = chosen if where is None else chosen & where
        with _reading(f"{self.root}/{name}"):
            return dataset.to_table(wanted, filter=where)

    def stats_by_run(self, run_ids: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Rows of ``layer_stats`` as `table` gives them, run after run: one of them is in memory at a time."""
        dataset = self.dataset("layer_stats")
        if dataset is None:
            return
        files: dict[str, list[ds.Fragment]] = {}
        for file in dataset.get_fragments():
            files.setdefault(ds.get_partition_keys(file.partition_expression)["run_id"], []).append(file)
        for run_id in run_ids:
            with _reading(f"{self.root}/layer_stats"):
                rows = [file.to_table(dataset.schema, list(columns)) for file in files.get(run_id, ())]
            if rows:
                yield run_id, pa.concat_tables(rows)

    def dataset(self, name: str) -> ds.Dataset | None:
        """Rows of whole runs in ``SCHEMAS[name]``, or None; every row of ``runs`` and of evaluations."""
        require_known("table", name, TABLES, WarehouseError)
        runs, done = self._runs()
        return runs if name == "runs" else self._dataset(name, done)

    def _runs(self) -> tuple[ds.Dataset, set[str]]:
        """The dataset of ``runs``, which this version can read, and the ids of those that are done."""
        runs = self._dataset("runs", ())
        if runs is None and self._listed("cells"):  # of models that were not scored
            return ds.dataset(SCHEMAS["runs"].empty_table()), set()
        if runs is None:
            exists = self._fs.get_file_info(f"{self._base}/runs").type == pafs.FileType.Directory
            problem = "has no runs yet" if exists else "is not a warehouse: it has no runs folder"
            raise WarehouseError(f"{self.root} {problem}.", "avss score makes one; a run counts once it has finished.")
        with _reading(f"{self.root}/runs"):
            refuse_newer(runs)
            rows = runs.to_table(["run_id", "status", "schema_version"]).to_pylist()
        refuse_newer_version(max(row["schema_version"] or 0 for row in rows))
        return runs, {row["run_id"] for row in rows if row["status"] == "done"}

    def _dataset(self, name: str, done: Collection[str]) -> ds.Dataset | None:
        every = name in ("runs", "evaluations", "cells", "experiments")
        files = {path: stamp for path, (run_id, stamp) in self._listed(name).items() if every or run_id in done}
        return self._open(name, files) if files else None

    def _open(self, name: str, files: Mapping[str, str]) -> ds.Dataset:
        """The rows of some files of a table; ``files`` holds size and time by path."""
        hive = ds.partitioning(pa.schema([("run_id", pa.string())]), flavor="hive")
        return ds.dataset(sorted(files), SCHEMAS[name], "parquet", self._fs, hive)

    def _files(self, name: str) -> dict[str, str]:
        """Run id by path, of every Parquet file of a table."""
        return {path: run_id for path, (run_id, _) in self._listed(name).items()}

    def _listed(self, name: str) -> dict[str, tuple[str, str]]:
        """Run id, and size and time of change, by path, of every Parquet file of a table."""
        selector = pafs.FileSelector(f"{self._base}/{name}", recursive=True, allow_not_found=True)
        with _reading(f"{self.root}/{name}"):
            infos = self._fs.get_file_info(selector)
        matches = ((info, re.search(r"/run_id=([\w.-]+)/[^./][^/]*\.parquet$", info.path)) for info in infos)
        return {info.path: (match[1], f"{info.size} {info.mtime_ns}") for info, match in matches if match}

    def _path(self, name: str, run_id: str, shard_id: int | None = None, file: str | None = None) -> str:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", run_id):
            raise ValueError(f"a run id is made of letters, digits, dots, hyphens and underscores, not {run_id!r}")
        file = file or (("run" if name == "runs" else name) if shard_id is None else f"shard-{shard_id:05d}")
        return f"{self._base}/{name}/run_id={run_id}/{file}.parquet"

    def _read(self, path: str) -> pa.Buffer | None:
        """A whole file; None when there is none."""
        with _reading(path), suppress(FileNotFoundError), self._fs.open_input_file(path) as file:
            return file.read_buffer()
        return None

    def _write_rows(
        self, name: str, run_id: str, rows: Sequence[Mapping[str, Any]], *, file: str | None = None
    ) -> None:
        """Rows lack what is null; of floats, NaN is null too."""
        for column in {column for row in rows for column in row}:
            require_known("column", column, SCHEMAS[name].names, WarehouseError)
        columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type, from_pandas=True) for f in SCHEMAS[name]}
        self._commit(self._path(name, run_id, file=file), encode(name, run_id, columns))

    def _commit(self, path: str, data: pa.Buffer | bytes) -> None:
        """Write a file in one step. An object of an object store appears whole, when its stream is closed."""
        try:
            if self._fs.type_name == "local":
                return _replace(Path(path), data, Path(self._base))
            with self._fs.open_output_stream(path) as stream:
                stream.write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                hint = "Check the address, and who may write there."
                raise WarehouseError(f"Cannot write {self.root}: {_reason(error)}.", hint) from error
            kept = sum(f"/shard_stats/{path.split('/')[-2]}/" in file for file in self._files("shard_stats"))
            hint = f"Free some and run the same command again: {kept} shard{'s are' if kept != 1 else ' is'} kept."
            raise StorageFull(f"No space left on {self.root}.", hint) from error


def _uri(root: str) -> str:
    """A folder as a URI. To an object store a small file goes in one request, which leaves nothing half done."""
    if not re.match(r"[A-Za-z][\w+.-]+:/", root):
        return Path(root).expanduser().absolute().as_uri()
    if not root.startswith("s3:") or "allow_delayed_open=" in root:
        return root
    return f"{root}{'&' if '?' in root else '?'}allow_delayed_open=true"


def _reason(error: Exception) -> str:
    """Why storage failed; of what an object store says, the part that tells people something."""
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"^.*AWS Error | \(Request ID: .*\)$", "", text, flags=re.DOTALL)


def _replace(path: Path, data: pa.Buffer | bytes, staging: Path) -> None:
    """Write a local file aside, in ``staging`` (Polars reads every file of a table's folder), and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path, folder=staging, durable=True) as staged:
        staged.write_bytes(data)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        remote = "AWS Error" in str(error)
        hint = "Check the address, and who may read there." if remote else "avss score --fresh mends a damaged file."
        raise WarehouseError(f"Cannot read {path}: {_reason(error)}", hint) from error
