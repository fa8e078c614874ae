"""Reading the warehouse: its tables, and SQL over them that can reach nothing else."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from avss_dist.errors import QueryError, require_known
from avss_dist.warehouse.cache import digest
from avss_dist.warehouse.schema import SCHEMAS, TABLES
from avss_dist.warehouse.store import Store, refuse_newer

_SEALED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "lock_configuration": True,
}
_READS = "A query only reads: SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN of one of them."
FUNCTIONS = {
    "sparsity_at(value, kind := 'absolute')": "near-zero counts of layer_stats at any threshold; kind 'rms' takes "
    "a multiple of the root mean square of the layer and site",
    "scores_at(value, kind := 'absolute')": "the scores of every recipe at any threshold, without intervals",
    "bin_edge(bin)": "lower edge of a bin of the histogram; that of bin + 1 is its upper edge",
}
"""Functions of SQL beside DuckDB's own, and what they give."""


class Warehouse(Store):
    """Every checkpoint's scores and statistics, to read. Runs that have not finished are not seen.

    ``Warehouse("results").sql("SELECT layer, avss_smoothed FROM scores ORDER BY rank")``
    """

    def runs(self) -> pa.Table:
        """One row for each run, failed ones too; the columns of ``SCHEMAS["runs"]``."""
        return self.table("runs")

    def scores(self, **equals: Any) -> pa.Table:
        """Scores of whole runs, those whose columns equal the given values: ``scores(site="block", layer=[0, 1])``.

        Args:
            equals: by column, a value, None (is null), or a list, tuple or set of values, any of which will do.

        Raises:
            QueryError: a column does not exist, or no score has that name in it (run, model, site, recipe and so on).
            WarehouseError: as `Store.table`.
        """
        wanted = {}
        where = pc.scalar(True)
        for name, value in equals.items():
            require_known("column", name, SCHEMAS["scores"].names, QueryError)
            wanted[name] = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
            where &= pc.field(name).isin(pa.array(wanted[name], SCHEMAS["scores"].field(name).type))
        table = self.table("scores", where=where)
        for name, values in wanted.items():
            self._require_names(table, name, values)
        return table

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
        with duckdb.connect(":memory:", config=_SEALED) as connection:
            try:
                _require_reading(connection, query)
                runs, done = self._runs()
                mentioned = _mentioned(query)
                for name in TABLES:
                    rows = None
                    if name in mentioned:
                        rows = runs if name == "runs" else self._dataset(name, done)
                    connection.register(name, SCHEMAS[name].empty_table() if rows is None else rows)
                connection.execute(_functions())
                return _fetch(connection, query)
            except duckdb.Error as error:
                hint = f"Tables: {', '.join(TABLES)}. 'DESCRIBE scores' lists the columns of one."
                raise QueryError(str(error).strip(), hint) from None

    def _open(self, name: str, files: Mapping[str, str]) -> ds.Dataset:
        """As `Store._open`, from copies where there are many files."""
        copied, left = digest(name, f"{self._fs.type_name}:{self._base}", files, SCHEMAS[name], self._open_checked)
        parts = [] if copied is None else [copied]
        return ds.dataset(parts + ([super()._open(name, left)] if left else []))

    def _open_checked(self, name: str, files: Mapping[str, str]) -> ds.Dataset:
        dataset = super()._open(name, files)
        if name == "runs":
            refuse_newer(dataset)
        return dataset


@cache
def ready_queries() -> dict[str, str]:
    """The queries of ``jobs/queries`` by name; each begins with a comment that says what it answers."""
    found = [
        file for file in (files("avss_dist.warehouse") / "sql" / "queries").iterdir() if file.name.endswith(".sql")
    ]
    return {file.name.removesuffix(".sql"): file.read_text(encoding="utf-8") for file in sorted(found, key=str)}


@cache
def _functions() -> str:
    return (files("avss_dist.warehouse") / "sql" / "functions.sql").read_text(encoding="utf-8")


def _mentioned(query: str) -> Collection[str]:
    """The tables that a query may read: those whose name is in it; all where a name may be put together."""
    words = set(re.findall(r"\w+", query.lower()))
    if words & {"query", "query_table"}:
        return TABLES
    return words | ({"layer_stats"} if words & {"sparsity_at", "scores_at"} else set())


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
    kind = statements[0].type
    if kind == duckdb.StatementType.MULTI:
        raise QueryError("PIVOT must name its columns here.", "Write PIVOT ... ON column IN ('a', 'b') USING ...")
    if kind == duckdb.StatementType.EXPLAIN:
        explained = re.sub(r"^\s*explain(\s+analyze)?\b", "", query, flags=re.IGNORECASE)
        statements = connection.extract_statements(explained)
        kind = statements[0].type
    if kind != duckdb.StatementType.SELECT:
        raise QueryError(f"{kind.name} is not allowed in a query.", _READS)
