"""SQL over the warehouse: it reads every table, and reaches nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from avss_dist.errors import QueryError, WarehouseError
from avss_dist.query import Warehouse
from avss_dist.warehouse import SCHEMAS, TABLES, RunIdentity

ROWS = [
    {"layer": i, "site": site, "recipe": "pooled", "threshold": 1e-5, "avss_smoothed": i + 0.5, "rank": i + 1}
    for i in range(3)
    for site in ("block", "mlp")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warehouse")
    store = Warehouse(root)
    for run_id, status in [("tiny-1", "done"), ("tiny-2", "done"), ("tiny-3", "failed")]:
        run = RunIdentity(run_id=run_id, model=f"org/{run_id}", revision=None, family="llama")
        store.write_scores(run, ROWS)
        store.write_run({"run_id": run_id, "status": status, "model": run.model, "versions": {"torch": "2"}})
    return root


@pytest.fixture
def warehouse(root: Path) -> Warehouse:
    return Warehouse(root)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT count(*) FROM scores", [12]),
        ("select count(*) from scores;", [12]),
        ("-- a note\nSELECT count(*) FROM runs", [3]),
        ("SELECT DISTINCT run_id FROM scores ORDER BY 1", ["tiny-1", "tiny-2"]),
        ("WITH s AS (FROM scores WHERE site = 'mlp') SELECT max(rank) FROM s", [3]),
        ("SELECT count(*) FROM scores WHERE run_id = 'tiny-2' AND avss_smoothed > 1 AND avss IS NULL", [4]),
        ("SELECT r.status FROM scores s JOIN runs r USING (run_id) GROUP BY ALL", ["done"]),
        ("SELECT versions['torch'] FROM runs WHERE run_id = 'tiny-1'", ["2"]),
        ("VALUES (1)", [1]),
        ("SELECT count(*) FROM evaluations", [0]),
        ("SELECT count(*) FROM layer_stats", [0]),
        ("SELECT count(*) FROM (PIVOT scores ON site IN ('block', 'mlp') USING sum(rank) GROUP BY layer)", [3]),
    ],
)
def test_reads(warehouse: Warehouse, query: str, expected: list[object]) -> None:
    result = warehouse.sql(query)
    assert isinstance(result, pa.Table)
    assert result.column(0).to_pylist() == expected


@pytest.mark.parametrize(
    "query", ["DESCRIBE scores", "SHOW TABLES", "SUMMARIZE scores", "EXPLAIN FROM runs", "explain analyze FROM runs"]
)
def test_looks_around(warehouse: Warehouse, query: str) -> None:
    assert warehouse.sql(query).num_rows > 0


def test_views_are_the_tables(warehouse: Warehouse) -> None:
    assert sorted(warehouse.sql("SHOW TABLES").column(0).to_pylist()) == sorted(TABLES)
    for name in TABLES:
        assert warehouse.sql(f"FROM {name} LIMIT 0").schema.names == SCHEMAS[name].names


@pytest.mark.parametrize(
    "query",
    [
        "CREATE TABLE t (i INT)",
        "CREATE TABLE t AS PIVOT scores ON site USING sum(rank)",
        "INSERT INTO runs VALUES (1)",
        "UPDATE runs SET status = 'done'",
        "DELETE FROM runs",
        "DROP VIEW runs",
        "COPY scores TO 'out.csv'",
        "COPY (FROM scores) TO 'out.parquet'",
        "EXPORT DATABASE 'out'",
        "IMPORT DATABASE 'out'",
        "ATTACH 'out.db'",
        "USE memory",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA version",
        "CALL pragma_version()",
        "SET threads = 1",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "SET VARIABLE x = 1",
        "PREPARE p AS SELECT 1",
        "BEGIN",
        "VACUUM",
        "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO 'out.csv'",
        "/* */ EXPLAIN (ANALYZE) COPY (SELECT 1) TO 'out.csv'",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP VIEW runs",
        "WITH x AS (INSERT INTO runs VALUES (1)) SELECT 1",
        "",
        ";",
        "-- nothing",
    ],
)
def test_everything_else_is_refused(
    warehouse: Warehouse, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError):
        warehouse.sql(query)
    assert list(tmp_path.iterdir()) == []
    assert warehouse.sql("SELECT count(*) FROM runs").column(0).to_pylist() == [3]


def test_the_refusal_says_what_is_allowed(warehouse: Warehouse) -> None:
    with pytest.raises(QueryError, match=r"COPY is not allowed in a query.\nA query only reads: SELECT, WITH"):
        warehouse.sql("COPY scores TO 'out.csv'")
    with pytest.raises(QueryError, match="There are 2 statements; a query is one"):
        warehouse.sql("SELECT 1; SELECT 2")
    with pytest.raises(QueryError, match=r"PIVOT must name its columns"):
        warehouse.sql("PIVOT scores ON site USING sum(rank)")


@pytest.mark.parametrize(
    "source",
    [
        "read_csv('/etc/passwd')",
        "read_text('/etc/passwd')",
        "read_blob('/etc/passwd')",
        "read_parquet('{root}/scores/**/*.parquet')",
        "sniff_csv('/etc/passwd')",
        "glob('/*')",
        "'/etc/passwd'",
        "'{root}/scores/run_id=tiny-1/scores.parquet'",
        "read_csv('https://example.org/x.csv')",
        "'s3://bucket/x.parquet'",
        "query('FROM read_text(''/etc/passwd'')')",
    ],
)
def test_files_are_out_of_reach(warehouse: Warehouse, root: Path, source: str) -> None:
    with pytest.raises(QueryError):
        warehouse.sql(f"FROM {source.replace('{root}', str(root))}")


def test_python_variables_are_out_of_reach(warehouse: Warehouse) -> None:
    secret = pa.table({"x": [1]})
    assert duckdb.execute("FROM secret").fetchall() == [(1,)]
    assert secret.num_rows == 1
    with pytest.raises(QueryError, match="secret does not exist"):
        warehouse.sql("FROM secret")


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("SELECT avs FROM scores", r"(?s)\"avs\" not found.*Candidate bindings: .*avss.*\^"),
        ("SELECT 1 FROM score", r"(?s)score does not exist!.*Did you mean \"scores\".*\^"),
        ("SELEC 1", r"(?s)syntax error at or near \"SELEC\".*\^"),
        ("SELECT CAST('x' AS INT)", "Could not convert string 'x' to INT32"),
    ],
)
def test_a_mistake_shows_the_databases_own_message(warehouse: Warehouse, query: str, text: str) -> None:
    with pytest.raises(QueryError, match=text) as caught:
        warehouse.sql(query)
    assert caught.value.hint == f"Tables: {', '.join(TABLES)}. 'DESCRIBE scores' lists the columns of one."
    assert caught.value.__suppress_context__


def test_no_warehouse(tmp_path: Path) -> None:
    with pytest.raises(WarehouseError, match="is not a warehouse"):
        Warehouse(tmp_path).sql("FROM runs")


def test_scores_by_column(warehouse: Warehouse) -> None:
    assert warehouse.runs().num_rows == 3
    assert warehouse.layer_stats().num_rows == 0
    assert warehouse.scores().num_rows == 12
    assert warehouse.scores(site="block", run_id="tiny-1").num_rows == 3
    assert warehouse.scores(layer=[0, 2], threshold=1e-5, avss=None).num_rows == 8
    assert warehouse.scores(layer=99).num_rows == 0
    with pytest.raises(QueryError, match=r"Unknown column 'sit'.\nDid you mean 'site'"):
        warehouse.scores(sit="block")
    with pytest.raises(QueryError, match=r"Unknown site 'blok'.\nDid you mean 'block'"):
        warehouse.scores(site="blok")


def test_a_query_loads_nothing_heavy(root: Path) -> None:
    program = (
        "import sys; from avss_dist.query import Warehouse\n"
        f"assert Warehouse({str(root)!r}).sql('FROM scores').num_rows == 12\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1], timeout=60)
