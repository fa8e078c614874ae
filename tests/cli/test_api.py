"""The Python API says what the command line says: the same names, keywords and defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.command_line import commands, json_rows, succeed
from support.tiers import nightly
from support.warehouses import activations, stats_of, write_measured

import avss_dist as avss
from avss_dist.cli.declarations import COMMANDS
from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.core.results import Table
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.models.change.number_formats import FORMATS
from avss_dist.partition.execution import Execution
from avss_dist.plans.map_plans import MapPrecision, PrecisionPlan
from avss_dist.read_requests import CompareRequest, ShowRequest
from avss_dist.requests import PlanRequest, ScoreRequest
from avss_dist.runs.result import Run
from avss_dist.warehouse.reader import Warehouse

FUNCTIONS = {"score": "score_all"}  # a command scores one model or several
PRINTED = {"format", "schema", "dry_run"}  # of what is printed
PRINTED_BY = {  # attributes of the result, and what is asked
    "contrast": {"predictions"},
    "query": {"output"},
    "rm": {"yes"},
}
NAMES = [name for name in COMMANDS if " " not in name]


def function(command: str) -> Any:
    return getattr(avss, FUNCTIONS.get(command, command))


@pytest.mark.parametrize("command", NAMES)
def test_a_command_is_a_function_with_the_same_name_and_keywords(command: str) -> None:
    keywords = keywords_of(command) - {"on_event"}
    parameters = [parameter for parameter in commands()[command].params if parameter.name[0] != "_"]
    options = {parameter.name for parameter in parameters}
    assert options - PRINTED - PRINTED_BY.get(command, set()) == keywords - PRINTED
    for parameter in parameters:
        if parameter.param_type_name == "option":
            name = parameter.name.replace("_", "-")
            assert f"--{name}" in parameter.opts


def keywords_of(command: str) -> set[str]:
    """Return the keywords of a command's function."""
    return set(inspect.signature(function(command)).parameters)


@pytest.mark.parametrize("command", NAMES)
def test_the_docstring_explains_every_keyword_of_the_request(command: str) -> None:
    doc = inspect.getdoc(function(command)) or ""
    first, *_ = doc.splitlines()
    assert first.endswith((".", ";"))
    _, _, arguments = doc.partition("Args:")
    explained = {line.strip().partition(":")[0] for line in arguments.splitlines()}
    assert keywords_of(command) <= explained


def test_mistakes_of_a_request_and_of_its_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        avss.plan(by="gredy", coutn=2, share=2.0, sequence_length=0)
    of_length, of_score, of_share, of_option = [str(problem) for problem in caught.value.problems]
    assert of_length == "`sequence_length` must be at least 1, not 0."
    assert of_score.startswith("Unknown `by` 'gredy'.\nDid you mean 'greedy'?")
    assert of_share == "`share` must be less than 1, not 2.0."
    assert of_option.startswith("Unknown option 'coutn'.\nDid you mean 'count'?")


def test_an_option_of_another_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown option 'sites'"):
        avss.evaluate(["m"], tasks=["t"], sites=("mlp",))


