"""Writer of a warehouse: Hive-partitioned Parquet (``run_id`` is in the path alone), each file in one step."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from avss_dist.core.errors import AvssError, DamagedFile, RunFailed, WarehouseError, require_known, without_secrets
from avss_dist.core.files import process_mark
from avss_dist.core.fingerprint import NUMBERS_VERSION, fingerprint
from avss_dist.core.text import RedactedURI, escape_markdown
from avss_dist.stats.layer_stats import ExpertStats, LayerKey, LayerStats, StratumKey, merge_stats
from avss_dist.warehouse.checks import checked_rows
from avss_dist.warehouse.encoding import (
    encode,
    expert_columns,
    parse,
    to_columns,
    to_experts,
)
from avss_dist.warehouse.reader import PLAN_CHECKSUM, Warehouse
from avss_dist.warehouse.schema import SCHEMA_VERSION, SCHEMAS, TABLES, Damage, RunIdentity, columns_of


class Store(Warehouse):
    """A writable warehouse. Opening it writes nothing.

    It does not read compacted files. In addition to the exceptions of `Warehouse`, every
    method raises StorageFull if there is no space left.
    """

    _reads_parts = False

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self._cells: dict[str, dict[str, pa.Table | None]] = {}
        """Rows of cells by cell id, None until they are read, by evaluation."""
        self._listed: set[str] = set()
        """Evaluations whose folder was listed."""
        self._unreadable: dict[str, set[str]] = {}
        """Ids of cells whose file cannot be read, by evaluation."""

    def write_shard_files(self, run_id: str, shard_id: int, files: Mapping[str, pa.Buffer]) -> None:
        """Write a shard's result, to resume from, as `encode_shard` returns it."""
        for table, data in files.items():
            self.storage.write(self._shard_path(run_id, shard_id, table), data)

    def write_plan(self, run_id: str, **plan: Any) -> OpenShared:
        """Write a description of an unfinished run for `unfinished`. `finish_plan` deletes it.

        Args:
            plan: the columns of `schema.UNFINISHED_RUNS`; ``run_id`` and ``kept_shards`` are added when it is read.

        Returns:
            Opens the warehouse in workers that see this very description.
        """
        plan |= {"driver": secrets.token_hex(8), "process": process_mark()}
        path, data = self.storage.plan_path(run_id), json.dumps({**plan, PLAN_CHECKSUM: fingerprint(**plan)}).encode()
        self.storage.write(path, data)
        return partial(_open_shared, RedactedURI(self.storage.base) if self.storage.is_local else self.root, path, data)

    def finish_plan(self, run_id: str) -> None:
        """Delete the file of `write_plan`, once the run has its row."""
        self.storage.delete(self.storage.plan_path(run_id))

    def write_layer_stats(
        self,
        run: RunIdentity,
        layers: Sequence[str],
        stats: Mapping[LayerKey, LayerStats],
        strata: Mapping[StratumKey, LayerStats] | None = None,
    ) -> None:
        """Write the merged statistics of a run. ``layers`` are the module paths of all its layers, in order."""
        self._write("layer_stats", asdict(run), to_columns(layers, stats))
        if strata:
            self._write("stratum_stats", asdict(run), to_columns(layers, strata))

    def merge_experts(self, run: RunIdentity, layers: Sequence[str], shard_ids: Iterable[int]) -> None:
        """Merge the expert statistics of all shards, in the order of their ids, into those of the run.

        Args:
            layers: module path of every layer, in order.

        Raises:
            RunFailed: a file of a shard is missing.
            DamagedFile: a file of a shard is damaged.
        """
        with ThreadPoolExecutor() as pool:
            parts = pool.map(lambda shard_id: self._read_experts(run.run_id, shard_id), sorted(shard_ids))
            self._write("expert_stats", asdict(run), expert_columns(layers, merge_stats(parts)))

    def _read_experts(self, run_id: str, shard_id: int) -> dict[int, ExpertStats]:
        experts = self._decoded("shard_expert_stats", run_id, f"shard-{shard_id:05d}", to_experts)
        if experts is None:
            raise RunFailed(
                f"The experts of shard {shard_id} were written, and are gone.",
                "Run the same command with --fresh: it measures every shard again.",
            )
        return dict(experts)

    def write_run(self, row: Mapping[str, Any]) -> None:
        """Write the row that makes a run exist, after all its other files.

        A failed run never replaces a done one. A damaged row is replaced.
        """
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status must be done or failed, not {row['status']!r}")
        if row["status"] == "failed":
            stored = self.readable_run(row["run_id"])
            if stored and stored["status"] == "done":
                return
        clean = {name: without_secrets(value) if isinstance(value, str) else value for name, value in row.items()}
        versions = {"schema_version": SCHEMA_VERSION, "numbers_version": NUMBERS_VERSION}
        self._write_rows("runs", {"run_id": row["run_id"]}, [clean | versions], "run")

    def write_cell(self, run: RunIdentity, cell_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the measurements of one cell of an evaluation. Rows lack the columns of RunIdentity."""
        data = self._write_rows("cells", asdict(run), rows, cell_id)
        cells = self._cells.setdefault(run.run_id, {})
        cells[cell_id] = None
        self._unreadable.get(run.run_id, set()).discard(cell_id)
        with suppress(pa.ArrowInvalid):  # `cells` notes the cell as damaged
            cells[cell_id] = checked_rows("cells", run.run_id, parse(data))

    def cell_ids(self, run_id: str) -> Set[str]:
        """Return the ids of the measured cells of an evaluation that can be read.

        The folder of the evaluation is listed, and its files are read, at the first call. Afterwards this store adds
        the cells that it writes itself. A cell that another process writes in the meantime is missing here until
        `cells` is called: it would be measured again, and its file replaced by one with the same values.
        """
        if run_id not in self._listed:
            self.cells(run_id)
        return self._cells[run_id].keys()

    def cells(self, run_id: str, cell_ids: Set[str] | None = None) -> pa.Table:
        """Read the rows of measured cells of an evaluation, in the order of cell ids.

        The folder of the evaluation is listed again, so that the cells of other processes are read too. Files that this
        store has written or read before are not opened. A cell whose file is damaged is left out and is noted in
        `damaged`.

        Args:
            cell_ids: ids of the cells to read; None reads all.
        """
        cells = self._list_cells(run_id)
        if cell_ids is not None:
            cells = {cell_id: rows for cell_id, rows in cells.items() if cell_id in cell_ids}
        unread = [cell_id for cell_id, rows in cells.items() if rows is None]
        with ThreadPoolExecutor() as pool:
            read = pool.map(partial(self._read_cell, run_id), unread)
            for cell_id, rows in zip(unread, read, strict=True):
                if rows is None:
                    del cells[cell_id]
                    self._unreadable.setdefault(run_id, set()).add(cell_id)
                else:
                    cells[cell_id] = rows
        tables = [rows for _, rows in sorted(cells.items()) if rows is not None]
        return pa.concat_tables([SCHEMAS["cells"].empty_table(), *tables])

    def _list_cells(self, run_id: str) -> dict[str, pa.Table | None]:
        self._listed.add(run_id)
        cells = self._cells.setdefault(run_id, {})
        unreadable = self._unreadable.get(run_id, set())
        for path in self.storage.files("cells", run_id):
            cell_id = Path(path).stem
            if cell_id not in unreadable:
                cells.setdefault(cell_id, None)
        return cells

    def _read_cell(self, run_id: str, cell_id: str) -> pa.Table | None:
        try:
            return self._decoded("cells", run_id, cell_id)
        except DamagedFile as error:
            self.damaged.setdefault(run_id, Damage("cells", error.message))
            return None

    def write_rows(
        self, table: str, run: RunIdentity, rows: Sequence[Mapping[str, Any]], name: str | None = None
    ) -> None:
        """Write rows of ``scores``, ``evaluations``, ``experiments``, ``sparsity`` or ``precision``.

        Rows lack the columns of RunIdentity. None, NaN and missing values become null.

        Args:
            name: name of the file, by default that of the table.
        """
        self._write_rows(table, asdict(run), rows, name)

    def _write_rows(
        self, table: str, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str | None = None
    ) -> pa.Buffer:
        """Write rows and return the content of the file. Results come with a README.md, unless others wrote one."""
        if table in ("runs", "evaluations"):
            path, text = f"{self.storage.base}/README.md", readme().encode()
            stored = self.storage.read(path)
            if stored is None or (stored.to_pybytes() != text and stored.to_pybytes().startswith(TITLE.encode())):
                self.storage.write(path, text)
        for column in {column for row in rows for column in row}:
            require_known("column", column, SCHEMAS[table].names, WarehouseError)
        return self._write(table, run, columns_of(rows, SCHEMAS[table]), name)

    def _write(
        self, table: str, run: Mapping[str, Any], columns: Mapping[str, Any], name: str | None = None
    ) -> pa.Buffer:
        data = encode(table, run, columns)
        self.storage.write(self.storage.path(table, run["run_id"], name or table), data)
        return data


OpenShared = Callable[[], Store | None]
"""Opens a driver's warehouse in one of its workers. Returns None if the worker does not reach it, or once the run has
ended. It is pickled."""


def _open_shared(root: RedactedURI, path: str, data: bytes) -> Store | None:
    """Open a warehouse, or return None if this process does not find the file in it that the driver has written.

    It is looked for at each call: a late worker must not write the shard of a run that has ended. What the file says is
    compared once, since another driver of the same run replaces it by its own.
    """
    store = _opened(root, path, data)
    try:
        return store if store and store.storage.read(path) is not None else None
    except AvssError:
        return None


@lru_cache(maxsize=8)
def _opened(root: RedactedURI, path: str, data: bytes) -> Store | None:
    """Open a warehouse, or return None if this process does not find a file with this content in it."""
    try:
        store = Store(root)
        return store if store.storage.read(path) == data else None
    except AvssError:
        return None


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A worker's message that it has measured a shard. It is short, as one driver serves many workers.

    Attributes:
        shard_id, num_tokens, seconds: see `ShardResult`.
        files: result of `encode_shard`, if the worker does not reach the warehouse, or the run has ended. Else it has
            written them.
    """

    shard_id: int
    num_tokens: int
    seconds: float
    files: Mapping[str, pa.Buffer]


TITLE = "# Layer scores, measured by avss_dist"
_QUERIES = """
Parquet files of runs, in folders `TABLE/run_id=RUN/`. Layers count from 0; rank 1 is the least important layer. A run
is finished if it has a row in `runs` whose `status` is `done`. The commands of avss_dist read this folder:

```bash
avss query -w . "SELECT model, layer, rank, avss FROM published ORDER BY model, rank"
```

There, the view `published` has the usual reading of the scores, one row for each layer of each run, `latest` has the
newest run of each model, revision and text, and `layers` has both together. The same with other programs:

```python
import duckdb

duckdb.sql(\"\"\"
    SELECT model, layer, rank, avss
    FROM read_parquet('scores/*/*.parquet', hive_partitioning = true)
    WHERE site = 'block' AND recipe = 'pooled' AND threshold_kind = 'absolute' AND threshold = 1e-5
    ORDER BY model, rank
\"\"\").show()
```

```python
import pandas as pd

scores = pd.read_parquet("scores")
usual = scores.query("site == 'block' and recipe == 'pooled' and threshold_kind == 'absolute' and threshold == 1e-5")
print(usual.sort_values(["model", "rank"])[["model", "layer", "rank", "avss"]])
```

```python
import polars as pl

usual = pl.scan_parquet("scores/*/*.parquet").filter(
    site="block", recipe="pooled", threshold_kind="absolute", threshold=1e-5
)
print(usual.select("model", "layer", "rank", "avss").sort("model", "rank").collect())
```
"""


def readme() -> str:
    """Return the text of the file, with the tables in the order of `TABLES`."""
    parts = [TITLE, _QUERIES]
    for name, table in TABLES.items():
        parts += [
            f"## `{name}`\n\n{table.meaning.capitalize()}.\n\n| column | type | meaning |\n|---|---|---|",
            *(f"| `{c.name}` | {c.type} | {escape_markdown(c.description)} |" for c in table.columns),
            "",
        ]
    return "\n".join(parts)
