"""Reading the warehouse: its tables, and SQL over them that can reach nothing else."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Unpack

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from avss_dist.errors import QueryError, require_known
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, StratumKey
from avss_dist.text import RedactedURI, basename
from avss_dist.warehouse.schema import SCHEMAS, TABLES, Selection
from avss_dist.warehouse.store import Store

_SEALED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "lock_configuration": True,
}
_READ_LAYER_STATS = {"sparsity_at", "scores_at"}
_READS = "A query only reads: SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN of one of them."
FUNCTIONS = {
    "sparsity_at(value, kind := 'absolute')": "near-zero counts of layer_stats at any threshold; kind 'rms' takes "
    "a multiple of the root mean square of the layer and site",
    "scores_at(value, kind := 'absolute')": "the scores of every recipe at any threshold, without intervals",
    "removals(drop)": "the layers and sublayers of a column drop, by name: 3, attention.7, mlp.7",
    "bin_edge(bin)": "lower edge of a bin of the histogram; that of bin + 1 is its upper edge",
}
"""Functions of SQL beside DuckDB's own, and what they give."""


class Warehouse:
    """Every checkpoint's scores and statistics, to read. Runs that have not finished are not seen.

    ``Warehouse("results").sql("SELECT layer, avss_smoothed FROM scores ORDER BY rank")``

    Args:
        root: a folder, or an ``s3://``, ``gs://``, ``hdfs://`` or ``file://`` URI. Opening it reads nothing.

    Raises:
        WarehouseError: there is no such kind of storage. Every method raises it where the storage fails, a file is
            damaged or a newer avss_dist wrote it.
    """

    def __init__(self, root: str | Path) -> None:
        self._store = Store(root, cached=True)

    def __repr__(self) -> str:
        return f"Warehouse({str(self.root)!r})"

    @property
    def root(self) -> RedactedURI:
        """The name of the warehouse: what it was opened by, without the keys of a URI."""
        return self._store.root

    @property
    def damaged(self) -> Mapping[str, str]:
        """Runs of which a file or a row could not be read, by id, and why: whatever was read so far is without them."""
        return self._store.damaged

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The ``runs`` row of a run by column, ``versions`` as a dict; None when it has none."""
        return self._store.run(run_id)

    def table(self, name: str, **selection: Unpack[Selection]) -> pa.Table:
        """Rows of a table: of whole runs; every row of ``runs``, evaluations, cells and experiments.

        Args:
            name: one of ``TABLES``.
            selection: ``run_ids``, ``columns`` and ``where``, see `schema.Selection`.
        """
        return self._store.table(name, **selection)

    def dataset(self, name: str) -> ds.Dataset | None:
        """The rows of `table`, not read yet; None where the table has no file."""
        return self._store.dataset(name)

    def read_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """The merged statistics of a run by (layer, site).

        Raises:
            WarehouseError: it has none.
        """
        return self._store.read_layer_stats(run_id)

    def read_stratum_stats(self, run_id: str) -> dict[StratumKey, LayerStats]:
        """The merged statistics of the strata of a run by (layer, site, stratum); none where its text is not paired."""
        return self._store.read_stratum_stats(run_id)

    def readable_layer_stats(self, run_id: str) -> dict[LayerKey, LayerStats]:
        """As `read_layer_stats`; nothing where they are damaged, which `damaged` notes."""
        return self._store.readable_layer_stats(run_id)

    def read_shards(self, run_id: str, expected: Mapping[int, str]) -> list[ShardResult]:
        """The partials of a run in the order of ``expected`` (content hash by shard id), less those not whole."""
        return self._store.read_shards(run_id, expected)

    def read_partials(self, run: Mapping[str, Any]) -> list[ShardResult]:
        """Every partial of a row of ``runs``, in order; none where some are gone."""
        columns = ["shard_id", "content_hash"]
        kept = self.table("shard_stats", run_ids=[run["run_id"]], columns=columns).to_pylist()
        expected = {row["shard_id"]: row["content_hash"] for row in sorted(kept, key=lambda row: row["shard_id"])}
        shards = self.read_shards(run["run_id"], expected)
        return shards if [shard.shard_id for shard in shards] == list(range(run["num_shards"] or 0)) else []

    def stats_by_run(self, run_ids: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Rows of ``layer_stats`` as `table` gives them, run after run: one of them is in memory at a time."""
        return self._store.stats_by_run(run_ids, columns)

    def runs(self) -> pa.Table:
        """One row for each run, failed ones too; the columns of ``SCHEMAS["runs"]``."""
        return self.table("runs")

    def unfinished(self) -> pa.Table:
        """Return the runs that have begun and not finished, with how many of their shards are kept; the newest first.

        They are interrupted, or are measured now. The same command goes on with them.

        Returns:
            The columns of ``schema.UNFINISHED_RUNS``; all but ``run_id`` and ``kept_shards`` are null of a run that an
            earlier version began.
        """
        return self._store.unfinished()

    def scores(self, **equals: Any) -> pa.Table:
        """Scores of whole runs, those whose columns equal the given values: ``scores(site="block", layer=[0, 1])``.

        Args:
            equals: by column, a value, None (is null), or a list, tuple or set of values, any of which will do. A model
                is named in full, or by the end of its path.

        Raises:
            QueryError: a column does not exist, or no score has that name in it (run, model, site, recipe and so on).
            WarehouseError: as `table`.
        """
        wanted = {}
        where = pc.scalar(True)
        for name, value in equals.items():
            require_known("column", name, SCHEMAS["scores"].names, QueryError)
            wanted[name] = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
            if name == "model":
                wanted[name] = self._models(wanted[name])
            where &= pc.field(name).isin(pa.array(wanted[name], SCHEMAS["scores"].field(name).type))
        table = self.table("scores", where=where)
        for name, values in wanted.items():
            self._require_names(table, name, values)
        return table

    def _models(self, names: list[Any]) -> list[Any]:
        """Models in full, of those that are named by the end of their path."""
        known = pc.unique(self.table("runs", columns=["model"])["model"]).to_pylist()
        ends = {name: [model for model in known if model and basename(model) == name] for name in names}
        return [model for name in names for model in ([name] if name in known else ends[name] or [name])]

    def _require_names(self, found: pa.Table, column: str, values: list[Any]) -> None:
        """Refuse a name that no score has; a warehouse without scores has no names to compare with."""
        if not pa.types.is_string(SCHEMAS["scores"].field(column).type):
            return
        missing = {value for value in values if value is not None} - set(pc.unique(found[column]).to_pylist())
        known = pc.unique(self.table("scores", columns=[column])[column]).to_pylist() if missing else []
        for value in missing if known else ():
            require_known(column, value, sorted(name for name in known if name is not None), QueryError)

    def layer_stats(self) -> pa.Table:
        """Merged statistics of whole runs, a row for each (layer, site); the columns of ``SCHEMAS["layer_stats"]``."""
        return self.table("layer_stats")

    def sql(self, query: str) -> pa.Table:
        """The result of one DuckDB query over the views of `TABLES`.

        ``@name`` is the query of that name in `ready_queries`. The functions of `FUNCTIONS` are there besides DuckDB's
        own. A table without files is an empty view. Nothing else can be reached: no file, network, extension or
        variable.

        Raises:
            QueryError: the query is wrong, in the database's own words, or does more than read.
            WarehouseError: not a warehouse, no runs yet, or a newer schema.
        """
        if query.startswith("@"):
            ready = ready_queries()
            query = ready[require_known("query", query[1:].strip(), ready, QueryError)]
        try:
            with duckdb.connect(":memory:", config=_SEALED) as connection:
                _require_reading(connection, query)
            answer = partial(_answer, query)
            return self._store.read(_mentioned(query), answer, failures=(duckdb.InvalidInputException,))
        except duckdb.Error as error:
            hint = f"Tables: {', '.join(TABLES)}. 'DESCRIBE scores' lists the columns of one."
            raise QueryError(str(error).strip(), hint) from None


