"""SQL over the warehouse: it reads every table, and reaches nothing else."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command_line import avss
from support.rows import column, where
from support.warehouses import activations, identity_of, run_row, stats_of, write_measured, write_profiles

import avss_dist
from avss_dist.core.errors import QueryError
from avss_dist.read_commands import ls
from avss_dist.reports.terminal.schema import schema_markdown
from avss_dist.warehouse.query import FUNCTIONS, VIEWS, question_of, ready_queries
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS, TABLES
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warehouse")
    profiles = {(site, "pooled", 1e-5): [0.5, 1.5, 2.5] for site in ("block", "mlp")}
    for run_id, status in [("tiny-1", "done"), ("tiny-2", "done"), ("tiny-3", "failed")]:
        write_profiles(root, run_id, profiles, status=status, versions={"torch": "2"})
    return root


@pytest.fixture
def warehouse(root: Path) -> Warehouse:
    return Warehouse(root)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT count(*) FROM scores", [12]),
        ("-- a note\nselect count(*) from runs;", [3]),
        ("SELECT DISTINCT run_id FROM scores ORDER BY 1", ["tiny-1", "tiny-2"]),
        ("WITH s AS (FROM scores WHERE site = 'mlp') SELECT max(rank) FROM s", [3]),
        ("SELECT count(*) FROM scores WHERE run_id = 'tiny-2' AND avss_smoothed > 1 AND avss IS NULL", [4]),
        ("SELECT r.status FROM scores s JOIN runs r USING (run_id) GROUP BY ALL", ["done"]),
        ("SELECT versions['torch'] FROM runs WHERE run_id = 'tiny-1'", ["2"]),
        ("VALUES (1)", [1]),
        ("SELECT count(*) FROM evaluations", [0]),
        ("SELECT count(*) FROM (PIVOT scores ON site IN ('block', 'mlp') USING sum(rank) GROUP BY layer)", [3]),
    ],
)
def test_reads(warehouse: Warehouse, query: str, expected: list[object]) -> None:
    result = warehouse.sql(query)
    assert isinstance(result, pa.Table)
    assert result.column(0).to_pylist() == expected


def test_views_are_the_tables(warehouse: Warehouse) -> None:
    for query in ("DESCRIBE scores", "SUMMARIZE scores", "EXPLAIN FROM runs", "explain analyze FROM runs"):
        assert warehouse.sql(query).num_rows > 0
    assert sorted(warehouse.sql("SHOW TABLES").column(0).to_pylist()) == sorted([*TABLES, *VIEWS])
    for name in TABLES:
        assert warehouse.sql(f"FROM {name} LIMIT 0").schema.names == SCHEMAS[name].names


@pytest.mark.parametrize(
    "query",
    [
        "CREATE TABLE t (i INT)",
        "CREATE TABLE t AS PIVOT scores ON site USING sum(rank)",
        "INSERT INTO runs VALUES (1)",
        "DROP VIEW runs",
        "COPY (FROM scores) TO 'out.parquet'",
        "EXPORT DATABASE 'out'",
        "ATTACH 'out.db'",
        "INSTALL httpfs",
        "PRAGMA version",
        "CALL pragma_version()",
        "SET VARIABLE x = 1",
        "PREPARE p AS SELECT 1",
        "BEGIN",
        "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
        "/* */ EXPLAIN (ANALYZE) COPY (SELECT 1) TO 'out.csv'",
        "SELECT 1; DROP VIEW runs",
        "WITH x AS (INSERT INTO runs VALUES (1)) SELECT 1",
        ";",
        "-- nothing",
        "FROM read_text('/etc/passwd')",
        "FROM read_parquet('{root}/scores/**/*.parquet')",
    ],
)
def test_everything_else_is_refused(
    warehouse: Warehouse, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError):
        warehouse.sql(query.replace("{root}", warehouse.root))
    assert list(tmp_path.iterdir()) == []
    assert warehouse.sql("SELECT count(*) FROM runs").column(0).to_pylist() == [3]


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
        ("SELECT CAST('x' AS INT)", "Could not convert string 'x' to INT32"),
    ],
)
def test_a_mistake_shows_the_databases_own_message(warehouse: Warehouse, query: str, text: str) -> None:
    with pytest.raises(QueryError, match=text) as caught:
        warehouse.sql(query)
    assert f"Views: published, latest, layers. Tables: {', '.join(TABLES)}." in str(caught.value.hint)
    assert caught.value.__suppress_context__


def test_scores_by_column(warehouse: Warehouse) -> None:
    assert warehouse.runs().num_rows == 3
    assert warehouse.table("layer_stats").num_rows == 0
    assert warehouse.scores().num_rows == 12
    assert warehouse.scores(site="block", run_id="tiny-1").num_rows == 3
    assert warehouse.scores(layer=[0, 2], threshold=1e-5, avss=None).num_rows == 8
    assert warehouse.scores(layer=99).num_rows == 0
    with pytest.raises(QueryError, match=r"Unknown column 'sit'.\nDid you mean 'site'"):
        warehouse.scores(sit="block")
    with pytest.raises(QueryError, match=r"Unknown site 'blok'.\nDid you mean 'block'"):
        warehouse.scores(site="blok")


@pytest.mark.nightly
def test_a_command_that_reads_loads_no_pandas_and_no_requests_of_others(root: Path) -> None:
    program = (
        "import sys; from avss_dist.__main__ import main\n"
        f"sys.argv = ['avss', 'ls', '-w', {str(root)!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    assert not {'pandas', 'avss_dist.requests'} & set(sys.modules)\n"
        "    import pandas  # which is installed"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0 and "tiny-1" in done.stdout, done.stderr


# What the columns mean.


def test_every_column_is_described_once() -> None:
    meanings: dict[str, set[str]] = {}
    for name, table in TABLES.items():
        names = {declared.name for declared in table.columns}
        assert len(names) == len(table.columns), name
        for declared in table.columns:
            text = declared.meaning
            assert text
            assert "\n" not in text
            assert text.rstrip(".") in (text, text[:-3]), declared
            meanings.setdefault(text, set()).add(declared.name)
    for text, names in meanings.items():
        assert len(names) == 1, text


def test_the_documentation_has_every_column_as_it_is_declared() -> None:
    page = (Path(avss_dist.__file__).parent / "docs" / "reference" / "warehouse.md").read_text(encoding="utf-8")
    assert page.partition("\n## Columns\n")[2].partition("\n### ")[2] == schema_markdown().partition("### ")[2]


def test_the_schema_needs_no_warehouse() -> None:
    result = avss("query", "--schema")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    for table in TABLES.values():
        for declared in table.columns:
            lines_of_column = [line for line in lines if line.split()[:1] == [declared.name]]
            assert any(declared.meaning[:40] in line for line in lines_of_column), declared
    for name in ready_queries():
        assert f"@{name}" in result.stdout
    for name in FUNCTIONS:
        assert name in result.stdout
    rows = avss("query", "--schema", "--format", "csv").stdout.splitlines()
    assert rows[0] == "table,column,type,unit,meaning"
    assert len(rows) == 1 + sum(map(len, SCHEMAS.values()))
    assert schema_markdown() in avss("query", "--schema", "--format", "markdown").stdout


# Ready queries.


@pytest.mark.parametrize("name", ready_queries())
def test_a_ready_query_is_described_by_its_question(name: str) -> None:
    """A whole one, which ends where a sentence ends."""
    question = question_of(ready_queries()[name])
    assert question.endswith("?") and question in " ".join(
        line.removeprefix("-- ") for line in ready_queries()[name].splitlines()
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three revisions of a model, the last of them scored first, and another family."""
    root = tmp_path_factory.mktemp("scored")
    for seed in (2, 1, 0):
        x = activations(seed, scales=np.roll([1.0, 2.2, 0.6, 3.3, 1.5, 0.4, 5.0, 2.8], seed))
        columns = {"model": "org/llama", "revision": f"{seed}" * 40, "num_parameters": 10, "partition": "single"}
        columns |= {"revision_name": f"step{seed}", "series": "org/llama@step*", "training_step": seed}
        columns |= {"training_tokens": seed * 10**6}
        write_measured(root, f"llama-{seed}", stats_of(x), 8, **columns)
    write_measured(root, "bert-0", stats_of(activations(9)[:, :4]), 4, family="bert")
    return root


