"""SQL over the warehouse: it reads every table, and reaches nothing else."""

from __future__ import annotations

import io
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
from support.command_line import avss, json_rows, succeed
from support.rows import column, columns, where
from support.warehouses import SCALES, activations, identity_of, run_row, stats_of, write_measured, write_profiles

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
    scores = [0.5, 1.5, 2.5]
    profiles = {("block", "pooled", 1e-5): scores, ("mlp", "pooled", 1e-5): scores}
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


@pytest.mark.parametrize(
    "query", ["DESCRIBE scores", "SUMMARIZE scores", "EXPLAIN FROM runs", "explain analyze FROM runs"]
)
def test_tables_and_queries_are_described(warehouse: Warehouse, query: str) -> None:
    assert warehouse.sql(query).num_rows > 0


def test_views_are_the_tables(warehouse: Warehouse) -> None:
    shown = warehouse.sql("SHOW TABLES").column(0).to_pylist()
    assert sorted(shown) == sorted([*TABLES, *VIEWS])
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
    assert done.returncode == 0, done.stderr
    assert "tiny-1" in done.stdout


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
    query = ready_queries()[name]
    question = question_of(query)
    assert question.endswith("?")
    lines = [line.removeprefix("-- ") for line in query.splitlines()]
    assert question in " ".join(lines)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three revisions of a model, the last of them scored first, and another family."""
    root = tmp_path_factory.mktemp("scored")
    for seed in (2, 1, 0):
        x = activations(seed, scales=np.roll(SCALES, seed))
        columns = {"model": "org/llama", "revision": f"{seed}" * 40, "num_parameters": 10, "partition": "single"}
        columns |= {"revision_name": f"step{seed}", "series": "org/llama@step*", "training_step": seed}
        columns |= {"training_tokens": seed * 10**6}
        write_measured(root, f"llama-{seed}", stats_of(x), 8, **columns)
    write_measured(root, "bert-0", stats_of(activations(9)[:, :4]), 4, family="bert")
    return root


def test_a_view_has_one_row_for_each_layer_as_it_is_published(scored: Path) -> None:
    query = "SELECT run_id, count(*) AS layers, count(DISTINCT layer) AS distinct_layers FROM published GROUP BY ALL"
    rows = Warehouse(scored).sql(f"{query} ORDER BY run_id").to_pylist()
    expected = [("bert-0", 4, 4), ("llama-0", 8, 8), ("llama-1", 8, 8), ("llama-2", 8, 8)]
    assert columns(rows, "run_id", "layers", "distinct_layers") == expected
    readings = Warehouse(scored).sql("SELECT DISTINCT site, recipe, threshold FROM published").to_pylist()
    assert readings == [{"site": "block", "recipe": "pooled", "threshold": 1e-5}]


def test_a_view_has_the_newest_runs(scored: Path, tmp_path: Path) -> None:
    """Of the same revision on two texts, both runs are the newest."""
    latest = Warehouse(scored).sql("FROM latest")
    assert latest.num_rows == 4
    revision = {"model": "org/llama", "revision": "0" * 40}
    again = {**revision, "corpus": None, "created_at": datetime(2100, 1, 7, tzinfo=UTC)}
    other_text = {**revision, "corpus": "other.txt", "created_at": datetime(2100, 1, 8, tzinfo=UTC)}
    write_measured(tmp_path, "llama-again", stats_of(activations(7)), 8, **again)
    write_measured(tmp_path, "llama-text", stats_of(activations(8)), 8, **other_text)
    latest = Warehouse(tmp_path).sql("FROM latest ORDER BY run_id")
    assert latest["run_id"].to_pylist() == ["llama-again", "llama-text"]


def test_a_view_has_the_layers_of_the_newest_runs(scored: Path, warehouse: Warehouse) -> None:
    assert Warehouse(scored).sql("SELECT DISTINCT run_id, training_step FROM layers").num_rows == 4
    published = warehouse.sql("FROM published JOIN latest USING (run_id)")
    assert warehouse.sql("FROM layers").num_rows == published.num_rows


def output_of(program: str) -> str:
    """Run a program of an example, and return what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(program, {})
    return printed.getvalue()


