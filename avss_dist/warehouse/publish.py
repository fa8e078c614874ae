"""Publication of a warehouse: a Parquet file for each table of its finished runs, a catalog, a page and a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from urllib.parse import quote_plus

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.core.errors import WarehouseError, unwritable
from avss_dist.core.text import RedactedURI, describe_count
from avss_dist.system.hub import require_access, upload
from avss_dist.system.staging import staged_folder
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import DAMAGED, SCHEMAS, TABLES
from avss_dist.warehouse.storage import Storage

PARTS = ("shard_stats", "cells", "predictions", "row_stats", "shard_expert_stats")  # what others were made of
TEXTS = ("continuations",)  # they quote corpora, which may not be public
CATALOG, CARD, DATA = "catalog.duckdb", "README.md", "data"
_DATASETS = "hf://datasets/"
_ORDER = ("layer", "site", "recipe", "threshold", "expert", "task", "metric")  # of the rows of a run


PAGE, SCORES = "index.html", "scores.parquet"
"""Names of the page, and of the file of published scores beside it."""
_READING = "site = 'block' AND recipe = 'pooled' AND threshold = 1e-5"
QUERIES = {
    "The layers that most runs call the least important": f"""SELECT layer, count(DISTINCT run_id) AS runs
FROM train
WHERE {_READING} AND rank <= 3
GROUP BY layer
ORDER BY runs DESC""",
    "Mean rank by family and tenth of the depth": f"""SELECT
  family, floor(depth * 10) / 10 AS depth_from, round(avg(rank), 1) AS mean_rank
FROM train
WHERE {_READING}
GROUP BY ALL
ORDER BY ALL""",
    "The three least important layers of every model": f"""SELECT
  model, revision, rank, layer, avss_smoothed, block_influence
FROM train
WHERE {_READING} AND rank <= 3
ORDER BY model, revision, rank""",
}
"""Queries for the hub's SQL console, which calls the table ``scores`` ``train``, by their question."""


def publish(
    warehouse: Warehouse, target: str, *, write_page: Callable[[Path], None] | None = None, space: str | None = None
) -> dict[str, int]:
    """Write the tables of the finished runs of a warehouse, with a catalog and a card, to a folder or to the hub.

    Runs that are damaged in any table are left out, and noted in `Warehouse.damaged`.

    Args:
        write_page: writes `PAGE` and `SCORES` into a folder. The result is a site that any static host serves.
        space: ``ORG/NAME`` of a static space of the hub that the page is also published to.
        target: an empty or new folder or ``s3://``, ``gs://``, ``hdfs://`` or ``abfss://`` URI; or
            ``hf://datasets/ORG/NAME``, which gets a commit, and is created as a private one if it does not exist.

    Returns:
        The number of rows by table, for tables that have any.

    Raises:
        WarehouseError: the warehouse cannot be read or has no finished run, or the target is not free or not writable.
        ConfigError: the hub is the target, and there is no token.
        StorageFull, RunFailed: there is no space left; the hub refuses, or cannot be reached.
    """
    if space is not None:
        require_access(space, "space")
    done = [row for row in warehouse.runs().to_pylist() if row["status"] == "done"]
    if not done:
        raise WarehouseError(f"{warehouse.root} has no finished run.", "Failed runs are not published.")
    run_ids = [row["run_id"] for row in sorted(done, key=lambda row: (row["model"], row["run_id"]))]
    dataset = _dataset(target) if target.startswith("hf:") else None
    with _staged_target(target, dataset, f"Layer scores of {describe_count(len(run_ids))} runs") as folder:
        (folder / DATA).mkdir()
        rows, published = _write_tables(warehouse, run_ids, folder / DATA)
        _write_catalog(folder, list(rows))
        if write_page:
            write_page(folder)
        card = _card(rows, len(published), page=write_page is not None, dataset=dataset, space=space)
        (folder / CARD).write_text(card, encoding="utf-8")
        if space is not None:
            _publish_space(folder, space, dataset)
    return rows


def _publish_space(folder: Path, space: str, dataset: str | None) -> None:
    """Upload the page of a published folder to a static space of the hub."""
    source = f"The data: https://huggingface.co/datasets/{dataset}\n" if dataset else ""
    with TemporaryDirectory(prefix="avss-space-") as temporary:
        for name in (PAGE, SCORES):
            copyfile(folder / name, Path(temporary) / name)
        header = "---\ntitle: Layer scores\nsdk: static\npinned: false\n---\n\n"
        text = f"{header}# Layer scores\n\nLayer scores of language models, by avss_dist.\n{source}"
        (Path(temporary) / CARD).write_text(text, encoding="utf-8")
        upload(
            Path(temporary),
            space,
            "space",
            message="Layer scores",
            replaced=[],
            hint="Try again; or publish to a folder, and upload its page.",
        )


