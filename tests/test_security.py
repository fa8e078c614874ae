"""What must hold whoever wrote the names, the files and the queries: nothing is reached, run or given away."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import duckdb
import pytest
from support.command_line import avss
from support.warehouses import write_scores

import avss_dist
from avss_dist.core.errors import ModelError, QueryError
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.warehouse import query as sql_query
from avss_dist.warehouse.reader import Warehouse

SMALL = ("--max-sequences", 2, "--sequence-length", 16, "--executor", "local")
SECRET = "s3cr3t-of-this-test"
PACKAGE = Path(avss_dist.__file__).parent


class _Counting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(404)
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what a query must not reach: files, a server, a variable; in the working directory, too."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for ending in ("csv", "txt", "json", "parquet", "sql", "db"):
        Path(f"secret.{ending}").write_text(SECRET)
    monkeypatch.setenv("AVSS_SECRET", SECRET)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Counting)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    yield [
        *("secret.csv", str(Path("secret.txt").absolute()), "*.json", "AVSS_SECRET", "/proc/self/environ"),
        *(Path("secret.parquet").absolute().as_uri(), f"{here}/x.csv", f"s3://bucket/x?s3_endpoint={here}"),
    ]
    server.shutdown()
    server.server_close()
    assert server.asked == []


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    write_scores(tmp_path / "w", "a-0123456789", [1.0, 2.0, 3.0])
    return Warehouse(tmp_path / "w")


def sample(kind: str | None, name: str) -> str:
    """A value of a type of DuckDB, as SQL: where it takes a text, the name."""
    base = (kind or "ANY").upper()
    if base.endswith("[]"):
        return f"[{sample(base[:-2], name)}]"
    numbers = ("DOUBLE", "FLOAT", "DECIMAL", "BOOL", "BIT", "BIGNUM")
    return "1" if base.startswith(numbers) or "INT" in base else f"'{name}'"


def statements(name: str) -> Iterator[str]:
    """Every way in which a query can name something: as a table, and to each function that DuckDB itself lists."""
    nested = f"FROM ''{name}''"
    yield from (f"FROM '{name}'", f'FROM "{name}"', f"FROM query_table('{name}')", f"FROM query('{nested}')")
    with duckdb.connect(":memory:", config=sql_query._SEALED) as connection:
        listed = connection.execute("SELECT function_type, function_name, parameter_types FROM duckdb_functions()")
        functions = {(kind, name, tuple(types)) for kind, name, types in listed.fetchall()}
    for kind, function, types in sorted(functions, key=str):
        values = [sample(one, name) for one in types]
        if f"'{name}'" not in ", ".join(values):
            continue
        if kind in ("table", "table_macro", "pragma"):
            yield from (f'FROM "{function}"({", ".join(values)})', f"FROM \"{function}\"(['{name}'])")
        else:
            yield f'SELECT "{function}"({", ".join(values)})'


def test_no_function_of_sql_reaches_outside(outside: list[str]) -> None:
    """Every function that DuckDB lists is called, which takes five seconds."""
    before, answered = sorted(Path().iterdir()), 0
    with duckdb.connect(":memory:", config=sql_query._SEALED) as connection:
        ways = {name: dict.fromkeys(statements(name)) for name in outside}
        values = ("secret.csv", "AVSS_SECRET")  # for functions of values; those that give tables get every name
        tried = [way for name in outside for way in ways[name] if name in values or way.startswith("FROM")]
        for statement in tried:
            with suppress(duckdb.Error, ValueError, OverflowError):
                rows = connection.execute(statement).fetchmany(100)
                answered += 1
                assert SECRET not in repr(rows), statement
    assert 0 < answered < len(tried) and len(tried) > 1000
    assert sorted(Path().iterdir()) == before


def test_no_setting_can_be_changed_and_none_tells_a_secret(outside: list[str], warehouse: Warehouse) -> None:
    with duckdb.connect(":memory:", config=sql_query._SEALED) as connection:
        settings = connection.execute("SELECT name, value FROM duckdb_settings()").fetchall()
        assert len(settings) > 50 and SECRET not in str(settings)
        for name, _ in settings:
            for statement in (f"SET {name} = '{outside[0]}'", f"RESET {name}", f"PRAGMA {name}='x'"):
                with pytest.raises((QueryError, duckdb.Error)):
                    sql_query._require_reading(connection, statement)
    for query in ("SELECT getenv('AVSS_SECRET')", "SELECT current_setting('AVSS_SECRET')", "FROM duckdb_secrets()"):
        with suppress(QueryError):
            assert SECRET not in str(warehouse.sql(query).to_pylist())


@pytest.mark.parametrize(
    "statement",
    [
        *("ALTER TABLE runs RENAME TO x", "ANALYZE", "DELETE FROM runs", "LOAD httpfs", "UPDATE runs SET status = 'x'"),
        *("CREATE FUNCTION f(x) AS x", "UPDATE EXTENSIONS", "VACUUM", "COPY FROM DATABASE memory TO x"),
        "MERGE INTO runs USING scores USING (run_id) WHEN MATCHED THEN DELETE",
    ],
)
def test_only_statements_that_read_are_run(statement: str, warehouse: Warehouse) -> None:
    """Python's DuckDB has no name for the kind of some statements."""
    with pytest.raises(QueryError, match="allowed in a query"):
        warehouse.sql(statement)