def test_views_have_one_row_for_each_layer_and_the_newest_runs(scored: Path, warehouse: Warehouse) -> None:
    for seed, name in ((7, "llama-again"), (8, "llama-text")):
        columns = {"model": "org/llama", "revision": "0" * 40, "corpus": "other.txt" if seed == 8 else None}
        columns["created_at"] = datetime(2100, 1, seed, tzinfo=UTC)
        write_measured(scored.parent / "more", name, stats_of(activations(seed)), 8, **columns)
    reader = Warehouse(scored)
    layers = "SELECT run_id, count(*), count(DISTINCT layer), min(threshold), max(recipe), max(site) FROM published"
    rows = reader.sql(f"{layers} GROUP BY ALL ORDER BY run_id").to_pylist()
    expected = [("bert-0", 4), *((f"llama-{seed}", 8) for seed in range(3))]
    assert [tuple(row.values()) for row in rows] == [(name, n, n, 1e-5, "pooled", "block") for name, n in expected]
    assert reader.sql("SELECT count(*) FROM latest").to_pylist() == [{"count_star()": 4}]
    assert reader.sql("SELECT DISTINCT run_id, training_step FROM layers ORDER BY 1").num_rows == 4
    more = Warehouse(scored.parent / "more")
    assert more.sql("SELECT run_id FROM latest ORDER BY 1")["run_id"].to_pylist() == ["llama-again", "llama-text"]
    assert warehouse.sql("FROM layers").num_rows == warehouse.sql("FROM published JOIN latest USING (run_id)").num_rows


