"""SQL over the tables of a warehouse, by a DuckDB that can reach nothing else."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from importlib.resources import files

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from avss_dist.core.errors import QueryError, require_known
from avss_dist.warehouse.schema import SCHEMAS, TABLES

_SEALED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "lock_configuration": True,
}
_READS = "A query only reads: SELECT, WITH, FROM, VALUES, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN of one of them."
VIEWS = {
    "published": "the usual reading of scores, one row for each layer of a run: block, pooled, threshold 1e-5",
    "latest": "the newest finished run of each model, revision and text, as in runs",
    "layers": "published scores of the latest runs, with the columns of runs",
}
"""Views of SQL in addition to the tables, with their rows."""
_BEHIND = {
    "published": ("scores",),
    "latest": ("runs",),
    "layers": ("scores", "runs"),
    "sparsity_at": ("layer_stats",),
    "scores_at": ("layer_stats",),
}
"""Tables that a view or a function reads."""
FUNCTIONS = {
    "sparsity_at(value, kind := 'absolute')": "near-zero counts of layer_stats at any threshold; kind 'rms' takes "
    "a multiple of the root mean square of the layer and site",
    "scores_at(value, kind := 'absolute')": "the scores of every recipe at any threshold, without intervals",
    "removals(drop, drop_parts)": "the layers, sublayers and experts of these columns, by name: 3, attention.7, mlp.7, "
    "expert.7.12",
    "bin_edge(bin)": "lower edge of a bin of the histogram; that of bin + 1 is its upper edge",
}
"""Functions of SQL in addition to DuckDB's own, with their results."""


def run_query(query: str, read: Callable[..., pa.Table]) -> pa.Table:
    """Return the result of one query. See `reader.Warehouse.sql`.

    Args:
        read: calls a function with the datasets of named tables, and returns its result.
    """
    if query.startswith("@"):
        ready = ready_queries()
        query = ready[require_known("query", query[1:].strip(), ready, QueryError)]
    try:
        with duckdb.connect(":memory:", config=_SEALED) as connection:
            _require_reading(connection, query)
        answer = partial(_answer, query)
        return read(_readable_tables(query), answer, failures=(duckdb.InvalidInputException,))
    except duckdb.Error as error:
        hint = f"Views: {', '.join(VIEWS)}. Tables: {', '.join(TABLES)}. 'DESCRIBE scores' lists the columns of one."
        raise QueryError(str(error).strip(), hint) from None


@cache
def ready_queries() -> dict[str, str]:
    """Return the queries in ``sql/queries`` by name. Each begins with a comment that states the question it answers."""
    queries = {}
    folder = files("avss_dist.warehouse") / "sql" / "queries"
    for file in sorted(folder.iterdir(), key=str):
        if file.name.endswith(".sql"):
            queries[file.name.removesuffix(".sql")] = file.read_text("utf-8")
    return queries


def question_of(query: str) -> str:
    """Return the question that a ready-made query answers, which its comment begins with."""
    lines = [line.removeprefix("-- ") for line in query.splitlines() if line.startswith("--")]
    question, mark, _ = " ".join(lines).partition("?")
    return question + mark


def _readable_tables(query: str) -> Collection[str]:
    """Return the tables that a query may read: tables whose name is in it, or all if it may build a name.

    DuckDB's own `get_table_names` refuses ``JOIN ... USING`` and the functions of SQL that are defined here.
    """
    words = set(re.findall(r"\w+", query.lower()))
    for name in words & _BEHIND.keys():
        words.update(_BEHIND[name])
    if words & {"query", "query_table"}:
        return TABLES
    return [name for name in TABLES if name in words]


def _answer(query: str, rows: Mapping[str, ds.Dataset | None]) -> pa.Table:
    """Return the result of a query over datasets of tables."""
    with duckdb.connect(":memory:", config=_SEALED) as connection:
        for name, schema in SCHEMAS.items():
            opened = rows.get(name)
            if opened is None:
                connection.register(name, schema.empty_table())
            else:
                connection.register(name, opened)
        folder = files("avss_dist.warehouse") / "sql"
        for file in ("functions.sql", "views.sql"):
            connection.execute((folder / file).read_text("utf-8"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Arrow output on a DB-API result", UserWarning)
            return connection.execute(query).to_arrow_table()  # its errors have a caret, unlike those of ``sql``


def _require_reading(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    statements = connection.extract_statements(query)
    if not statements:
        raise QueryError("The query is empty.", _READS)
    if len(statements) > 1:
        raise QueryError(f"There are {len(statements)} statements; a query is one.", "Run them one by one.")
    explained = re.sub(r"^\s*explain(\s+analyze)?\b", "", query, flags=re.IGNORECASE)
    try:
        kind = connection.extract_statements(explained)[0].type
    except ValueError:  # DuckDB has more of them than its Python names: UPDATE EXTENSIONS
        raise QueryError("This statement is not allowed in a query.", _READS) from None
    if kind == duckdb.StatementType.MULTI:
        raise QueryError("PIVOT must name its columns here.", "Write PIVOT ... ON column IN ('a', 'b') USING ...")
    if kind != duckdb.StatementType.SELECT:
        raise QueryError(f"{kind.name} is not allowed in a query.", _READS)