# Code and pickles.


class _Boom:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path("ran"), "code ran")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_no_pickle_is_opened(name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(_Boom()))
    done = avss("score", model, "--corpus", "builtin:pydoc", "-w", "w", "--executor", "local")
    assert done.exit_code == 2 and "has pickled weights only" in done.stderr
    done = avss("score", model, "--corpus", "builtin:pydoc", "-w", "w", "--executor", "local", "--allow-pickle")
    says = "holds more than tensors" if name == "pytorch_model.bin" else "has pickled weights only"
    assert done.exit_code == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not Path("ran").exists()


def test_the_package_has_no_call_that_unpickles_evaluates_or_trusts() -> None:
    """`torch.load` and the like; arrays of objects; YAML that makes objects; code from texts or checkpoints."""
    forbidden = {
        *("torch.load", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load"),
        *("pickle.Unpickler", "pd.read_pickle", "marshal.loads", "yaml.unsafe_load", "yaml.full_load"),
        *("eval", "exec", "os.system", "compile"),
    }
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                tensors_alone = called == "torch.load" and file.name == "convert.py"
                assert called not in forbidden or tensors_alone, f"{file}:{node.lineno}"
                assert called != "yaml.load", f"{file}:{node.lineno}"
                if called == "yaml.compose":
                    assert ast.unparse(node.keywords[0].value) == "yaml.SafeLoader", f"{file}:{node.lineno}"
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert {given.get("shell", "False"), given.get("allow_pickle", "False")} == {"False"}, (
                    file,
                    node.lineno,
                )
                assert given.get("trust_remote_code") != "True", f"{file}:{node.lineno}"
                assert given.get("weights_only", str(called != "torch.load")) == "True", f"{file}:{node.lineno}"


def test_no_code_of_a_checkpoint_runs_unless_asked(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    code = "from pathlib import Path\nPath('ran').write_text('code ran')\n"
    code += "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    (model / "modeling.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    shipped = {"auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}}
    for changes in (shipped, {**shipped, "model_type": "its_own"}):
        (model / "config.json").write_text(json.dumps(config | changes))
        done = avss("score", model, "--corpus", "builtin:pydoc", "-w", "w", *SMALL)
        assert done.exit_code == (2 if "model_type" in changes else 0), done.stderr
        assert not Path("ran").exists()
    with pytest.raises(ModelError, match="contains custom code"):
        text_config(resolve(str(model)))