def test_the_readme_of_a_warehouse_shows_queries_that_run(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written once; a README.md of other people stays."""
    store, row = Store(scored), Store(scored).reader.run("bert-0")
    assert row
    text = (scored / "README.md").read_text()
    assert all(f"| `{column.name}` | {column.type} | " in text for info in TABLES.values() for column in info.columns)
    monkeypatch.chdir(scored)
    (command,) = re.findall(r"```bash\navss (\w+) -w (\S+) \"(.*)\"\n", text)
    assert avss(command[0], "-w", command[1], command[2]).exit_code == 0
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        shown = io.StringIO()
        with redirect_stdout(shown):
            exec(example, {})
        assert "org/llama" in shown.getvalue()
    (scored / "README.md").write_text(text.replace("rank", "place"))
    store.write_run(row)
    assert (scored / "README.md").read_text() == text
    (scored / "README.md").write_text("# My runs")
    store.write_run(row)
    assert (scored / "README.md").read_text() == "# My runs"


@pytest.mark.parametrize("table", ["runs", "scores", "layer_stats"])
def test_files_say_what_their_columns_are(scored: Path, table: str) -> None:
    file = "run" if table == "runs" else table
    schema = pq.read_schema(scored / table / "run_id=bert-0" / f"{file}.parquet")
    described = {field.name: field.metadata[b"description"].decode() for field in schema}
    assert described == {c.name: c.description for c in TABLES[table].columns if c.name != "run_id"}


def test_ready_queries_run_on_any_warehouse(warehouse: Warehouse, scored: Path) -> None:
    assert list(ready_queries()) == ["cost", "drift", "lowest_quartile", "recipe_disagreement", "stability"]
    for name, text in ready_queries().items():
        assert text.startswith("-- ") and text.splitlines()[0].count("?") == 1
        warehouse.sql(f"@{name}")
        table = Warehouse(scored).sql(f"@{name}")
        assert table.num_rows and all(column.null_count < table.num_rows for column in table.columns)


def test_the_lowest_quartile_by_family(scored: Path) -> None:
    rows = {row["family"]: row for row in Warehouse(scored).sql("@lowest_quartile").to_pylist()}
    scores = Warehouse(scored).scores(site="block", recipe="pooled", threshold=1e-5, family="llama").to_pylist()
    depths = np.array([s["depth"] for s in scores if s["rank"] <= 2])
    assert rows["llama"]["runs"] == 3 and rows["bert"]["runs"] == 1
    assert rows["llama"]["mean_depth"] == pytest.approx(depths.mean(), abs=1e-3)
    assert rows["llama"]["early"] == pytest.approx((depths < 1 / 3).mean(), abs=1e-3)
    assert all(row["early"] + row["middle"] + row["late"] == pytest.approx(1, abs=2e-3) for row in rows.values())


def test_drift_follows_the_revisions_in_order(scored: Path) -> None:
    rows = Warehouse(scored).sql("@drift").to_pylist()
    assert set(column(rows, "series")) == {"org/llama@step*"}
    for layer in range(8):
        found = where(rows, layer=layer)
        assert column(found, "revision_name") == ["step0", "step1", "step2"]
        assert found[0]["rank_change"] is None
        assert column(found[1:], "rank_change") == [b["rank"] - a["rank"] for a, b in pairwise(found)]


def test_recipes_of_each_run_and_the_cost_of_each_model(scored: Path) -> None:
    rows = Warehouse(scored).sql("@recipe_disagreement").to_pylist()
    assert set(column(rows, "run_id")) == {"llama-0", "llama-1", "llama-2", "bert-0"}
    assert all(row["pooled_element"] == 1 for row in rows)
    costs = {row["model"]: row for row in Warehouse(scored).sql("@cost").to_pylist()}
    assert [costs["org/llama"][name] for name in ("runs", "wall_seconds", "num_tokens")] == [3, 6, 384]


def test_only_what_a_query_mentions_is_opened(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    listed = Storage.files

    def spy(self: Storage, table: str) -> dict[str, tuple[str, str]]:
        opened.append(table)
        return listed(self, table)

    monkeypatch.setattr(Storage, "files", spy)
    for query, tables in [
        ("SELECT count(*) FROM runs", ["runs"]),
        ("SELECT count(*) FROM scores JOIN runs USING (run_id)", ["runs", "scores"]),
        ('SELECT count(*) FROM "SCORES"', ["runs", "scores"]),
        ("FROM scores_at(0.3)", ["layer_stats", "runs"]),
        ("FROM query('FROM sco' || 'res')", sorted(TABLES)),
    ]:
        opened.clear()
        assert Warehouse(scored).sql(query).num_rows
        assert sorted(opened) == tables


# Bad input, as the command tells it.


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("SELECT 1; SELECT 2", "There are 2 statements; a query is one"),
        ("PIVOT scores ON site USING sum(rank)", "PIVOT must name its columns"),
        ("@drft", "Unknown query 'drft'.\nDid you mean 'drift'?"),
        (None, "avss query needs a query"),
    ],
)
def test_mistakes_are_told_without_a_traceback(root: Path, query: str | None, text: str) -> None:
    result = avss("query", "-w", root, *([query] if query else []))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("value", ["INTERVAL 1 DAY", "[INTERVAL 1 DAY]", "union_value(a := 1)"])
def test_what_parquet_cannot_hold_is_named(value: str, root: Path) -> None:
    result = avss("query", "-w", root, f"SELECT 1 AS a, {value} AS waited", "--format", "parquet")
    assert result.exit_code == 2
    assert result.stdout_bytes == b""
    assert result.stderr.startswith("Error: Parquet has no type for column 'waited' (")
    assert "SELECT column::VARCHAR" in result.stderr


@pytest.mark.parametrize("value", ["DATE '10000-01-01'", "TIMESTAMP 'infinity'", "[DATE '4000-01-01 (BC)']"])
def test_a_time_that_python_does_not_have_is_an_error(value: str, root: Path) -> None:
    for kind in ("table", "csv", "json", "markdown"):
        result = avss("query", "-w", root, f"SELECT {value} AS a", "--format", kind)
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: A date or time of the result is outside of the years 1 to 9999")
        assert "use --format parquet" in result.stderr
    assert avss("query", "-w", root, f"SELECT {value} AS a", "--format", "parquet").exit_code == 0


def test_a_sum_is_a_number_in_json(root: Path) -> None:
    sql = "SELECT sum(layer) AS s, sum(layer)::HUGEINT * 10::HUGEINT ** 20 AS big, 1.5 AS half, [2.0] AS l FROM scores"
    (row,) = map(json.loads, avss("query", "-w", root, sql, "--format", "json").stdout.splitlines())
    assert row["s"] == sum(Warehouse(root).table("scores")["layer"].to_pylist())
    assert (row["half"], row["l"]) == (1.5, [2]) and isinstance(row["big"], (int, float))


def test_rows_are_written_whatever_their_number(root: Path) -> None:
    lines = avss("query", "-w", root, "FROM range(25000)", "--format", "csv").stdout.split()
    assert lines[1:] == [str(number) for number in range(25_000)]


def test_lists_of_evaluations_have_one_order_whatever_was_written_at_one_moment(tmp_path: Path) -> None:
    """DuckDB groups in several threads, which end in any order."""
    rows = [
        {
            "task": "perplexity:t",
            "metric": "loss",
            "drop": [layer],
            "drop_parts": [],
            "value": 1.0,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        }
        for layer in range(60)
    ]
    store = Store(tmp_path)
    store.write_run(run_row("r"))
    store.write_rows("evaluations", identity_of(run_row("e")), rows)
    listed = ls("plans", warehouse=tmp_path).table()["drop"].to_pylist()
    assert listed == sorted([str(layer)] for layer in range(60))
