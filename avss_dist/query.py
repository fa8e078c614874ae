"""Reading the warehouse: its tables, and SQL over them that can reach nothing else."""

from __future__ import annotations

import re
import warnings
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.errors import QueryError, require_known
from avss_dist.warehouse import SCHEMAS, TABLES, Store

_SEALED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "lock_configuration": True,
}
_READS = "A query only reads: SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN of one of them."


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
        table = self.table("scores")
        kept = table
        for name, value in equals.items():
            require_known("column", name, table.column_names, QueryError)
            values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
            _require_names(table, name, values)
            kept = kept.filter(pc.field(name).isin(pa.array(values, SCHEMAS["scores"].field(name).type)))
        return kept

    def layer_stats(self) -> pa.Table:
        """Merged statistics of whole runs, a row for each (layer, site); the columns of ``SCHEMAS["layer_stats"]``."""
        return self.table("layer_stats")

    def sql(self, query: str) -> pa.Table:
        """The result of one DuckDB query over the views ``runs, scores, layer_stats, shard_stats, evaluations``.

        A table without files is an empty view. Nothing else can be reached: no file, network, extension or variable.

        Raises:
            QueryError: the query is wrong, in the database's own words, or does more than read.
            WarehouseError: not a warehouse, no runs yet, or a newer schema.
        """
        with duckdb.connect(":memory:", config=_SEALED) as connection:
            try:
                _require_reading(connection, query)
                runs, done = self._runs()
                for name in TABLES:
                    rows = runs if name == "runs" else self._dataset(name, done)
                    connection.register(name, SCHEMAS[name].empty_table() if rows is None else rows)
                return _fetch(connection, query)
            except duckdb.Error as error:
                hint = f"Tables: {', '.join(TABLES)}. 'DESCRIBE scores' lists the columns of one."
                raise QueryError(str(error).strip(), hint) from None


def _fetch(connection: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    """Run the query by ``execute``, whose errors point with a caret; ``sql``, which DuckDB would prefer, drops it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Arrow output on a DB-API result", UserWarning)
        return connection.execute(query).to_arrow_table()


def _require_names(table: pa.Table, column: str, values: list[Any]) -> None:
    """Refuse a name that no row has; an empty table has no names to compare with."""
    if not pa.types.is_string(table.schema.field(column).type) or not table.num_rows:
        return
    known = [name for name in pc.unique(table[column]).to_pylist() if name is not None]
    for value in values:
        if value is not None:
            require_known(column, value, sorted(known), QueryError)


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