def test_the_readme_of_a_warehouse_has_every_column(scored: Path) -> None:
    text = (scored / "README.md").read_text()
    for table in TABLES.values():
        for declared in table.columns:
            assert f"| `{declared.name}` | {declared.type} | " in text


def test_the_readme_of_a_warehouse_shows_queries_that_run(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (scored / "README.md").read_text()
    monkeypatch.chdir(scored)
    ((command, folder, query),) = re.findall(r"```bash\navss (\w+) -w (\S+) \"(.*)\"\n", text)
    succeed(command, "-w", folder, query)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        assert "org/llama" in output_of(example)


def test_the_readme_of_a_warehouse_is_kept_up_and_one_of_other_people_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = run_row("r", num_layers=1)
    store.write_run(row)
    file = tmp_path / "README.md"
    text = file.read_text()
    file.write_text(text.replace("rank", "place"))
    store.write_run(row)
    assert file.read_text() == text
    file.write_text("# My runs")
    store.write_run(row)
    assert file.read_text() == "# My runs"


@pytest.mark.parametrize("table", ["runs", "scores", "layer_stats"])
def test_files_say_what_their_columns_are(scored: Path, table: str) -> None:
    file = "run" if table == "runs" else table
    schema = pq.read_schema(scored / table / "run_id=bert-0" / f"{file}.parquet")
    described = {field.name: field.metadata[b"description"].decode() for field in schema}
    declared = {stored.name: stored.description for stored in TABLES[table].columns}
    del declared["run_id"]
    assert described == declared


def test_there_are_ready_queries() -> None:
    assert list(ready_queries()) == ["cost", "drift", "lowest_quartile", "recipe_disagreement", "stability"]


@pytest.mark.parametrize("name", ready_queries())
def test_a_ready_query_runs_on_any_warehouse(warehouse: Warehouse, scored: Path, name: str) -> None:
    first, *_ = ready_queries()[name].splitlines()
    assert first.startswith("-- ")
    assert first.count("?") == 1
    warehouse.sql(f"@{name}")
    table = Warehouse(scored).sql(f"@{name}")
    assert table.num_rows
    for values in table.columns:
        assert values.null_count < table.num_rows


def test_the_lowest_quartile_by_family(scored: Path) -> None:
    rows = Warehouse(scored).sql("@lowest_quartile").to_pylist()
    for row in rows:
        assert row["early"] + row["middle"] + row["late"] == pytest.approx(1, abs=2e-3)
    (llama,) = where(rows, family="llama")
    (bert,) = where(rows, family="bert")
    assert llama["runs"] == 3
    assert bert["runs"] == 1
    scores = Warehouse(scored).scores(site="block", recipe="pooled", threshold=1e-5, family="llama").to_pylist()
    depths = np.array([score["depth"] for score in scores if score["rank"] <= 2])
    is_early = depths < 1 / 3
    assert llama["mean_depth"] == pytest.approx(depths.mean(), abs=1e-3)
    assert llama["early"] == pytest.approx(is_early.mean(), abs=1e-3)


def test_drift_follows_the_revisions_in_order(scored: Path) -> None:
    rows = Warehouse(scored).sql("@drift").to_pylist()
    assert set(column(rows, "series")) == {"org/llama@step*"}
    for layer in range(8):
        of_layer = where(rows, layer=layer)
        assert column(of_layer, "revision_name") == ["step0", "step1", "step2"]
        assert of_layer[0]["rank_change"] is None
        for before, after in pairwise(of_layer):
            assert after["rank_change"] == after["rank"] - before["rank"]


def test_recipes_of_each_run(scored: Path) -> None:
    rows = Warehouse(scored).sql("@recipe_disagreement").to_pylist()
    assert set(column(rows, "run_id")) == {"llama-0", "llama-1", "llama-2", "bert-0"}
    assert set(column(rows, "pooled_element")) == {1}


def test_the_cost_of_each_model(scored: Path) -> None:
    rows = Warehouse(scored).sql("@cost").to_pylist()
    (llama,) = where(rows, model="org/llama")
    assert llama["runs"] == 3
    assert llama["wall_seconds"] == 6
    assert llama["num_tokens"] == 384


@pytest.mark.parametrize(
    ("query", "tables"),
    [
        ("SELECT count(*) FROM runs", ["runs"]),
        ("SELECT count(*) FROM scores JOIN runs USING (run_id)", ["runs", "scores"]),
        ('SELECT count(*) FROM "SCORES"', ["runs", "scores"]),
        ("FROM scores_at(0.3)", ["layer_stats", "runs"]),
        ("FROM query('FROM sco' || 'res')", sorted(TABLES)),
    ],
)
def test_only_what_a_query_mentions_is_opened(
    scored: Path, monkeypatch: pytest.MonkeyPatch, query: str, tables: list[str]
) -> None:
    opened: list[str] = []
    listed = Storage.files

    def spy(self: Storage, table: str) -> dict[str, tuple[str, str]]:
        opened.append(table)
        return listed(self, table)

    monkeypatch.setattr(Storage, "files", spy)
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
    arguments = () if query is None else (query,)
    result = avss("query", "-w", root, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("value", ["INTERVAL 1 DAY", "[INTERVAL 1 DAY]", "union_value(a := 1)"])
def test_what_parquet_cannot_hold_is_named(value: str, root: Path) -> None:
    result = avss("query", "-w", root, f"SELECT 1 AS a, {value} AS waited", "--format", "parquet")
    assert result.exit_code == 2
    assert result.stdout_bytes == b""
    assert result.stderr.startswith("Error: Parquet has no type for column 'waited' (")
    assert "SELECT column::VARCHAR" in result.stderr


STRANGE_TIMES = ["DATE '10000-01-01'", "TIMESTAMP 'infinity'", "[DATE '4000-01-01 (BC)']"]


@pytest.mark.parametrize("value", STRANGE_TIMES)
@pytest.mark.parametrize("kind", ["table", "csv", "json", "markdown"])
def test_a_time_that_python_does_not_have_is_an_error(value: str, kind: str, root: Path) -> None:
    result = avss("query", "-w", root, f"SELECT {value} AS a", "--format", kind)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: A date or time of the result is outside of the years 1 to 9999")
    assert "use --format parquet" in result.stderr


@pytest.mark.parametrize("value", STRANGE_TIMES)
def test_a_time_that_python_does_not_have_is_written_as_parquet(value: str, root: Path) -> None:
    succeed("query", "-w", root, f"SELECT {value} AS a", "--format", "parquet")


def test_a_sum_is_a_number_in_json(root: Path) -> None:
    sql = "SELECT sum(layer) AS s, sum(layer)::HUGEINT * 10::HUGEINT ** 20 AS big, 1.5 AS half, [2.0] AS l FROM scores"
    (row,) = json_rows(avss("query", "-w", root, sql, "--format", "json").stdout)
    assert row["s"] == sum(Warehouse(root).table("scores")["layer"].to_pylist())
    assert row["half"] == 1.5
    assert row["l"] == [2]
    assert isinstance(row["big"], (int, float))


def test_rows_are_written_whatever_their_number(root: Path) -> None:
    heading, *numbers = avss("query", "-w", root, "FROM range(25000)", "--format", "csv").stdout.split()
    assert heading == "range"
    assert numbers == [str(number) for number in range(25_000)]


def test_lists_of_evaluations_have_one_order_whatever_was_written_at_one_moment(tmp_path: Path) -> None:
    """DuckDB groups in several threads, which end in any order."""
    row = {"task": "perplexity:t", "metric": "loss", "drop_parts": [], "value": 1.0}
    row["created_at"] = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [{**row, "drop": [layer]} for layer in range(60)]
    store = Store(tmp_path)
    store.write_run(run_row("r"))
    store.write_rows("evaluations", identity_of(run_row("e")), rows)
    listed = ls("plans", warehouse=tmp_path).table()["drop"].to_pylist()
    assert listed == sorted([str(layer)] for layer in range(60))
