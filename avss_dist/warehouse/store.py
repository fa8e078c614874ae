"""The warehouse as Hive-partitioned Parquet (``run_id`` is in the path alone): written atomically, read as tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Unpack

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from avss_dist.errors import DamagedFile, WarehouseError, nearest, require_known, without_secrets
from avss_dist.settings import SCHEMA_VERSION
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, StratumKey
from avss_dist.text import RedactedURI, count_of
from avss_dist.warehouse.cache import Files, copied_rows
from avss_dist.warehouse.checks import RUN_COLUMNS, checked_rows, damaged_runs
from avss_dist.warehouse.encoding import (
    decode_shard,
    encode,
    encode_shard,
    parse,
    refuse_newer,
    refuse_newer_version,
    to_columns,
    to_stats,
    to_strata,
)
from avss_dist.warehouse.experts import encode_beside
from avss_dist.warehouse.schema import DAMAGED, SCHEMAS, TABLES, UNFINISHED_RUNS, RunIdentity, Selection
from avss_dist.warehouse.storage import PLAN, Storage

T = TypeVar("T")
LayersStats = Mapping[LayerKey, LayerStats]
StrataStats = Mapping[StratumKey, LayerStats]

RUN_FOLDER = "run_id="  # before a run's id: the name of its folder in a table
AT_ONCE = 8  # partials that are read together


class Store:
    """The tables of a warehouse, to write and to read.

    Every method raises WarehouseError when the storage fails, a file is damaged or a newer avss_dist wrote it,
    StorageFull where there is no space left, and ValueError for a run id that is not made of ``[A-Za-z0-9._-]``.

    Args:
        root: a folder, or an ``s3://``, ``gs://``, ``hdfs://`` or ``file://`` URI. Opening it reads and writes nothing.
        cached: read tables of many files from copies in the user's cache, see `cache`.

    Attributes:
        storage: where its files are.
    """

    def __init__(self, root: str | Path, *, cached: bool = False) -> None:
        self.storage, self._cached = Storage(root), cached
        self._unreadable: dict[tuple[str, str], str] = {}  # the reason by path and time of change
        self._damaged: dict[str, str] = {}
        self._cell_ids: dict[str, set[str]] = {}  # of the evaluations whose folder was listed, by run id
        self._cell_rows: dict[tuple[str, str], pa.Table] = {}  # written or read by this store, by run id and cell id

    @property
    def root(self) -> RedactedURI:
        """The name of the warehouse: what it was opened by, without the keys of a URI."""
        return self.storage.root

    @property
    def damaged(self) -> Mapping[str, str]:
        """Runs of which a file or a row could not be read, and was left out, by id; and why."""
        return self._damaged

    def create(self) -> None:
        """Make the warehouse, and prove with a small file that it can be written."""
        self.storage.create()

    def write_shard(self, run: RunIdentity, result: ShardResult) -> None:
        """Keep a shard's result, lossless to the last bit, to resume. What is beside it goes first: it is there too."""
        for table, data in encode_beside(run, result):
            self.storage.write(self._shard_path(run.run_id, result.shard_id, table), data)
        self.storage.write(self._shard_path(run.run_id, result.shard_id), encode_shard(run, result).data)

    def read_shards(self, run_id: str, expected: Mapping[int, str]) -> list[ShardResult]:
        """The partials of a run, in the order of ``expected`` (content hash by shard id), less those not whole."""

        def read(shard_id: int) -> ShardResult | None:
            data = self.storage.read(self._shard_path(run_id, shard_id))
            shard = data and decode_shard(data, run_id)
            return shard if shard and (shard.shard_id, shard.content_hash) == (shard_id, expected[shard_id]) else None

        with ThreadPoolExecutor() as pool:
            return [shard for shard in pool.map(read, expected) if shard]

    def each_shard(self, run_id: str, expected: Mapping[int, str]) -> Iterator[ShardResult]:
        """As `read_shards`, in the order of the ids, a few in memory at a time."""
        ids = sorted(expected)
        for i in range(0, len(ids), AT_ONCE):
            yield from self.read_shards(run_id, {k: expected[k] for k in ids[i : i + AT_ONCE]})

    def write_plan(self, run_id: str, **plan: Any) -> None:
        """Write what a run will have, for `unfinished`, until `finish_plan`.

        Args:
            plan: the columns of `schema.UNFINISHED_RUNS`; ``run_id`` and ``kept_shards`` are added when it is read.
        """
        self.storage.write(self.storage.plan_path(run_id), json.dumps(plan).encode())

    def finish_plan(self, run_id: str) -> None:
        """Delete what `write_plan` wrote: the run has its row."""
        self.storage.delete(self.storage.plan_path(run_id))

    def unfinished(self) -> pa.Table:
        """Return the runs that have begun and have no row: interrupted ones, and those that are measured now.

        It takes a listing of two folders, and of one more for each such run.

        Returns:
            The columns of `schema.UNFINISHED_RUNS`, null where an earlier version has not kept them; newest run first.
        """
        names = self.storage.names("runs")
        ended, planned = _ids(names, RUN_FOLDER), _ids(names, PLAN)
        begun = _ids(self.storage.names("shard_stats"), RUN_FOLDER)
        rows = []
        for run_id in sorted((begun | planned) - ended):
            plan: dict[str, Any] = {}
            data = self.storage.read(self.storage.plan_path(run_id)) if run_id in planned else None
            with suppress(ValueError):  # a file that was not written whole tells nothing
                plan = json.loads(data.to_pybytes()) if data else {}
            rows.append({**plan, "run_id": run_id, "kept_shards": self.num_partials(run_id)})
        rows.sort(key=lambda row: row.get("started_at") or "", reverse=True)
        return pa.Table.from_pylist(rows, UNFINISHED_RUNS)

    def num_partials(self, run_id: str) -> int:
        """Return how many shards of a run are kept, by the names of their files."""
        return len(self.storage.files("shard_stats", run_id))

    def write_layer_stats(
        self, run: RunIdentity, layers: Sequence[str], stats: LayersStats, strata: StrataStats | None = None
    ) -> None:
        """Write the merged statistics of a run; ``layers`` are the module paths of all its layers, in order."""
        self._write("layer_stats", run.run_id, to_columns(run, layers, stats))
        if strata:
            self._write("stratum_stats", run.run_id, to_columns(run, layers, strata))

    def read_stratum_stats(self, run_id: str) -> dict[StratumKey, LayerStats]:
        """The merged statistics of the strata of a run, as written; none where its text is not paired."""
        if (data := self.storage.read(path := self.storage.path("stratum_stats", run_id, "stratum_stats"))) is None:
            return {}
        with self.storage.reading(path):
            return to_strata(checked_rows("stratum_stats", run_id, parse(data)))

    def read_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """The merged statistics of a run, as written; WarehouseError when it has none."""
        if (data := self.storage.read(path := self.storage.path("layer_stats", run_id, "layer_stats"))) is None:
            known = sorted({run for run, _ in self.storage.files("layer_stats").values()}) or ["none yet"]
            raise WarehouseError(f"{self.root} has no layer statistics of run '{run_id}'.", nearest(run_id, known))
        with self.storage.reading(path):
            stored = parse(data)
            checked_rows("layer_stats", run_id, stored)
            return to_stats(stored)

    def write_scores(self, run: RunIdentity, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the scores of a run. Rows lack the columns of RunIdentity; None, NaN and missing become null."""
        self._write_rows("scores", run.run_id, run.identified(rows))

    def write_run(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a run exist, after all its other files. A failed run never replaces a done one."""
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status must be done or failed, not {row['status']!r}")
        if row["status"] == "failed" and (self.run(row["run_id"]) or {}).get("status") == "done":
            return
        clean = {name: without_secrets(value) if isinstance(value, str) else value for name, value in row.items()}
        self._write_rows("runs", row["run_id"], [{**clean, "schema_version": SCHEMA_VERSION}], "run")

    def write_cell(self, run: RunIdentity, cell_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the measurements of one cell of an evaluation; rows lack the columns of RunIdentity."""
        data = self._write_rows("cells", run.run_id, run.identified(rows), cell_id)
        self._cell_rows.pop((run.run_id, cell_id), None)
        with suppress(pa.ArrowInvalid):  # `cells` notes the cell as damaged
            self._cell_rows[run.run_id, cell_id] = checked_rows("cells", run.run_id, parse(data))
        self._cell_ids.get(run.run_id, set()).add(cell_id)

    def cell_ids(self, run_id: str) -> Set[str]:
        """Return the ids of the measured cells of an evaluation.

        The folder of the evaluation is listed at the first call. Afterwards this store adds the cells that it writes
        itself. A cell that another process writes in the meantime is missing here until `cells` is called: it would be
        measured again, and its file replaced by one with the same values.
        """
        return self._cell_ids[run_id] if run_id in self._cell_ids else self._list_cells(run_id)

    def cells(self, run_id: str) -> pa.Table:
        """Read the rows of all measured cells of an evaluation, in the order of cell ids.

        The folder of the evaluation is listed again, so that the cells of other processes are read too. Files that this
        store has written or read before are not opened. A cell whose file is damaged is left out and is noted in
        `damaged`.
        """
        unread = [cell_id for cell_id in self._list_cells(run_id) if (run_id, cell_id) not in self._cell_rows]
        with ThreadPoolExecutor() as pool:
            for cell_id, rows in zip(unread, pool.map(lambda name: self._read_cell(run_id, name), unread), strict=True):
                if rows is not None:
                    self._cell_rows[run_id, cell_id] = rows
        known = [(run_id, cell_id) for cell_id in sorted(self._cell_ids[run_id])]
        tables = [self._cell_rows[key] for key in known if key in self._cell_rows]
        return pa.concat_tables([SCHEMAS["cells"].empty_table(), *tables])

    def _list_cells(self, run_id: str) -> set[str]:
        listed = {Path(path).stem for path in self.storage.files("cells", run_id)}
        self._cell_ids[run_id] = listed | self._cell_ids.get(run_id, set())
        return self._cell_ids[run_id]

    def _read_cell(self, run_id: str, cell_id: str) -> pa.Table | None:
        path = self.storage.path("cells", run_id, cell_id)
        try:
            if (data := self.storage.read(path)) is None:
                return None
            with self.storage.reading(path):
                return checked_rows("cells", run_id, parse(data))
        except DamagedFile as error:
            self._note(run_id, error.message)
            return None

    def write_evaluations(self, run: RunIdentity, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what the cells of an evaluation say together; rows lack the columns of RunIdentity."""
        self._write_rows("evaluations", run.run_id, run.identified(rows))

    def write_experiment(self, run: RunIdentity, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write what an experiment says of the scores of a run; rows lack the columns of RunIdentity."""
        self._write_rows("experiments", run.run_id, run.identified(rows), name)

    def write_sparsity(self, run: RunIdentity, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a sparsity plan that was made of a run; rows lack the columns of RunIdentity."""
        self._write_rows("sparsity", run.run_id, run.identified(rows), name)

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The ``runs`` row of a run by column, ``versions`` as a dict; None when it has none."""
        if (data := self.storage.read(path := self.storage.path("runs", run_id, "run"))) is None:
            return None
        with self.storage.reading(path):
            stored = parse(data)
            if len(stored) != 1:
                raise pa.ArrowInvalid(f"it has {len(stored)} rows; a run has one")
            return dict(checked_rows("runs", run_id, stored).to_pylist(maps_as_pydicts="lossy")[0])

    def readable_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """As `read_layer_stats`; nothing where they are damaged, which `damaged` notes."""
        try:
            return self.read_layer_stats(run_id)
        except DamagedFile as error:
            self._note(run_id, error.message)
            return {}

    def table(self, name: str, **selection: Unpack[Selection]) -> pa.Table:
        """The rows of `dataset`, less those of runs with a damaged one; see `Selection`."""
        columns, run_ids, where = selection.get("columns"), selection.get("run_ids"), selection.get("where")
        schema = SCHEMAS[require_known("table", name, TABLES, WarehouseError)]
        wanted = [require_known("column", c, schema.names, WarehouseError) for c in columns or schema.names]
        if run_ids is not None:
            chosen = pc.field("run_id").isin(pa.array(run_ids, pa.string()))
            where = chosen if where is None else chosen & where
        read = list(dict.fromkeys(["run_id", *wanted]))

        def rows(datasets: Mapping[str, ds.Dataset | None]) -> pa.Table:
            dataset = datasets[name]
            return schema.empty_table().select(read) if dataset is None else dataset.to_table(read, filter=where)

        return self._whole(name, self.read([name], rows)).select(wanted)

    def stats_by_run(self, run_ids: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Rows of ``layer_stats`` as `table` gives them, run after run: one of them is in memory at a time.

        Args:
            columns: ``run_id`` among them.
        """
        dataset = self.dataset("layer_stats")
        if dataset is None:
            return
        files: dict[str, list[ds.Fragment]] = {}
        for file in dataset.get_fragments():
            files.setdefault(ds.get_partition_keys(file.partition_expression)["run_id"], []).append(file)
        for run_id in run_ids:
            try:
                rows = [file.to_table(dataset.schema, list(columns)) for file in files.get(run_id, ())]
            except (OSError, pa.ArrowException) as error:
                self._note(run_id, self.storage.damage(f"{self.root}/layer_stats", error))
                continue
            if rows and (table := self._whole("layer_stats", pa.concat_tables(rows))):
                yield run_id, table

    def dataset(self, name: str) -> ds.Dataset | None:
        """Rows of whole runs in ``SCHEMAS[name]``, or None; every row of ``runs`` and of evaluations."""
        return self.read([name], lambda datasets: datasets[name])

    def read(
        self,
        names: Iterable[str],
        work: Callable[[dict[str, ds.Dataset | None]], T],
        failures: tuple[type[Exception], ...] = (),
    ) -> T:
        """The result of work on datasets of tables at one moment. What a damaged file ends begins again without it.

        Args:
            failures: what ``work`` raises where a file cannot be read, besides what pyarrow does.
        """
        known = [require_known("table", name, TABLES, WarehouseError) for name in names]
        while True:
            try:
                return work(self._datasets(known))
            except (OSError, pa.ArrowException, *failures) as error:
                if not self._leave_out_unreadable({"runs", *known}):
                    if isinstance(error, failures):
                        raise
                    with self.storage.reading(f"{self.root}/{known[0] if known else 'runs'}"):
                        raise

    def _datasets(self, names: Sequence[str]) -> dict[str, ds.Dataset | None]:
        runs, done = self._runs()
        return {name: runs if name == "runs" else self._dataset(name, self._files(name, done)) for name in names}

    def _runs(self) -> tuple[ds.Dataset, set[str]]:
        """The dataset of ``runs``, which this version can read, and the ids of those that are done."""
        files = self._files("runs", None)
        runs = self._dataset("runs", files)
        if runs is None and _ids(self.storage.names("cells"), RUN_FOLDER):  # of models that were not scored
            return ds.dataset(SCHEMAS["runs"].empty_table()), set()
        if runs is None:
            self._refuse_without_runs()
        refuse_newer(runs)
        rows = runs.to_table(RUN_COLUMNS)
        refuse_newer_version(pc.max(rows["schema_version"]).as_py() or 0)
        without_row = {self.storage.run_id(path) for path in files}.difference(rows["run_id"].to_pylist())
        self._damaged |= dict.fromkeys(without_row, "it has no row; a run has one")
        if damaged := damaged_runs("runs", rows):
            self._damaged |= damaged
            wanted = ~pc.field("run_id").isin(list(damaged))
            runs, rows = runs.filter(wanted), rows.filter(wanted)
        if not rows:
            self._refuse_without_runs()
        return runs, set(rows["run_id"].filter(pc.equal(rows["status"], "done")).to_pylist())

    def _refuse_without_runs(self) -> NoReturn:
        for run_id, reason in self._damaged.items():
            raise WarehouseError(f"Cannot read run {run_id} of {self.root}: {reason}.", DAMAGED)
        exists = self.storage.has_folder("runs")
        problem = "has no runs yet" if exists else "is not a warehouse: it has no runs folder"
        hint = "avss score makes one; a run counts once it has finished."
        if unfinished := self.unfinished().num_rows:
            problem = "has no finished run yet"
            hint = f"{count_of(unfinished, 'run')} {'has' if unfinished == 1 else 'have'} begun: avss ls."
        raise WarehouseError(f"{self.root} {problem}.", hint)

    def _dataset(self, name: str, files: Files) -> ds.Dataset | None:
        copied, left = self._parts(name, files)
        parts = [*([] if copied is None else [copied]), *([self._open(name, left)] if left else [])]
        return None if not parts else parts[0] if len(parts) == 1 else ds.dataset(parts)

    def _files(self, name: str, done: Collection[str] | None) -> Files:
        """The files of a table that can be read, where it has rows of whole runs alone only those of ``done``."""
        chosen = None if name in ("runs", "evaluations", "cells", "experiments") else done
        return {
            path: stamp
            for path, (run, stamp) in self.storage.files(name).items()
            if (chosen is None or run in chosen) and (path, stamp) not in self._unreadable
        }

    def _parts(self, name: str, files: Files) -> tuple[ds.Dataset | None, Files]:
        """The copied rows of files of a table, and the files that are still to be read."""
        if not self._cached:
            return None, files
        where = f"{self.storage.filesystem.type_name}:{self.storage.base}"
        return copied_rows(name, where, files, SCHEMAS[name], self._open_checked)

    def _leave_out_unreadable(self, names: Iterable[str]) -> bool:
        """Find the files of tables that cannot be read, to leave them out from now on; whether there are any.

        Raises:
            WarehouseError: the storage fails.
        """
        before = len(self._unreadable)
        for name in names:
            _, files = self._parts(name, self._files(name, None))
            with ThreadPoolExecutor() as pool:
                reasons = pool.map(lambda path, name=name: self._why_unreadable(name, path), files)
                for (path, stamp), reason in zip(files.items(), reasons, strict=True):
                    if reason:
                        self._unreadable[path, stamp] = reason
                        self._note(self.storage.run_id(path), reason)
        return len(self._unreadable) > before

    def _why_unreadable(self, name: str, path: str) -> str | None:
        try:
            dataset = self._open(name, {path: ""})
            refuse_newer(dataset)
            dataset.to_table()
        except FileNotFoundError:
            return "it is gone"
        except (OSError, pa.ArrowException) as error:
            return self.storage.damage(path, error)
        return None

    def _whole(self, name: str, table: pa.Table) -> pa.Table:
        """A table without the rows of runs of which one is damaged."""
        damaged = damaged_runs(name, table)
        for run_id, reason in damaged.items():
            self._note(run_id, f"{name}: {reason}")
        return table.filter(~pc.field("run_id").isin(list(damaged))) if damaged else table

    def _note(self, run_id: str, reason: str) -> None:
        self._damaged.setdefault(run_id, reason)

    def _open(self, name: str, files: Files) -> ds.Dataset:
        """The rows of some files of a table; ``files`` holds size and time by path."""
        hive = ds.partitioning(pa.schema([("run_id", pa.string())]), flavor="hive")
        return ds.dataset(sorted(files), SCHEMAS[name], "parquet", self.storage.filesystem, hive)

    def _open_checked(self, name: str, files: Files) -> ds.Dataset:
        dataset = self._open(name, files)
        if name == "runs":
            refuse_newer(dataset)
        return dataset

    def _shard_path(self, run_id: str, shard_id: int, table: str = "shard_stats") -> str:
        return self.storage.path(table, run_id, f"shard-{shard_id:05d}")

    def _write_rows(
        self, table: str, run_id: str, rows: Sequence[Mapping[str, Any]], name: str | None = None
    ) -> pa.Buffer:
        """Write rows, whose missing columns and NaN become null; returns the content of the file."""
        for column in {column for row in rows for column in row}:
            require_known("column", column, SCHEMAS[table].names, WarehouseError)
        columns = {f.name: pa.array([r.get(f.name) for r in rows], f.type, from_pandas=True) for f in SCHEMAS[table]}
        return self._write(table, run_id, columns, name)

    def _write(self, table: str, run_id: str, columns: Mapping[str, Any], name: str | None = None) -> pa.Buffer:
        data = encode(table, run_id, columns)
        self.storage.write(self.storage.path(table, run_id, name or table), data)
        return data


def _ids(names: Iterable[str], prefix: str) -> set[str]:
    """Return the run ids in those names of files or folders that begin with a prefix."""
    return {match[1] for name in names if (match := re.fullmatch(rf"{re.escape(prefix)}([\w.-]+)", name))}
