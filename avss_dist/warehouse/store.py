"""Writer of a warehouse: Hive-partitioned Parquet (``run_id`` is in the path alone), each file in one step."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from avss_dist.core.errors import RunFailed, without_secrets
from avss_dist.core.files import process_mark
from avss_dist.core.fingerprint import NUMBERS_VERSION, fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewRow, TableRow
from avss_dist.stats.layer_stats import ExpertStats, LayerKey, LayerStats, StratumKey, merge_stats
from avss_dist.warehouse.cells import Cells
from avss_dist.warehouse.encoding import encode, encode_rows, expert_columns, to_columns, to_experts
from avss_dist.warehouse.reader import PLAN_CHECKSUM, Warehouse
from avss_dist.warehouse.readme import is_own_readme, readme
from avss_dist.warehouse.schema import SCHEMA_VERSION, RunIdentity
from avss_dist.warehouse.storage import Storage


class Store:
    """Writer of a warehouse. Opening it writes nothing.

    Every method raises StorageFull if there is no space left, and WarehouseError if the storage fails otherwise.

    Attributes:
        reader: reader of the same warehouse, which sees every file as soon as it is written.
        cells: cells of evaluations.
    """

    def __init__(self, root: str | Path) -> None:
        self.reader = Warehouse(root, use_compacted=False)
        self.cells = Cells(self.reader)

    @property
    def storage(self) -> Storage:
        """Storage of the files."""
        return self.reader.storage

    @property
    def root(self) -> RedactedURI:
        """Name of the warehouse as it was opened, without the keys of a URI."""
        return self.reader.root

    def write_shard_files(self, run_id: str, shard_id: int, files: Mapping[str, pa.Buffer]) -> None:
        """Write a shard's result, to resume from, as `encode_shard` returns it."""
        for table, data in files.items():
            self.storage.write(self.storage.shard_path(run_id, shard_id, table), data)

    def delete_shards(self, run_id: str, shard_ids: Iterable[int]) -> None:
        """Delete the results of shards, so that nothing resumes from them."""
        for shard_id in shard_ids:
            for table in ("shard_stats", "row_stats", "shard_expert_stats"):
                self.storage.delete(self.storage.shard_path(run_id, shard_id, table))

    def write_unfinished_run(self, run_id: str, **plan: object) -> bytes:
        """Write a description of an unfinished run for `Warehouse.unfinished`, and return the content of the file.

        `delete_unfinished_run` deletes it. Each description differs from all others.

        Args:
            plan: the columns of `schema.UNFINISHED_RUNS`; ``run_id`` and ``kept_shards`` are added when it is read.
        """
        plan |= {"driver": secrets.token_hex(8), "process": process_mark()}
        data = json.dumps({**plan, PLAN_CHECKSUM: fingerprint(**plan)}).encode()
        self.storage.write(self.storage.plan_path(run_id), data)
        return data

    def delete_unfinished_run(self, run_id: str) -> None:
        """Delete the file of `write_unfinished_run`, once the run has its row."""
        self.storage.delete(self.storage.plan_path(run_id))

    def write_layer_stats(
        self,
        run: RunIdentity,
        layers: Sequence[str],
        stats: Mapping[LayerKey, LayerStats],
        strata: Mapping[StratumKey, LayerStats] | None = None,
    ) -> None:
        """Write the merged statistics of a run. ``layers`` are the module paths of all its layers, in order."""
        self._write("layer_stats", run.run_id, encode("layer_stats", asdict(run), to_columns(layers, stats)))
        if strata:
            self._write("stratum_stats", run.run_id, encode("stratum_stats", asdict(run), to_columns(layers, strata)))

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
            merged = merge_stats(parts)
        self._write("expert_stats", run.run_id, encode("expert_stats", asdict(run), expert_columns(layers, merged)))

    def _read_experts(self, run_id: str, shard_id: int) -> dict[int, ExpertStats]:
        experts = self.reader.read_decoded("shard_expert_stats", run_id, f"shard-{shard_id:05d}", to_experts)
        if experts is None:
            raise RunFailed(
                f"The experts of shard {shard_id} were written, and are gone.",
                "Run the same command with --fresh: it measures every shard again.",
            )
        return experts

    def write_run(self, row: TableRow) -> None:
        """Write the row that makes a run exist, after all its other files.

        A failed run never replaces a done one. A damaged row is replaced.
        """
        if row["status"] not in ("done", "failed"):
            raise ValueError(f"status must be done or failed, not {row['status']!r}")
        if row["status"] == "failed":
            stored = self.reader.readable_run(row["run_id"])
            if stored and stored["status"] == "done":
                return
        columns: NewRow = {}
        for name, value in row.items():
            if isinstance(value, str):
                columns[name] = without_secrets(value)
            else:
                columns[name] = value
        columns["schema_version"] = SCHEMA_VERSION
        columns["numbers_version"] = NUMBERS_VERSION
        self._write_readme()
        self._write("runs", row["run_id"], encode_rows("runs", {"run_id": row["run_id"]}, [columns]), "run")

    def write_rows(self, table: str, run: RunIdentity, rows: Sequence[TableRow], name: str | None = None) -> None:
        """Write rows of ``scores``, ``evaluations``, ``experiments``, ``sparsity`` or ``precision``.

        Rows lack the columns of RunIdentity. None, NaN and missing values become null.

        Args:
            name: name of the file, by default that of the table.
        """
        if table == "evaluations":
            self._write_readme()
        self._write(table, run.run_id, encode_rows(table, asdict(run), rows), name)

    def _write_readme(self) -> None:
        """Write the README.md that comes with results, unless somebody else has written one."""
        path = f"{self.storage.base}/README.md"
        text = readme().encode()
        stored = self.storage.read(path)
        if stored is None:
            self.storage.write(path, text)
            return
        written = stored.to_pybytes()
        if written != text and is_own_readme(written):
            self.storage.write(path, text)

    def _write(self, table: str, run_id: str, data: pa.Buffer, name: str | None = None) -> None:
        self.storage.write(self.storage.path(table, run_id, name or table), data)
