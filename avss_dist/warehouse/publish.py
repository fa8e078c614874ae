"""A warehouse to hand on: one sorted Parquet file for each table of its finished runs, a catalog, and a card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.errors import WarehouseError, unwritable
from avss_dist.system.staging import staged_folder
from avss_dist.text import describe_count
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS, TABLES

PARTS = ("shard_stats", "cells", "row_stats", "shard_expert_stats")  # what other tables were made of
CATALOG, CARD, DATA = "catalog.duckdb", "README.md", "data"
_ORDER = ("layer", "site", "recipe", "threshold", "expert", "task", "metric")  # of the rows of a run
_SCHEME = re.compile(r"[A-Za-z][\w+.-]+://")


def publish(warehouse: Warehouse, target: str) -> dict[str, int]:
    """Write a folder that holds what a warehouse knows of its finished runs.

    Args:
        target: a folder that does not exist, or is empty; it appears when it is whole.

    Returns:
        The rows of each table that has any.

    Raises:
        WarehouseError: the warehouse cannot be read, has no finished run, or the target is not a folder that is free.
        StorageFull: there is no space left.
    """
    if _SCHEME.match(target):
        raise WarehouseError(
            f"'{target}' is not a folder.",
            "Publish to a folder, and copy that: hf upload, aws s3 sync, gcloud storage rsync.",
        )
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WarehouseError(f"{folder} exists already, and is not empty.", "Name another folder.")
    runs = warehouse.runs()
    done = [row for row in runs.select(["run_id", "model", "status"]).to_pylist() if row["status"] == "done"]
    if not done:
        raise WarehouseError(f"{warehouse.root} has no finished run.", "Failed runs are not published.")
    run_ids = [row["run_id"] for row in sorted(done, key=lambda row: (row["model"], row["run_id"]))]
    try:
        with staged_folder(folder) as staged:
            (staged / DATA).mkdir()
            rows = {name: _write_table(warehouse, name, run_ids, staged / DATA) for name in TABLES if name not in PARTS}
            rows = {name: number for name, number in rows.items() if number}
            _write_catalog(staged, list(rows))
            (staged / CARD).write_text(_card(rows, len(run_ids)), encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error, "Name another folder.", WarehouseError) from error
    return rows


def _write_table(warehouse: Warehouse, name: str, run_ids: Sequence[str], folder: Path) -> int:
    """Write the rows of a table, run after run, a row group for each; returns how many, and leaves no empty file."""
    comments = {column.name: column.meaning for column in TABLES[name].columns}
    schema = pa.schema([field.with_metadata({"comment": comments[field.name]}) for field in SCHEMAS[name]])
    file, rows = folder / f"{name}.parquet", 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in _tables(warehouse, name, run_ids):
            writer.write_table(table.cast(schema))
            rows += len(table)
    if not rows:
        file.unlink()
    return rows


def _tables(warehouse: Warehouse, name: str, run_ids: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of each run, sorted; of evaluations, which have runs of their own, all at once."""
    by = [(column, "ascending") for column in _ORDER if column in SCHEMAS[name].names]
    if name == "evaluations":
        yield warehouse.table(name).sort_by([("model", "ascending"), ("run_id", "ascending"), *by])
        return
    for run_id in run_ids:
        if table := warehouse.table(name, run_ids=[run_id]):
            yield table.sort_by(by) if by else table


def _write_catalog(folder: Path, names: Sequence[str]) -> None:
    """A database without rows: views of the files beside it, with comments, and the functions of SQL."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    with duckdb.connect(str(folder / CATALOG)) as catalog:
        catalog.execute(f"SET file_search_path = {quoted(str(folder))}")  # of this connection; the paths are relative
        for name in names:
            catalog.execute(f"CREATE VIEW {name} AS FROM read_parquet('{DATA}/{name}.parquet')")
            for column in TABLES[name].columns:
                catalog.execute(f'COMMENT ON COLUMN {name}."{column.name}" IS {quoted(column.meaning)}')
        if "layer_stats" in names:
            functions = (files("avss_dist.warehouse") / "sql" / "functions.sql").read_text(encoding="utf-8")
            catalog.execute(functions.replace("CREATE TEMP MACRO", "CREATE MACRO"))


def _card(rows: Mapping[str, int], runs: int) -> str:
    """The card of a dataset on the hub: which file is which table, and how to read them."""
    configs = "".join(f"- config_name: {name}\n  data_files: {DATA}/{name}.parquet\n" for name in rows)
    tables = "".join(f"| `{name}` | {describe_count(n)} | {TABLES[name].meaning} |\n" for name, n in rows.items())
    return (
        f"---\npretty_name: Layer scores\ntags: [layer-importance, pruning, avss]\nconfigs:\n{configs}---\n\n"
        f"# Layer scores of {describe_count(runs)} runs\n\nStatistics and scores of the layers of language models, by "
        "avss_dist. Layers count from 0; rank 1 is the least important layer.\n\n"
        f"| table | rows | a row is |\n|---|---|---|\n{tables}\n"
        f"In this folder, `duckdb {CATALOG}` has each table as a view, with what its columns mean; from elsewhere, "
        "`SET file_search_path = 'FOLDER'` first.\n"
    )