@contextmanager
def _staged_target(target: str, dataset: str | None, message: str) -> Iterator[Path]:
    """Yield an empty local folder, which becomes the target when the block ends.

    Args:
        dataset: name of the dataset on the hub, if that is the target.
        message: message of a commit to the hub.
    """
    storage = Storage(target) if dataset is None else None
    if storage and storage.has_anything():
        raise WarehouseError(f"{storage.root} exists already, and is not empty.", "Name another target.")
    try:
        if storage and storage.is_local:
            with staged_folder(Path(storage.base)) as staged:
                yield staged
            return
        with TemporaryDirectory(prefix="avss-publish-") as temporary:
            yield Path(temporary)
            if dataset is not None:
                upload(
                    Path(temporary),
                    dataset,
                    "dataset",
                    message=message,
                    replaced=[f"{DATA}/*.parquet"],
                    hint="Try again; or publish to a folder, and `hf upload` that.",
                )
            elif storage:
                _copy(Path(temporary), storage)
    except OSError as error:
        raise unwritable(RedactedURI(target), error, "Name another target.", WarehouseError) from error


def _dataset(target: str) -> str:
    """Return the name of the dataset on the hub that a target names."""
    if not target.startswith(_DATASETS):
        raise WarehouseError(
            f"'{target}' is not a data set of the hub.",
            f"Write {_DATASETS}ORG/NAME; for anything else there, publish to a folder and upload that.",
        )
    require_access(name := target.removeprefix(_DATASETS).rstrip("/"), "dataset")
    return name


def _copy(folder: Path, storage: Storage) -> None:
    """Copy every file. Files that name others come last."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (file.parent == folder, file)):
        with pa.memory_map(str(file)) as mapped:
            storage.write(f"{storage.base}/{file.relative_to(folder).as_posix()}", mapped.read_buffer())


def _write_tables(warehouse: Warehouse, run_ids: Sequence[str], folder: Path) -> tuple[dict[str, int], Sequence[str]]:
    """Write the tables of runs, without those that turn out to be damaged.

    Returns:
        The number of rows by table, for tables that have any, and the ids of the written runs.

    Raises:
        WarehouseError: all runs are damaged.
    """
    while True:
        names = [name for name in TABLES if name not in (*PARTS, *TEXTS)]
        rows = {name: _write_table(warehouse, name, run_ids, folder) for name in names}
        readable = [run_id for run_id in run_ids if run_id not in warehouse.damaged]
        if not readable:
            raise WarehouseError(f"{warehouse.root} has no finished run that can be read.", DAMAGED)
        if len(readable) == len(run_ids):
            return {name: number for name, number in rows.items() if number}, run_ids
        run_ids = readable


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


def _card(rows: Mapping[str, int], runs: int, *, page: bool, dataset: str | None, space: str | None) -> str:
    """Return the card of a dataset on the hub, with its tables and instructions to read them.

    Args:
        page: whether the folder has a page.
        dataset, space: names on the hub, if there are any.
    """
    configs = "".join(f"- config_name: {name}\n  data_files: {DATA}/{name}.parquet\n" for name in rows)
    tables = "".join(f"| `{name}` | {describe_count(n)} | {TABLES[name].meaning} |\n" for name, n in rows.items())
    return (
        f"---\npretty_name: Layer scores\ntags: [layer-importance, pruning, avss]\nconfigs:\n{configs}---\n\n"
        f"# Layer scores of {describe_count(runs)} runs\n\nStatistics and scores of the layers of language models, by "
        "avss_dist. Layers count from 0; rank 1 is the least important layer.\n\n"
        f"| table | rows | a row is |\n|---|---|---|\n{tables}\n"
        f"In this folder, `duckdb {CATALOG}` has each table as a view, with what its columns mean; from elsewhere, "
        "`SET file_search_path = 'FOLDER'` first.\n"
        f"{_described_page(space) if page else ''}{_console(dataset) if 'scores' in rows else ''}"
    )


def _described_page(space: str | None) -> str:
    """Return the paragraph of a card on the page."""
    served = f" [Open it](https://huggingface.co/spaces/{space})." if space else " Any static host serves it."
    return f"\n`{PAGE}` shows all runs, and `{SCORES}` beside it has their scores at the published reading.{served}\n"


def _console(dataset: str | None) -> str:
    """Return the section of a card with ready queries, which link to the hub's SQL console if the data is there."""
    address = f"https://huggingface.co/datasets/{dataset}/viewer/scores/train?views%5B%5D=scores&sql_console=true&sql="
    lines = [
        f"- [{question}]({address}{quote_plus(query)})" if dataset else f"{question}:\n\n```sql\n{query}\n```\n"
        for question, query in QUERIES.items()
    ]
    where = "in the SQL console" if dataset else "where `train` is the table `scores`"
    return f"\n## Queries\n\nReady queries, {where}:\n\n" + "\n".join(lines) + "\n"