def test_a_value_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'text\.txt' needs a name"):
        avss.ablate("m", "text.txt")  # type: ignore[call-arg, misc]


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="`model` is missing"):
        avss.ablate(corpus="text.txt")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: avss.ls("warehouse"), "what"),
        (lambda: avss.score(3, corpus="text.txt"), "model"),
        (lambda: avss.evaluate([3], tasks=["perplexity:text.txt"]), "subjects"),
        (lambda: avss.prune("model", 3, output="less"), "plan"),
        (lambda: avss.plan(run=3), "run"),
        (lambda: avss.compare(run=3), "run"),
        (lambda: avss.run(3), "job"),
    ],
)
def test_an_error_names_the_argument_that_is_wrong(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`"):
        call()


def run_in(warehouse: str, run_id: str = "run-1") -> Run:
    return Run(run_id=run_id, model="org/model", warehouse=warehouse, status="done")


def test_a_run_brings_its_warehouse() -> None:
    assert PlanRequest(run=run_in("elsewhere")).warehouse == "elsewhere"


def test_several_runs_bring_their_warehouse() -> None:
    assert CompareRequest(run=[run_in("elsewhere"), run_in("elsewhere", "run-2")]).warehouse == "elsewhere"


def test_a_named_warehouse_is_read_in_place_of_that_of_a_run() -> None:
    assert ShowRequest(run=run_in("elsewhere"), warehouse="copy").warehouse == "copy"


def test_runs_of_several_warehouses_are_refused() -> None:
    with pytest.raises(ConfigError, match="several warehouses: a, b"):
        CompareRequest(run=[run_in("a"), run_in("b")])


def test_a_plan_without_layers_to_drop_makes_no_checkpoint(tmp_path: Path) -> None:
    bits = FORMATS["int8"].bits(8, 8)
    entry = MapPrecision(layer=0, map="mlp.up_proj", format="int8", weights=64, bits=bits)
    plan = PrecisionPlan(model="model", num_layers=1, bits=bits, rounded=(entry,))
    with pytest.raises(ConfigError, match="`plan` drops neither layers nor experts"):
        avss.prune("model", plan, output=tmp_path / "less")


def test_a_request_keeps_texts_with_secrets_and_takes_paths() -> None:
    corpus = RedactedURI("s3://KEY:SECRET@bucket/a.txt")
    request = ScoreRequest(Path("folder"), corpus=corpus, max_sequences=3)
    assert request.corpus is corpus
    assert request.model == "folder"
    assert "SECRET" not in repr(request)
    assert request.settings == Settings(max_sequences=3)
    assert request.execution == Execution()
    assert request.options["max_sequences"] == 3
    assert replace(request, on_event=print) == request


def test_public_names_are_there_and_shown() -> None:
    assert set(avss.__all__) == set(dir(avss))
    for name in avss.__all__:
        assert getattr(avss, name) is not None
    for name in ("score", "ablate", "evaluate", "shrink", "plan", "prune", "sparsify", "quantize", "compare"):
        assert inspect.signature(getattr(avss, name)).parameters
        assert getattr(avss, name).__doc__


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("read") / "w"
    for seed, name in enumerate(("alpha-0123456789", "beta-0123456789")):
        write_measured(root, name, stats_of(activations(seed)), 8, model=f"org/{name[:-11]}")
    return str(root)


def test_runs_and_thresholds_have_names(root: str) -> None:
    run = Run(run_id="alpha-0123456789", model="org/alpha", warehouse=root, status="done")
    names = ("alpha", "org/alpha", "alpha*", run, [run])
    tables = [avss.compare(warehouse=root, run=name, by="recipe").table() for name in names]
    for table in tables[1:]:
        assert table == tables[0]
    assert set(tables[0]["a_run_id"].to_pylist()) == {run.run_id}
    assert avss.findings(warehouse=root, run=run).table().num_rows == 0
    by_text = avss.compare(warehouse=root, threshold="1e-5", by="recipe").table()
    assert by_text == avss.compare(warehouse=root, by="recipe").table()
    assert by_text.num_rows
    with pytest.raises(QueryError, match="matches 2 runs"):
        avss.plan(warehouse=root, run="*", by="avss")
    plan = avss.plan(warehouse=root, run=run, by="avss", count=2)
    assert plan.run_id == run.run_id
    assert plan.table()["left_out"].to_pylist().count("layer") == 2
    assert plan == avss.plan(warehouse=root, run="alpha", by="avss", count=2, threshold="1e-5")
    scores = Warehouse(root).scores(run_id=run.run_id)
    assert scores.num_rows
    assert Warehouse(root).scores(model="alpha") == scores
    assert Warehouse(root).scores(model="org/alpha") == scores


@pytest.mark.parametrize(
    ("command", "keywords"),
    [
        ("show", {"run": "alpha", "quantiles": True}),
        ("compare", {"by": "recipe"}),
        ("query", {"sql": "SELECT run_id, layer, rank FROM published"}),
        *nightly(
            ("ls", {}),
            ("show", {"run": "alpha", "threshold": "0.1rms"}),
            ("query", {"schema": True}),
        ),
    ],
)
def test_a_function_returns_what_the_command_prints(root: str, command: str, keywords: dict[str, Any]) -> None:
    words = []
    for name, value in keywords.items():
        if name == "sql":
            words.append(value)
        elif value is True:
            words.append(f"--{name}")
        else:
            words.append(f"--{name}={value}")
    printed = succeed(command, *words, "-w", root, "--format", "json", "-q").stdout
    rows = function(command)(warehouse=root, **keywords).table().to_pylist()
    assert rows
    assert json_rows(printed) == json.loads(json.dumps(rows, default=str))


def test_files_are_written_by_functions(root: str, tmp_path: Path) -> None:
    page = avss.report(warehouse=root, run="alpha", output=tmp_path / "page.html")
    assert page.is_file()
    assert "alpha-0123456789" in page.read_text()
    assert "beta-0123456789" not in page.read_text()
    rows = avss.publish(tmp_path / "published", warehouse=root).table().to_pylist()
    assert {"table": "runs", "rows": 2} in rows
    assert (tmp_path / "published" / "data" / "runs.parquet").is_file()
    assert set(avss.compact(warehouse=root).table()["runs"].to_pylist()) == {0, 2}
    own = tmp_path / "own.csv"
    lines = [f"{layer},{layer + 1.5}\n" for layer in range(8)]
    own.write_text("layer,mine\n" + "".join(lines))
    name = f"{own}:mine"
    shown = avss.show(run="alpha", warehouse=root, by=[name], output=tmp_path / "layers.svg").table()
    assert shown[name].to_pylist()[:2] == [1.5, 2.5]
    assert (tmp_path / "layers.svg").is_file()


def test_a_result_is_a_table_a_line_and_a_page() -> None:
    hostile = "<script>\x1b[31m"
    table = Table(pa.table({"name": [hostile] * 20, "value": [0.5] * 20}))
    assert repr(table) == "<Table: 20 rows>"
    assert len(table) == 20
    assert table.to_pandas().shape == (20, 2)
    assert table.to_polars().shape == (20, 2)
    page = table._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "and 8 more rows" in page
    run = Run(run_id="r", model="m", warehouse="w", status="done", num_tokens=1000)
    assert repr(run) == "<Run: r, done, 1,000 tokens>"
