"""Publication of a warehouse: a Parquet file for each table of its finished runs, the page, and a dataset card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.analysis.chosen import no_finished_run
from avss_dist.core.errors import WarehouseError, explain_unwritable
from avss_dist.core.files import staged_folder
from avss_dist.core.text import describe_count
from avss_dist.reports.page.page import report_page
from avss_dist.warehouse.reader import Warehouse, without_runs
from avss_dist.warehouse.schema import EVALUATION_TABLES, SCHEMAS, TABLES

NOT_PUBLISHED = ("shard_stats", "cells", "row_stats", "shard_expert_stats")  # what others were made of
PAGE = "index.html"
CARD = "README.md"
DATA = "data"


def publish(warehouse: Warehouse, folder: Path) -> dict[str, int]:
    """Write the tables of the finished runs of a warehouse, the page of all runs, and a dataset card to a new folder.

    Runs and evaluations that are damaged in any table are left out, and noted in `Warehouse.damaged`.

    Returns:
        The number of rows by table, for tables that have any.

    Raises:
        QueryError: there is no finished run.
        WarehouseError: none can be read, or the folder cannot be written or has files.
        StorageFull: there is no space left.
    """
    runs = warehouse.runs().sort_by([("model", "ascending"), ("run_id", "ascending")]).to_pylist()
    run_ids = [row["run_id"] for row in runs if row["status"] == "done"]
    if not run_ids:
        raise no_finished_run(warehouse)
    with explain_unwritable(folder, "Name a new folder.", WarehouseError), staged_folder(folder) as staged:
        (staged / DATA).mkdir()
        rows = _write_tables(warehouse, run_ids, staged / DATA)
        (staged / PAGE).write_text(report_page(warehouse), encoding="utf-8")
        (staged / CARD).write_text(_card(rows), encoding="utf-8")
    return rows


def _write_tables(warehouse: Warehouse, run_ids: Sequence[str], folder: Path) -> dict[str, int]:
    """Write the tables of runs and evaluations, and return the number of rows.

    They are written again, without those that turned out to be damaged, until no other one does.
    """
    while True:
        damaged = set(warehouse.damaged)
        readable = [run_id for run_id in run_ids if run_id not in damaged]
        if not readable:
            damage = warehouse.damaged[run_ids[0]]
            raise WarehouseError(
                f"{warehouse.root} has no finished run that can be read: {run_ids[0]} ({damage}).", damage.hint
            )
        rows = {}
        for name in TABLES:
            if name not in NOT_PUBLISHED:
                rows[name] = _write_table(warehouse, name, readable, folder)
        if damaged == warehouse.damaged.keys():
            return {name: number for name, number in rows.items() if number}


def _write_table(warehouse: Warehouse, name: str, run_ids: Sequence[str], folder: Path) -> int:
    """Write the rows of a table with a row group for each run, and return their number. An empty file is deleted.

    Evaluations, which have run ids of their own, are one group.
    """
    file = folder / f"{name}.parquet"
    rows = 0
    with pq.ParquetWriter(file, SCHEMAS[name], compression="zstd") as writer:
        for table in _groups(warehouse, name, run_ids):
            if len(table):
                writer.write_table(table.cast(SCHEMAS[name]))
                rows += len(table)
    if not rows:
        file.unlink()
    return rows


def _groups(warehouse: Warehouse, name: str, run_ids: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a table: those of each run, or those of all undamaged evaluations."""
    if name in EVALUATION_TABLES:
        rows = warehouse.table(name)  # which may note damage
        yield without_runs(rows, warehouse.damaged)
        return
    for run_id in run_ids:
        yield warehouse.table(name, run_ids=[run_id])


def _card(rows: Mapping[str, int]) -> str:
    """Return the card of a dataset on the hub, with its tables."""
    configs = ""
    tables = ""
    for name, number in rows.items():
        configs += f"- config_name: {name}\n  data_files: {DATA}/{name}.parquet\n"
        tables += f"| `{name}` | {describe_count(number)} | {TABLES[name].meaning} |\n"
    return (
        f"---\npretty_name: Layer scores\ntags: [layer-importance, pruning, avss]\nconfigs:\n{configs}---\n\n"
        f"# Layer scores of {describe_count(rows['runs'])} runs\n\nStatistics and scores of the layers of language "
        "models, by avss_dist. Layers count from 0; rank 1 is the least important layer. "
        f"`{PAGE}` shows all runs; any static host serves it.\n\n"
        f"| table | rows | a row is |\n|---|---|---|\n{tables}"
    )
