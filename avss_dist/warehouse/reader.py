"""Reader of a warehouse: its tables, the statistics of its runs, and SQL over them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from avss_dist.core.errors import DamagedFile, NoRuns, QueryError, WarehouseError, nearest, require_known
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.suggestions import command_line
from avss_dist.core.text import basename, count_of
from avss_dist.core.values import NewObject, NewRow, TableRow
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, StratumKey, merge_strata
from avss_dist.warehouse.checks import RUN_COLUMNS, checked_rows, damaged_runs
from avss_dist.warehouse.compaction import (
    DIGEST,
    DIGESTS,
    MIN_RUNS,
    PART_SCHEMAS,
    SORTED_BY,
    TableParts,
    stored_table,
)
from avss_dist.warehouse.earlier import has_numbered_removals, with_experiment_ids
from avss_dist.warehouse.encoding import (
    conform,
    decode_shard,
    open_file,
    parse,
    to_strata,
)
from avss_dist.warehouse.schema import EVALUATION_TABLES, SCHEMAS, TABLES, TIME, UNFINISHED_RUNS, Damage
from avss_dist.warehouse.storage import PLAN, Storage

K = TypeVar("K")
T = TypeVar("T")
Files = Mapping[str, tuple[str, str]]
"""Run id and stamp (size and time of change) of files, by path."""

PLAN_CHECKSUM = "checksum"  # of the other keys of the file that describes an unfinished run
RUN_FOLDER = "run_id="  # before a run's id: the name of its folder in a table
TABLES_OF_EVERY_RUN = ("scores", "layer_stats")
PARTIALS_AT_ONCE = 8  # partials that are read together
_VERIFIED_PAGES = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


@dataclass(frozen=True, kw_only=True)
class _OpenedFile:
    """A file whose content was verified.

    Attributes:
        problem: reason why it cannot be read; empty if it can.
        converted: its rows in the form of this version, if an earlier one wrote it in another; else None.
    """

    problem: str = ""
    converted: pa.Table | None = None


@dataclass(frozen=True, kw_only=True)
class _ReadableFiles:
    """The files of a table that can be read, in the order of their paths.

    Attributes:
        paths: paths of the files in the form of this version.
        converted: rows of each other file.
    """

    paths: list[str] = field(default_factory=list)
    converted: list[pa.Table] = field(default_factory=list)


class Warehouse:
    """Reader of the scores and statistics of all checkpoints. It ignores runs that have not finished.

    ``Warehouse("results").sql("SELECT layer, avss_smoothed FROM scores ORDER BY rank")``

    Every method raises WarehouseError when the storage fails, a file is damaged or has another schema, and
    ValueError for a run id that is not made of ``[A-Za-z0-9._-]``.

    Args:
        root: a folder, or an ``s3://``, ``gs://``, ``hdfs://`` or ``file://`` URI. Opening it reads nothing.
        snapshot: list its folders once, at the first use. All methods then see the runs of that moment, and cost less.
        use_compacted: read tables of many files from few large copies, and make such copies, see `compaction`.

    Attributes:
        root: name of the warehouse as it was opened, without the keys of a URI.
        storage: storage of its files.
        damaged: reasons, by run id, for leaving out runs with a file or a row that could not be read.

    Raises:
        WarehouseError: there is no such kind of storage.
    """

    def __init__(self, root: str | Path, *, snapshot: bool = False, use_compacted: bool = True) -> None:
        self.storage = Storage(root, snapshot=snapshot)
        self._use_compacted = use_compacted
        self._parts: dict[str, TableParts] = {}
        self._snapshot = snapshot
        self._finished: tuple[ds.Dataset | None, set[str]] | None = None  # of a snapshot
        self._all_runs: pa.Table | None = None  # of a snapshot
        self.damaged: dict[str, Damage] = {}
        self.root = self.storage.root

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    def table(
        self,
        name: str,
        *,
        run_ids: Collection[str] | None = None,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
    ) -> pa.Table:
        """Read rows of a table: those of whole runs, or all of ``runs``, ``evaluations``, ``cells``, ``precision``.

        Args:
            name: one of ``TABLES``.
            run_ids: runs to read; unknown ones add no rows.
            columns: columns to read, in order.
            where: condition on each row, such as ``pc.field("site") == "block"``.
        """
        require_known("table", name, TABLES, WarehouseError)
        schema = SCHEMAS[name]
        selected = list(columns or schema.names)
        for column in selected:
            require_known("column", column, schema.names, WarehouseError)
        rows = self._rows(name, schema, ["run_id", *selected], run_ids, where)
        return self._whole(name, rows).select(selected)

    def _rows(
        self,
        name: str,
        schema: pa.Schema,
        columns: Sequence[str],
        run_ids: Collection[str] | None,
        where: pc.Expression | None = None,
    ) -> pa.Table:
        """Return columns of the rows of a table, whose arguments are those of `table`."""
        if run_ids is not None:
            chosen = pc.field("run_id").isin(pa.array(run_ids, pa.string()))
            if where is None:
                where = chosen
            else:
                where = chosen & where
        read = list(dict.fromkeys(columns))

        def rows(datasets: Mapping[str, ds.Dataset | None]) -> pa.Table:
            dataset = datasets[name]
            if dataset is None:
                return schema.empty_table().select(read)
            return dataset.to_table(read, filter=where)

        return self._read([name], rows, run_ids=run_ids)

    def run(self, run_id: str) -> NewRow | None:
        """Read the ``runs`` row of a run by column, ``versions`` as a dict, or None if it has no row."""
        rows = self.read_file("runs", run_id, "run")
        if rows is None:
            return None
        return dict(rows.to_pylist(maps_as_pydicts="lossy")[0])

    def readable_run(self, run_id: str) -> NewRow | None:
        """Read the ``runs`` row of a run as `run` does. None if it is damaged, too, which `damaged` notes."""
        try:
            return self.run(run_id)
        except DamagedFile as error:
            self.damaged.setdefault(run_id, Damage("runs", error.message))
            return None

    def read_file(self, table: str, run_id: str, name: str) -> pa.Table | None:
        """Read the checked rows of a file of a run, or return None if it does not exist.

        Args:
            name: name of the file, without its suffix.

        Raises:
            DamagedFile: the file is damaged.
        """
        return self.read_decoded(table, run_id, name, _unchanged)

    def read_decoded(self, table: str, run_id: str, name: str, decode: Callable[[pa.Table], T]) -> T | None:
        """Return a value of the checked rows of a file of a run, or None if it does not exist.

        Args:
            name: name of the file, without its suffix.
            decode: returns the value of the rows, and raises ArrowInvalid for damaged ones.

        Raises:
            DamagedFile: the file is damaged.
        """
        path = self.storage.path(table, run_id, name)
        data = self.storage.read(path)
        if data is None:
            return None
        with self.storage.reading(path):
            return decode(checked_rows(table, run_id, parse(data)))

    def runs(self) -> pa.Table:
        """Read one row for each run, failed ones too, with the columns of ``SCHEMAS["runs"]``."""
        if self._all_runs is None or not self._snapshot:
            self._all_runs = self.table("runs")
        return self._all_runs

    def unfinished(self) -> pa.Table:
        """Return the runs that have begun and have no row: interrupted ones, and those that are measured now.

        The same command continues them. This lists three folders, and one more for each such run.

        Returns:
            The columns of `schema.UNFINISHED_RUNS`, newest run first. They are null if an earlier version has not
            stored them, or if the description of the run is damaged.
        """
        ended = {run_id for run_id, _ in self.storage.files("runs").values()}
        planned = _ids(self.storage.names("runs"), PLAN)
        begun = _ids(self.storage.names("shard_stats"), RUN_FOLDER)
        rows = []
        for run_id in sorted((begun | planned) - ended):
            row: NewRow = {}
            if run_id in planned:
                row.update(self.plan(run_id))
            row["run_id"] = run_id
            row["kept_shards"] = self.num_partials(run_id)
            rows.append(row)
        rows.sort(key=lambda row: row.get("started_at") or "", reverse=True)
        return pa.Table.from_pylist(rows, UNFINISHED_RUNS)

    def plan(self, run_id: str) -> NewObject:
        """Return the description of an unfinished run, as `Store.write_unfinished_run` wrote it. Empty without one."""
        data = self.storage.read(self.storage.plan_path(run_id))
        if not data:
            return {}
        return _read_plan(data.to_pybytes())

    def scores(self, **equals: object) -> pa.Table:
        """Read scores of whole runs whose columns equal the given values: ``scores(site="block", layer=[0, 1])``.

        Args:
            equals: by column, a value, None (is null), or a list, tuple or set of values, any of which matches. A model
                is named in full, or by the end of its path.

        Raises:
            QueryError: a column does not exist, or no score has that name in it (run, model, site, recipe and so on).
            WarehouseError: as `table`.
        """
        schema = SCHEMAS["scores"]
        allowed: dict[str, list[Any]] = {}
        where = pc.scalar(True)
        for name, value in equals.items():
            require_known("column", name, schema.names, QueryError)
            values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
            if name == "model":
                values = self._models(values)
            where &= pc.field(name).isin(pa.array(values, schema.field(name).type))
            allowed[name] = values
        table = self.table("scores", where=where)
        for name, values in allowed.items():
            if pa.types.is_string(schema.field(name).type):
                self._require_stored(name, set(values) - {None} - set(pc.unique(table[name]).to_pylist()))
        return table

    def _require_stored(self, name: str, values: Collection[str]) -> None:
        """Raise QueryError for a value that no score has in a column of text."""
        if not values:
            return
        stored = pc.unique(self.table("scores", columns=[name])[name]).drop_null().to_pylist()
        if not stored:  # a warehouse without scores has no names to compare with
            return
        for value in values:
            require_known(name, value, sorted(stored), QueryError)

    def _models(self, names: Iterable[Any]) -> list[Any]:
        """Return the full names of models that are named by the end of their path."""
        models = pc.unique(self.table("runs", columns=["model"])["model"]).drop_null().to_pylist()
        by_end = grouped(models, basename)
        full_names = []
        for name in names:
            if name in models:
                full_names.append(name)
            else:
                full_names += by_end.get(name, [name])
        return full_names

    def read_scores(self, run_id: str) -> list[NewRow]:
        """Read the rows of ``scores`` of one run.

        Raises:
            WarehouseError: it has none, or they are damaged.
        """
        scores = self.read_file("scores", run_id, "scores")
        if scores is None or not len(scores):
            raise WarehouseError(
                f"{self.root} has no scores of run '{run_id}'.", "avss score --fresh measures it again."
            )
        return list(scores.to_pylist())

    def read_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """Read the merged statistics of a run by (layer, site).

        Raises:
            WarehouseError: it has none.
        """
        stats = self.read_decoded("layer_stats", run_id, "layer_stats", to_strata)
        if stats is None:
            stored = self.storage.files("layer_stats").values()
            measured = sorted({measured_id for measured_id, _ in stored}) or ["none yet"]
            raise WarehouseError(f"{self.root} has no layer statistics of run '{run_id}'.", nearest(run_id, measured))
        return merge_strata(stats)

    def readable_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """Read the merged statistics of a run. Empty if they are damaged, which `damaged` notes."""
        try:
            return self.read_layer_stats(run_id)
        except DamagedFile as error:
            self.damaged.setdefault(run_id, Damage("layer_stats", error.message))
            return {}

    def read_stratum_stats(self, run_id: str) -> dict[StratumKey, LayerStats]:
        """Read the merged statistics of a run by (layer, site, stratum). Empty if its text is not paired."""
        return self.read_decoded("stratum_stats", run_id, "stratum_stats", to_strata) or {}

    def digests(self, run_ids: Collection[str], columns: Sequence[str] = DIGEST.names) -> pa.Table:
        """Read the digests of the merged statistics of runs: columns of `compaction.DIGEST`, by default all.

        Runs whose statistics cannot be read are left out, and noted in `damaged`.
        """
        names = list(dict.fromkeys(columns))
        chosen = pc.field("run_id").isin(pa.array(run_ids, pa.string()))

        def rows(_: ds.Dataset | None, done: set[str]) -> pa.Table:
            stored = self._files(DIGESTS, done)
            self._note_missing(stored_table(DIGESTS), stored, done.intersection(run_ids))
            paths, uncopied = self._places(DIGESTS, stored, run_ids)
            tables = [DIGEST.empty_table().select(names)]
            if paths:
                tables.append(ds.dataset(paths, DIGEST, _VERIFIED_PAGES).to_table(names, filter=chosen))
            with ThreadPoolExecutor(self.storage.readers) as pool:
                computed = pool.map(self._table_parts(DIGESTS).rows, uncopied.values())
                tables.extend(table.select(names) for table in computed)
            return pa.concat_tables(tables)

        return self._with_runs([DIGESTS], rows)

    def compact(self) -> dict[str, int]:
        """Copy the rows of finished runs into few large files, which readers use in place of the small ones.

        The small files stay valid. The large ones are in the folder ``compacted``, and may be deleted at any time.
        Files that cannot be read are not copied, and noted in `damaged`.

        Returns:
            The number of newly copied runs or evaluations by table.

        Raises:
            StorageFull, WarehouseError: a file cannot be written, or the warehouse cannot be read.
        """
        done = self._with_runs([], _finished_ids)
        # All folders are listed before any part is written, so that the parts are of one moment.
        stamps = {name: dict(self._files(name, done).values()) for name in SORTED_BY}
        copied = {}
        for name in SORTED_BY:
            copied[name] = 0
            if stamps[name]:
                copied[name] = self._table_parts(name).compact(stamps[name])
        return copied

    def drop_stale_parts(self) -> None:
        """Rewrite or delete the parts that copy a file which has changed or is gone. See `compaction`.

        Raises:
            StorageFull, WarehouseError: a part cannot be written, or the warehouse cannot be read.
        """
        for name in SORTED_BY:
            stamps = dict(self.storage.files(stored_table(name)).values())
            self._table_parts(name).drop_stale(stamps)

    def num_partials(self, run_id: str) -> int:
        """Return the number of stored shards of a run, by the names of their files."""
        return len(self.storage.files("shard_stats", run_id))

    def each_shard(
        self, run_id: str, expected: Mapping[int, str | None], sites: Collection[str] | None = None
    ) -> Iterator[ShardResult]:
        """Yield the undamaged partials of a run, in the order of ``expected``: content hash or None by shard id.

        A few are in memory at a time. With ``sites``, only these are read, without counts by value.
        """

        def read(shard_id: int) -> ShardResult | None:
            data = self.storage.read(self.storage.shard_path(run_id, shard_id))
            if not data:
                return None
            shard = decode_shard(data, run_id, sites)
            if shard is None or shard.shard_id != shard_id:
                return None
            if expected[shard_id] not in (None, shard.content_hash):
                return None
            return shard

        shard_ids = list(expected)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(shard_ids), PARTIALS_AT_ONCE):
                for shard in pool.map(read, shard_ids[start : start + PARTIALS_AT_ONCE]):
                    if shard is not None:
                        yield shard

    def read_partials(self, run: TableRow, sites: Collection[str] | None = None) -> list[ShardResult]:
        """Read all partials of a row of ``runs``, in order. Empty if one is missing or damaged.

        A damaged one is noted in `damaged`. With ``sites``, only these are read, without counts by value.
        """
        run_id = run["run_id"]
        number = run["num_shards"] or 0
        shards = list(self.each_shard(run_id, dict.fromkeys(range(number)), sites))
        if len(shards) == number:
            return shards
        if self.num_partials(run_id) >= number:
            self.damaged.setdefault(run_id, Damage("shard_stats", "a partial is damaged"))
        return []

    def sql(self, query: str) -> pa.Table:
        """Return the result of one DuckDB query over the views of `TABLES`.

        ``@name`` is the query of that name in `query.ready_queries`. The functions of `query.FUNCTIONS` are there
        besides DuckDB's own. A table without files is an empty view. Nothing else can be reached: no file, network,
        extension or variable.

        Raises:
            QueryError: the query is wrong, in the database's own words, or does more than read.
            WarehouseError: not a warehouse, no runs yet, or a newer schema.
        """
        from avss_dist.warehouse.query import run_query  # brings DuckDB, which no worker needs

        return run_query(query, self._read)

    def _read(
        self,
        names: Iterable[str],
        work: Callable[[dict[str, ds.Dataset | None]], T],
        failures: tuple[type[Exception], ...] = (),
        run_ids: Collection[str] | None = None,
    ) -> T:
        """Return the result of work on datasets of tables at one moment, as `_with_runs`.

        Args:
            run_ids: ids of the runs that the work is about; None for all. Datasets may have others too.
        """
        tables = [require_known("table", name, TABLES, WarehouseError) for name in names]

        def on_datasets(runs: ds.Dataset | None, done: set[str]) -> T:
            datasets = {}
            for name in tables:
                if name == "runs":
                    datasets[name] = runs
                    continue
                stored = self._files(name, done)
                if name in TABLES_OF_EVERY_RUN:
                    expected = done if run_ids is None else done.intersection(run_ids)
                    self._note_missing(name, stored, expected)
                datasets[name] = self._dataset(name, stored, run_ids)
            return work(datasets)

        return self._with_runs(tables, on_datasets, failures)

    def _with_runs(
        self,
        tables: Sequence[str],
        work: Callable[[ds.Dataset | None, set[str]], T],
        failures: tuple[type[Exception], ...] = (),
    ) -> T:
        """Return the result of work at one moment. If parts of its tables are damaged, repeat it without them.

        Args:
            work: takes the dataset of ``runs`` and the ids of finished runs.
            failures: exceptions of ``work`` for files that cannot be read, in addition to those of pyarrow.
        """
        while True:
            try:
                return work(*self._runs())
            except (OSError, pa.ArrowException, *failures) as error:
                self._finished = None
                if self._leave_out_unreadable({"runs", *tables}):
                    continue
                if isinstance(error, failures):
                    raise
                first = tables[0] if tables else "runs"
                with self.storage.reading(f"{self.root}/{first}"):
                    raise

    def _leave_out_unreadable(self, tables: Collection[str]) -> bool:
        """Leave out the parts of tables that cannot be read, and return whether there are new ones."""
        has_new = False
        for name, parts in self._parts.items():
            if name in tables and parts.leave_out_unreadable():
                has_new = True
        return has_new

    def _runs(self) -> tuple[ds.Dataset | None, set[str]]:
        """Return the dataset of ``runs``, None without any run, and the ids of finished runs.

        Raises:
            NoRuns: there is no run that can be read.
            WarehouseError: a newer avss_dist wrote one.
        """
        if self._finished is not None:
            return self._finished
        files = self._files("runs", ())
        runs = self._dataset("runs", files)
        if runs is None:
            if not _ids(self.storage.names("cells"), RUN_FOLDER):
                self._refuse_without_runs()
            return None, set()  # evaluations of models that were not scored
        rows = runs.to_table(RUN_COLUMNS)
        stored = {run_id for run_id, _ in files.values()}
        without_row = stored.difference(rows["run_id"].to_pylist())
        self._note_damaged("runs", dict.fromkeys(sorted(without_row), "it has no row; a run has one"))
        damaged = damaged_runs("runs", rows)
        if damaged:
            self._note_damaged("runs", damaged)
            runs = runs.filter(~pc.field("run_id").isin(list(damaged)))
            rows = without_runs(rows, damaged)
        if not rows:
            self._refuse_without_runs()
        done = rows.filter(pc.equal(rows["status"], "done"))
        finished = (runs, set(done["run_id"].to_pylist()))
        if self._snapshot:
            self._finished = finished
        return finished

    def _refuse_without_runs(self) -> NoReturn:
        for run_id, damage in self.damaged.items():
            raise NoRuns(f"Cannot read {damage.subject} {run_id} of {self.root}: {damage}.", damage.hint)
        unfinished = self.unfinished().num_rows
        if unfinished:
            verb = "has" if unfinished == 1 else "have"
            begun = f"{count_of(unfinished, 'run')} {verb} begun"
            listing = command_line("ls", "-w", self.root)
            raise NoRuns(f"{self.root} has no finished run yet.", f"{begun}: {listing}")
        folder = self.storage.filesystem.get_file_info(f"{self.storage.base}/runs")
        problem = "is not a warehouse: it has no runs folder"
        if folder.type:
            problem = "has no runs yet"
        raise NoRuns(f"{self.root} {problem}.", "avss score makes one; a run counts once it has finished.")

    def _dataset(self, name: str, files: Files, requested: Collection[str] | None = None) -> ds.Dataset | None:
        """Return rows of files of a table: parts of it, and the files of requested runs that are in no part."""
        paths, uncopied = self._places(name, files, requested)
        readable = self._readable(name, uncopied)
        datasets: list[ds.Dataset] = []
        if paths:
            datasets.append(ds.dataset(paths, PART_SCHEMAS[name], _VERIFIED_PAGES))
        if readable.paths:
            hive = ds.partitioning(pa.schema([("run_id", pa.string())]), flavor="hive")
            filesystem = self.storage.filesystem
            datasets.append(ds.dataset(readable.paths, SCHEMAS[name], _VERIFIED_PAGES, filesystem, hive))
        if readable.converted:
            # Arrow has read or computed all of these columns: none holds an object of Python.
            datasets.append(ds.dataset(pa.concat_tables(readable.converted)))
        if not datasets:
            return None
        if len(datasets) == 1:
            return datasets[0]
        return ds.UnionDataset(datasets[0].schema, datasets)

    def _places(self, name: str, files: Files, requested: Collection[str] | None) -> tuple[list[str], dict[str, str]]:
        """Return the parts of a table to read, and the run of each file of requested runs that is in no part, by path.

        Args:
            files: files of the table.
            requested: ids of the runs that are to be read; None for all.
        """
        stamps = dict(files.values())
        run_ids = set(stamps)
        if requested is not None:
            run_ids &= set(requested)
        # To open a large file for few runs takes longer than to open theirs.
        has_few = requested is not None and len(run_ids) < MIN_RUNS and self.storage.is_local
        paths: list[str] = []
        if self._use_compacted and name in SORTED_BY and not has_few:
            parts = self._table_parts(name)
            paths = [str(path) for path in parts.covering(stamps, run_ids)]
            run_ids -= parts.run_ids
        return paths, {path: run_id for path, (run_id, _) in files.items() if run_id in run_ids}

    def _files(self, name: str, done: Collection[str]) -> Files:
        """Return the files of a table. A table of whole runs has files of the runs ``done`` alone."""
        stored = self.storage.files(stored_table(name))
        if name in ("runs", *EVALUATION_TABLES):
            return stored
        return {path: (run_id, stamp) for path, (run_id, stamp) in stored.items() if run_id in done}

    def _table_parts(self, name: str) -> TableParts:
        if name not in self._parts:
            self._parts[name] = TableParts(self.storage, name, self.damaged)
        return self._parts[name]

    def _readable(self, name: str, run_ids: Mapping[str, str]) -> _ReadableFiles:
        """Return the readable files of a table, whose content is verified. Note the others in `damaged`.

        Args:
            run_ids: run of each file, by path.

        Raises:
            WarehouseError: a newer avss_dist wrote a file, or the storage fails.
        """
        with ThreadPoolExecutor(self.storage.readers) as pool:
            opened = list(pool.map(partial(self._open, name), run_ids.keys(), run_ids.values()))
        readable = _ReadableFiles()
        for path, file in sorted(zip(run_ids, opened, strict=True), key=itemgetter(0)):
            if file.problem:
                self.damaged.setdefault(run_ids[path], Damage(name, file.problem))
            elif file.converted is not None:
                readable.converted.append(file.converted)
            else:
                readable.paths.append(path)
        return readable

    def _open(self, name: str, path: str, run_id: str) -> _OpenedFile:
        """Verify the content of a file of a table, and convert the rows of an earlier version.

        Raises:
            WarehouseError: a newer avss_dist wrote it, or the storage fails.
        """
        schema = SCHEMAS[name]
        try:
            with self.storage.filesystem.open_input_file(path) as stored:
                file = open_file(stored.read_buffer())
            if has_numbered_removals(file.schema_arrow):
                rows = file.read()
                rows = conform(rows.append_column("run_id", pa.repeat(run_id, len(rows))), schema)
                if name == "experiments":
                    rows = with_experiment_ids(rows, path)
                return _OpenedFile(converted=rows)
            if _has_other_types(file.schema_arrow, schema):
                conform(file.read(), schema)
        except FileNotFoundError:
            return _OpenedFile(problem="it is gone")
        except (OSError, pa.ArrowException) as error:
            return _OpenedFile(problem=self.storage.damage(path, error))
        return _OpenedFile()

    def _whole(self, name: str, table: pa.Table) -> pa.Table:
        """Return a table without the rows of damaged runs."""
        damaged = damaged_runs(name, table)
        if not damaged:
            return table
        self._note_damaged(name, damaged)
        return without_runs(table, damaged)

    def _note_damaged(self, table: str, reasons: Mapping[str, str]) -> None:
        """Note reasons, by run id, in `damaged`, which `TableParts` hold too. Earlier reasons stay."""
        for run_id, reason in reasons.items():
            self.damaged.setdefault(run_id, Damage(table, reason))

    def note_damaged(self, run_ids: Collection[str]) -> None:
        """Note every finished run in `damaged` that lacks a file, and those of ``run_ids`` with a file of no Parquet.

        Two folders are listed, and two files of each of ``run_ids`` are opened.
        """
        _, done = self._runs()
        for table in TABLES_OF_EVERY_RUN:
            files = self._files(table, done)
            self._note_missing(table, files, done)
            opened = {path: run_id for path, (run_id, _) in files.items() if run_id in run_ids}
            self._readable(table, opened)

    def _note_missing(self, table: str, files: Files, run_ids: Collection[str]) -> None:
        """Note finished runs in `damaged` that have no file of a table that every run has."""
        measured = {run_id for run_id, _ in files.values()}
        missing = sorted(set(run_ids) - measured)
        self._note_damaged(table, dict.fromkeys(missing, "its file is gone"))


def _unchanged(rows: pa.Table) -> pa.Table:
    return rows


def _finished_ids(_: ds.Dataset | None, done: set[str]) -> set[str]:
    return done


def _has_other_types(stored: pa.Schema, schema: pa.Schema) -> bool:
    """Whether a column of a file has another type than in the schema of its table."""
    for column in stored:
        place = schema.get_field_index(column.name)
        if place >= 0 and schema.field(place).type != column.type:
            return True
    return False


def _read_plan(data: bytes) -> NewObject:
    """Return what `Store.write_unfinished_run` has written of an unfinished run. Empty if it is damaged."""
    try:
        plan = dict(json.loads(data))
        checksum = plan.pop(PLAN_CHECKSUM, None)  # earlier versions wrote none
        if checksum not in (None, fingerprint(**plan)):
            return {}
        pa.Table.from_pylist([plan], UNFINISHED_RUNS)["started_at"].cast(TIME)
    except (ValueError, TypeError, pa.ArrowException):
        return {}
    return plan


def _ids(names: Iterable[str], prefix: str) -> set[str]:
    """Return the run ids in the names of files or folders that begin with a prefix."""
    pattern = re.compile(rf"{re.escape(prefix)}([\w.-]+)")
    run_ids = set()
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            run_ids.add(match[1])
    return run_ids


def without_runs(table: pa.Table, run_ids: Collection[str]) -> pa.Table:
    """Return a table without the rows of some runs."""
    return table.filter(pc.invert(pc.is_in(table["run_id"], pa.array(list(run_ids), pa.string()))))


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items, such as rows, by their key."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class RowSlice(NamedTuple):
    """Consecutive rows of a table with equal values in some columns.

    Attributes:
        key: these values, by column.
        start: the first row.
        stop: the row after the last.
    """

    key: NewRow
    start: int
    stop: int


def slices_by(table: pa.Table, names: Sequence[str]) -> list[RowSlice]:
    """Return the groups of consecutive rows with equal values in some columns.

    Args:
        table: sorted by these columns.
        names: names of the columns.
    """
    if not len(table):
        return []
    is_first = np.zeros(len(table), bool)
    for name in names:
        codes = table[name].combine_chunks().dictionary_encode().indices.to_numpy()
        is_first |= np.diff(codes, prepend=-1) != 0
    starts = np.flatnonzero(is_first)
    stops = [*starts[1:].tolist(), len(table)]
    keys = table.select(list(names)).take(starts).to_pylist()
    return [RowSlice(key, start, stop) for key, start, stop in zip(keys, starts.tolist(), stops, strict=True)]
