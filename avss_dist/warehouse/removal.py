"""Removal of runs and evaluations, and of what nobody reads.

The order of deletion is such that readers see whole runs or nothing, and that a removal which is killed can be
repeated:

1. Evaluations, each by its file in ``evaluations``, before its cells. Without the run that they go with, nothing would
   tell that they were to go.
2. The row of the run in ``runs``, without which readers ignore its other files. Then the files of its shards, without
   which nothing resumes it. Then all others.
3. Patches, after the cells that name them.
4. Parts (see `compaction`), which are rewritten. A part that copies a file which is gone is not used.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from avss_dist.core.errors import ConfigError, NoRuns
from avss_dist.core.files import LEFTOVER_SECONDS, is_running
from avss_dist.core.results import TabularResult
from avss_dist.core.streams import tracked
from avss_dist.core.text import count_of, describe_bytes, describe_seconds
from avss_dist.core.values import NewRow, TableRow
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import TABLES, UNFINISHED
from avss_dist.warehouse.storage import PATCHES

# Kinds of what is removed
RUN = "run"
EVALUATION = "evaluation"
LEFTOVER = "leftover"
CELLS = "cells"
PATCH = "patch"
_NOUNS = {RUN: "run", EVALUATION: "evaluation", LEFTOVER: "leftover", CELLS: "unread evaluation", PATCH: "repair"}
DELETED_FIRST = ("evaluations", "precision", "cells", "runs", "shard_stats")
"""Tables whose folders of an id are deleted before those of all others, in this order."""
QUIET_SECONDS = 600.0  # a worker without news for so long is replaced, see `partition.execution.Execution.hang_seconds`
REMOVED = pa.schema(
    {
        "kind": pa.string(),
        "run_id": pa.string(),
        "model": pa.string(),
        "about": pa.string(),
        "table": pa.string(),
        "files": pa.int64(),
        "rows": pa.int64(),
        "bytes": pa.int64(),
    }
)
"""Columns of the table of a removal. ``about`` is the status of a run or the task of an evaluation. ``rows`` is null
where a file cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run or an evaluation that a warehouse has files of.

    Attributes:
        run_id: its id.
        model: the model as it was named. Empty if no file tells.
        revision: revision of the checkpoint. Empty if no file tells.
        about: status of a run, task of an evaluation.
    """

    run_id: str
    model: str = ""
    revision: str = ""
    about: str = ""

    @property
    def slug(self) -> str:
        """The id without its hash: the name of the model."""
        return self.run_id.rpartition("-")[0]


class Catalog:
    """The runs and evaluations that a warehouse has files of, also damaged and unfinished ones.

    Attributes:
        warehouse: the warehouse.
        files: files by table and id.
        runs: runs by id.
        evaluations: evaluations by id, those that have cells and no result yet too.
        leftovers: ids that have files, and are none of a run or an evaluation.
    """

    def __init__(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self.files = {table: warehouse.storage.folders(table) for table in TABLES}
        self.runs = self._read_runs()
        self.evaluations = self._read_evaluations()
        stored: set[str] = set()
        for folders in self.files.values():
            stored.update(folders)
        self.leftovers = sorted(stored - self.runs.keys() - self.evaluations.keys())

    def _read_runs(self) -> dict[str, Entry]:
        runs = {row["run_id"]: _entry(row, "status") for row in self._rows("runs", ["status"])}
        for run_id, files in self.files["runs"].items():
            if files:
                runs.setdefault(run_id, Entry(run_id=run_id, about="damaged"))
        for row in self.warehouse.unfinished().to_pylist():
            runs.setdefault(row["run_id"], Entry(run_id=row["run_id"], model=row["model"] or "", about=UNFINISHED))
        return runs

    def _read_evaluations(self) -> dict[str, Entry]:
        stored = self.files["evaluations"].keys() | self.files["cells"].keys()
        evaluations = {run_id: Entry(run_id=run_id) for run_id in sorted(stored - self.runs.keys())}
        without_result = [run_id for run_id in evaluations if not self.files["evaluations"].get(run_id)]
        rows = self._rows("evaluations", ["task"])
        rows += self._rows("cells", ["task"], without_result)
        for row in rows:
            if row["run_id"] in evaluations:
                evaluations[row["run_id"]] = _entry(row, "task")
        return evaluations

    def _rows(self, table: str, columns: Sequence[str], run_ids: Collection[str] | None = None) -> list[NewRow]:
        """Return the distinct rows of columns of a table, with what identifies a run."""
        names = ["run_id", "model", "revision", *columns]
        try:
            rows = self.warehouse.table(table, columns=names, run_ids=run_ids)
        except NoRuns:  # a warehouse whose only run is unfinished or damaged
            return []
        return list(rows.group_by(names, use_threads=False).aggregate([]).to_pylist())

    @property
    def is_empty(self) -> bool:
        """Whether the warehouse has nothing that could be removed."""
        return not (self.runs or self.evaluations or self.leftovers or self.warehouse.storage.patches())

    def kind(self, run_id: str) -> str:
        """Return the kind of an id."""
        if run_id in self.runs:
            return RUN
        if run_id in self.evaluations:
            return EVALUATION
        return LEFTOVER

    def files_of(self, run_id: str) -> Iterator[pafs.FileInfo]:
        """Yield the files of an id in all tables."""
        for folders in self.files.values():
            yield from folders.get(run_id, ())

    def evaluations_of(self, run_ids: Collection[str]) -> tuple[list[str], list[str]]:
        """Return the ids of evaluations that go with runs, and of those that stay because other runs share them.

        An evaluation is of a checkpoint, and goes with the last finished run of it. Runs whose checkpoint is not known,
        as they are unfinished or damaged, share the evaluations of all checkpoints of their name.
        """
        removed = [run for run in self.runs.values() if run.run_id in run_ids]
        others = [run for run in self.runs.values() if run.run_id not in run_ids]
        removed_revisions = {run.revision for run in removed if run.about == "done"}
        shared_revisions = {run.revision for run in others if run.about == "done"}
        shared_names = {run.slug for run in others if not run.revision}
        going: list[str] = []
        kept: list[str] = []
        for evaluation in self.evaluations.values():
            if not evaluation.revision or evaluation.revision not in removed_revisions:
                continue
            if evaluation.revision in shared_revisions or evaluation.slug in shared_names:
                kept.append(evaluation.run_id)
            else:
                going.append(evaluation.run_id)
        return going, kept

    def unread_cells(self) -> list[str]:
        """Return the ids of evaluations without a result whose newest cell is older than an hour."""
        without_result = [run_id for run_id in self.evaluations if not self.files["evaluations"].get(run_id)]
        return [run_id for run_id in without_result if _age(self.files_of(run_id)) > LEFTOVER_SECONDS]

    def unread_patches(self, run_ids: Collection[str], *, every: bool) -> dict[str, pafs.FileInfo]:
        """Return the patches that nothing but some runs and evaluations names, by key.

        Args:
            run_ids: their ids.
            every: also return patches older than an hour that nothing names. A newer one may be waiting for its cell.
        """
        stored = self.warehouse.storage.patches()
        if not stored:
            return {}
        named: set[str] = set()
        named_by_others: set[str] = set()
        for table in ("cells", "evaluations", "experiments"):
            for row in self._rows(table, ["patch"]):
                if row["run_id"] in run_ids:
                    named.add(row["patch"])
                else:
                    named_by_others.add(row["patch"])
        unread: dict[str, pafs.FileInfo] = {}
        for key, file in sorted(stored.items()):
            is_left = every and _age([file]) > LEFTOVER_SECONDS
            if key not in named_by_others and (key in named or is_left):
                unread[key] = file
        return unread

    def require_idle(self, run_ids: Iterable[str]) -> None:
        """Refuse runs and evaluations that are being measured.

        Whether a driver of this machine runs is known. One of another machine is taken to run until an hour after its
        last file, and the command of an evaluation until ten minutes after its last cell.

        Raises:
            ConfigError: they are.
        """
        problems = []
        for run_id in run_ids:
            if run_id in self.evaluations:
                problem = self._evaluation_in_use(run_id)
            else:
                problem = self._run_in_use(run_id)
            if problem:
                problems.append(problem)
        if problems:
            raise ConfigError.combine(problems)

    def _run_in_use(self, run_id: str) -> ConfigError | None:
        plan = self.warehouse.plan(run_id)
        if not plan:
            return None
        process = str(plan.get("process"))
        running = is_running(process)
        if running:
            number = process.split("-")[1]
            return ConfigError(f"Run {run_id} is being measured by process {number} of this machine.", "Stop it first.")
        is_of_another_machine = running is None
        if not is_of_another_machine:
            return None
        age = min(_age(self.files_of(run_id)), _seconds_since(plan.get("started_at")))
        return _recently_written(run_id, age, LEFTOVER_SECONDS)

    def _evaluation_in_use(self, run_id: str) -> ConfigError | None:
        cells = _newest(self.files["cells"].get(run_id, ()))
        if cells <= _newest(self.files["evaluations"].get(run_id, ())):
            return None
        return _recently_written(run_id, time.time() - cells, QUIET_SECONDS)


@dataclass(frozen=True, kw_only=True, repr=False)
class Removal(TabularResult):
    """A planned removal. Its table has a row for each table of each run and evaluation, with the columns `REMOVED`.

    Attributes:
        catalog: runs and evaluations of the warehouse.
        kinds: kinds of what is removed, by id, in order.
        patches: files of patches that are removed, by key.
        shared: ids of evaluations that stay because other runs share them.
    """

    catalog: Catalog
    kinds: Mapping[str, str]
    patches: Mapping[str, pafs.FileInfo] = field(default_factory=dict)
    shared: Sequence[str] = ()

    @classmethod
    def plan(
        cls, catalog: Catalog, run_ids: Sequence[str], *, unused: bool = False, keep_evaluations: bool = False
    ) -> Removal:
        """Return the removal of runs and evaluations.

        Args:
            run_ids: their ids, or those of leftovers.
            unused: also remove what nobody reads: leftovers, cells without a result, and patches that nothing names.
            keep_evaluations: remove only those evaluations whose ids are in ``run_ids``.

        Raises:
            ConfigError: one of them is being measured.
        """
        going: list[str] = []
        shared: list[str] = []
        if not keep_evaluations:
            going, shared = catalog.evaluations_of(run_ids)
        kinds = dict.fromkeys(going, EVALUATION)
        for run_id in run_ids:
            kinds[run_id] = catalog.kind(run_id)
        catalog.require_idle(kinds)
        if unused:
            unread = dict.fromkeys(catalog.unread_cells(), CELLS)
            unread |= dict.fromkeys(catalog.leftovers, LEFTOVER)
            kinds = unread | kinds  # the kind of what was named is that of its name
        return cls(
            catalog=catalog,
            kinds=kinds,
            patches=catalog.unread_patches(kinds, every=unused),
            shared=[run_id for run_id in shared if run_id not in kinds],
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not self.kinds and not self.patches

    def apply(self) -> None:
        """Delete the files. A removal that is killed can be repeated.

        Raises:
            WarehouseError: a file cannot be deleted, or a part cannot be written.
        """
        storage = self.catalog.warehouse.storage
        for run_id in tracked(list(self.kinds), "Removing"):
            self._delete_folders(run_id, DELETED_FIRST)
            self._delete_folders(run_id, [table for table in TABLES if table not in DELETED_FIRST])
        for key in self.patches:
            storage.remove_patch(key)
        self.catalog.warehouse.drop_stale_parts()

    def _delete_folders(self, run_id: str, tables: Iterable[str]) -> None:
        storage = self.catalog.warehouse.storage
        for table in tables:
            if run_id in self.catalog.files[table]:
                storage.remove_folder(table, run_id)
            if table == "runs":
                storage.delete(storage.plan_path(run_id))

    def table(self) -> pa.Table:
        """Return the files that are removed: their number, rows and bytes, by run or evaluation and by table."""
        return self._table

    @cached_property
    def _table(self) -> pa.Table:
        catalog = self.catalog
        rows: list[NewRow] = []
        for run_id, kind in self.kinds.items():
            entry = catalog.runs.get(run_id) or catalog.evaluations.get(run_id) or Entry(run_id=run_id)
            about = {"model": entry.model, "about": entry.about}
            has_files = False
            for table, folders in catalog.files.items():
                files = folders.get(run_id)
                if files:
                    has_files = True
                    rows.append({**_row(kind, run_id, table, files), **about, "rows": self._count_rows(files)})
            if not has_files:  # a run that has begun, and has stored nothing yet
                rows.append({**_row(kind, run_id, None, []), **about, "rows": 0})
        for key, file in self.patches.items():
            rows.append(_row(PATCH, key, PATCHES, [file]))
        return pa.Table.from_pylist(rows, REMOVED)

    def _count_rows(self, files: Sequence[pafs.FileInfo]) -> int | None:
        """Return the number of rows of files, by what their ends say, or None if one cannot be read."""
        storage = self.catalog.warehouse.storage

        def count(file: pafs.FileInfo) -> int:
            with storage.filesystem.open_input_file(file.path) as opened:
                return int(pq.read_metadata(opened).num_rows)

        try:
            with ThreadPoolExecutor(storage.readers) as pool:
                return sum(pool.map(count, files))
        except (OSError, pa.ArrowException):
            return None

    def summary(self) -> str:
        """Return how many runs, evaluations and patches are removed, and the size of their files, in a line."""
        numbers = Counter(self.kinds.values())
        numbers[PATCH] = len(self.patches)
        parts = [count_of(numbers[kind], noun) for kind, noun in _NOUNS.items() if numbers[kind]]
        files = pc.sum(self._table["files"]).as_py() or 0
        size = pc.sum(self._table["bytes"]).as_py() or 0
        return f"{', '.join(parts)}: {count_of(files, 'file')}, {describe_bytes(size)}"


def _entry(row: TableRow, about: str) -> Entry:
    """Return the entry of a row of a table. ``about`` names the column that says what it is about."""
    return Entry(
        run_id=row["run_id"],
        model=row["model"] or "",
        revision=row["revision"] or "",
        about=row[about] or "",
    )


def _row(kind: str, run_id: str, table: str | None, files: Sequence[pafs.FileInfo]) -> NewRow:
    """Return a row of the table `REMOVED`, without what it is about and the number of its rows."""
    size = sum(file.size or 0 for file in files)
    return {"kind": kind, "run_id": run_id, "table": table, "files": len(files), "bytes": size}


def _newest(files: Iterable[pafs.FileInfo]) -> float:
    """Return when the newest of some files was written, in seconds since 1970. 0 without files."""
    return max((file.mtime_ns or 0 for file in files), default=0) / 1e9


def _age(files: Iterable[pafs.FileInfo]) -> float:
    """Return the seconds since the newest of some files was written."""
    return time.time() - _newest(files)


def _seconds_since(moment: str | None) -> float:
    """Return the seconds since a time in ISO 8601. Infinity without one."""
    if not moment:
        return math.inf
    return time.time() - datetime.fromisoformat(moment).timestamp()


def _recently_written(run_id: str, age: float, minimum: float) -> ConfigError | None:
    """Return the error for files that somebody may be adding to, if the newest is younger than a minimum."""
    if age >= minimum:
        return None
    return ConfigError(
        f"{run_id} may be being measured: its newest file is {describe_seconds(max(age, 0))} old.",
        f"Stop that command first. It counts as stopped once nothing is added for {describe_seconds(minimum)}.",
    )