@cache
def ready_queries() -> dict[str, str]:
    """Return the queries in ``sql/queries`` by name. Each begins with a comment that says which question it answers."""
    found = [
        file for file in (files("avss_dist.warehouse") / "sql" / "queries").iterdir() if file.name.endswith(".sql")
    ]
    return {file.name.removesuffix(".sql"): file.read_text(encoding="utf-8") for file in sorted(found, key=str)}


@cache
def _functions() -> str:
    return (files("avss_dist.warehouse") / "sql" / "functions.sql").read_text(encoding="utf-8")


def _mentioned(query: str) -> Collection[str]:
    """The tables that a query may read: those whose name is in it; all where a name may be put together.

    DuckDB's own `get_table_names` refuses ``JOIN ... USING`` and the functions of SQL that are defined here.
    """
    words = set(re.findall(r"\w+", query.lower()))
    if words & {"query", "query_table"}:
        return TABLES
    return [name for name in TABLES if name in words or (name == "layer_stats" and words & _READ_LAYER_STATS)]


def _answer(query: str, rows: Mapping[str, ds.Dataset | None]) -> pa.Table:
    """The result of a query over datasets of tables."""
    with duckdb.connect(":memory:", config=_SEALED) as connection:
        for name, schema in SCHEMAS.items():
            opened = rows.get(name)
            connection.register(name, schema.empty_table() if opened is None else opened)
        connection.execute(_functions())
        return _fetch(connection, query)


def _fetch(connection: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    """Run the query by ``execute``, whose errors point with a caret; ``sql``, which DuckDB would prefer, drops it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Arrow output on a DB-API result", UserWarning)
        return connection.execute(query).to_arrow_table()


def _require_reading(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    statements = connection.extract_statements(query)
    if not statements:
        raise QueryError("The query is empty.", _READS)
    if len(statements) > 1:
        raise QueryError(f"There are {len(statements)} statements; a query is one.", "Run them one by one.")
    kind = _kind(statements[0])
    if kind == duckdb.StatementType.MULTI:
        raise QueryError("PIVOT must name its columns here.", "Write PIVOT ... ON column IN ('a', 'b') USING ...")
    if kind == duckdb.StatementType.EXPLAIN:
        explained = re.sub(r"^\s*explain(\s+analyze)?\b", "", query, flags=re.IGNORECASE)
        statements = connection.extract_statements(explained)
        kind = _kind(statements[0])
    if kind != duckdb.StatementType.SELECT:
        raise QueryError(f"{kind.name} is not allowed in a query.", _READS)


def _kind(statement: duckdb.Statement) -> duckdb.StatementType:
    try:
        return statement.type
    except ValueError:  # DuckDB has more of them than its Python names: UPDATE EXTENSIONS
        raise QueryError("This statement is not allowed in a query.", _READS) from None
