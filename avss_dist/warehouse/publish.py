"""Publication of a warehouse: one sorted Parquet file for each table of its finished runs, a catalog, and a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.core.errors import WarehouseError, unwritable
from avss_dist.core.text import RedactedURI, describe_count
from avss_dist.system.hub import require_access, upload
from avss_dist.system.staging import staged_folder
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS, TABLES
from avss_dist.warehouse.storage import Storage

PARTS = ("shard_stats", "cells", "predictions", "row_stats", "shard_expert_stats")  # what others were made of
CATALOG, CARD, DATA = "catalog.duckdb", "README.md", "data"
_ORDER = ("layer", "site", "recipe", "threshold", "expert", "task", "metric")  # of the rows of a run


def publish(warehouse: Warehouse, target: str) -> dict[str, int]:
    """Write the tables of the finished runs of a warehouse, with a catalog and a card, to a folder or to the hub.

    Args:
        target: an empty or new folder or ``s3://``, ``gs://``, ``hdfs://`` or ``abfss://`` URI; or
            ``hf://datasets/ORG/NAME``, which gets a commit, and is created as a private one if it does not exist.

    Returns:
        The number of rows by table, for tables that have any.

    Raises:
        WarehouseError: the warehouse cannot be read or has no finished run, or the target is not free or not writable.
        ConfigError: the hub is the target, and there is no token.
        StorageFull, RunFailed: there is no space left; the hub refuses, or cannot be reached.
    """
    done = [row for row in warehouse.runs().to_pylist() if row["status"] == "done"]
    if not done:
        raise WarehouseError(f"{warehouse.root} has no finished run.", "Failed runs are not published.")
    run_ids = [row["run_id"] for row in sorted(done, key=lambda row: (row["model"], row["run_id"]))]
    with _staged_target(target, f"Layer scores of {describe_count(len(run_ids))} runs") as folder:
        (folder / DATA).mkdir()
        rows = {name: _write_table(warehouse, name, run_ids, folder / DATA) for name in TABLES if name not in PARTS}
        rows = {name: number for name, number in rows.items() if number}
        _write_catalog(folder, list(rows))
        (folder / CARD).write_text(_card(rows, len(run_ids)), encoding="utf-8")
    return rows


@contextmanager
def _staged_target(target: str, message: str) -> Iterator[Path]:
    """Yield an empty local folder, which becomes the target when the block ends.

    Args:
        message: message of a commit to the hub.
    """
    hub = target.startswith("hf:")
    name = _dataset(target) if hub else ""
    storage = None if hub else Storage(target)
    if storage and storage.has_anything():
        raise WarehouseError(f"{storage.root} exists already, and is not empty.", "Name another target.")
    try:
        if storage and storage.is_local:
            with staged_folder(Path(storage.base)) as staged:
                yield staged
            return
        with TemporaryDirectory(prefix="avss-publish-") as temporary:
            yield Path(temporary)
            if storage:
                _copy(Path(temporary), storage)
            else:
                upload(
                    Path(temporary),
                    name,
                    "dataset",
                    message=message,
                    replaced=[f"{DATA}/*.parquet"],
                    hint="Try again; or publish to a folder, and `hf upload` that.",
                )
    except OSError as error:
        raise unwritable(RedactedURI(target), error, "Name another target.", WarehouseError) from error


def _dataset(target: str) -> str:
    """Return the name of the dataset on the hub that a target names."""
    prefix = "hf://datasets/"
    if not target.startswith(prefix):
        raise WarehouseError(
            f"'{target}' is not a data set of the hub.",
            f"Write {prefix}ORG/NAME; for anything else there, publish to a folder and upload that.",
        )
    require_access(name := target.removeprefix(prefix).rstrip("/"), "dataset")
    return name


def _copy(folder: Path, storage: Storage) -> None:
    """Copy every file. Files that name others come last."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (file.parent == folder, file)):
        with pa.memory_map(str(file)) as mapped:
            storage.write(f"{storage.base}/{file.relative_to(folder).as_posix()}", mapped.read_buffer())


def _write_table(warehouse: Warehouse, name: str, run_ids: Sequence[str], folder: Path) -> int:
    """Write the rows of a table with a row group for each run, and return their number. An empty file is deleted."""
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
    """Yield the sorted rows of each run. The rows of evaluations, which have their own run ids, are one table."""
    by = [(column, "ascending") for column in _ORDER if column in SCHEMAS[name].names]
    if name == "evaluations":
        yield warehouse.table(name).sort_by([("model", "ascending"), ("run_id", "ascending"), *by])
        return
    for run_id in run_ids:
        if table := warehouse.table(name, run_ids=[run_id]):
            yield table.sort_by(by) if by else table


def _write_catalog(folder: Path, names: Sequence[str]) -> None:
    """Write a database of views of the files beside it, with comments and the functions of SQL."""

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
    """Return the card of a dataset on the hub, with its tables and instructions to read them."""
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
