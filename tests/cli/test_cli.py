"""The command line and the Python API, from a checkpoint to a picture and a query."""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.checkpoints import LAYERS
from support.command_line import as_words, avss, commands, json_rows
from support.rows import column, mapping
from support.warehouses import write_scores
from typer.testing import CliRunner

import avss_dist
from avss_dist.cli import app
from avss_dist.cli.declarations import COMMANDS as LISTED
from avss_dist.cli.declarations import Command, class_docstrings
from avss_dist.cli.removed import REMOVED
from avss_dist.core.doctor import CheckResult
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import ATTENTIONS, DTYPES
from avss_dist.core.sites import EVERY_SITE, SITE_FAMILIES, SITES
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD
from avss_dist.partition.execution import EXECUTORS
from avss_dist.read_requests import ShowRequest
from avss_dist.reports.page.page import HEADLESS, NOTHING
from avss_dist.runs import events
from avss_dist.stats.catalog import FROM_ACTIVATIONS, RECIPES
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import TABLES

TEXT = {"corpus": "builtin:pydoc", "max_sequences": 12, "sequence_length": 32, "sequences_per_shard": 4}
SCORE = [*as_words(TEXT), "--executor", "local", "--quiet"]
PROBE = """
import sys
from avss_dist.cli import app

def run(*arguments):
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, arguments

def loaded(*packages):
    return [name for name in packages if name in sys.modules]

model, read, written, *score = sys.argv[1:]
import avss_dist.runs.ray.heartbeats
avss_dist.Warehouse
heavy = ["torch", "ray", "transformers", "deepspeed"]
assert not loaded(*heavy, "altair", "datasets")
run("--help")
run("score", "--help")
run("query", "-w", read, "FROM runs")
run("show", "-w", read)
assert not loaded(*heavy)
print("SCORED")
run("score", model, *score, "-w", written)
assert loaded(*heavy) == ["torch", "transformers"]
"""
"""Script of a new process: the modules that importing, reading and scoring load."""


def rows(warehouse: Path, query: str) -> list[dict[str, Any]]:
    return Warehouse(warehouse).sql(query).to_pylist()


@pytest.fixture(scope="module")
def scored(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a run of each tiny model; the Llama's is the newest. Not to be changed."""
    warehouse = tmp_path_factory.mktemp("scored") / "warehouse"
    for model in (tiny_bert, tiny_llama):
        result = avss("score", model, *SCORE, "-w", warehouse)
        assert result.exit_code == 0
        assert result.stderr == ""
    return warehouse


@pytest.fixture
def warehouse(scored: Path, tmp_path: Path) -> Path:
    """A copy of the scored warehouse, to change."""
    return Path(shutil.copytree(scored, tmp_path / "warehouse"))


def run_ids(warehouse: Path) -> dict[str, str]:
    """Run id by family."""
    return mapping(rows(warehouse, "SELECT family, run_id FROM runs"), "family", "run_id")


@pytest.mark.nightly
def test_nothing_that_is_refused_is_recommended_to_an_encoder(scored: Path, tmp_path: Path) -> None:
    """Takes over 5 seconds where it draws the first page of its process, which imports what draws."""
    plan = tmp_path / "plan.yaml"
    run = ("--run", run_ids(scored)["bert"])
    told = avss("plan", "-w", scored, *run, "-o", plan)
    assert told.exit_code == 2
    assert "predicts no next token" in told.stderr
    assert "block_influence:" in told.stderr
    assert "shapley" not in told.stderr
    assert "avss ablate /" not in told.stderr
    told = avss("plan", "-w", scored, *run, "--by", "damage", "-o", plan)
    assert told.exit_code == 2
    assert "predicts no next token" in told.stderr
    assert "--damage" not in told.stderr
    told = avss("plan", "-w", scored, *run, "--by", "block_influence", "-o", plan)
    assert told.exit_code == 0
    assert "predicts no next token" in told.output
    assert "Evaluate it" not in told.output
    llama = avss("plan", "-w", scored, "--by", "block_influence", "-o", plan)
    assert "Evaluate it: avss evaluate" in llama.output
    assert "predicts no next token" not in llama.output
    told = avss("report", "-w", scored, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert told.exit_code == 0
    assert page.count(NOTHING) == 1
    assert page.count(HEADLESS) == 1


@pytest.mark.parametrize(
    ("architecture", "known"),
    [
        *((name, True) for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "OpenAIGPTDoubleHeadsModel", "", None)),
        *((name, True) for name in ("Gemma3ForConditionalGeneration", "ReformerModelWithLMHead")),
        *((name, False) for name in ("BertModel", "LlamaModel", "BertGenerationEncoder")),
    ],
)
def test_the_class_of_a_model_tells_whether_it_has_a_head(architecture: str | None, known: bool) -> None:
    assert has_head({"architecture": architecture}) == known


# Commands, options, defaults.


def _parameters(command: str) -> dict[str, Any]:
    return {max(p.opts, key=len): p for p in commands()[command].params}


def test_the_commands_are_those_of_the_help() -> None:
    for args in (["--help"], ["-h"], []):
        output = avss(*args).output
        for name, command in LISTED.items():
            if " " in name:
                assert " jobs" in output
                assert " Jobs on a Ray cluster." in output
            else:
                assert f" {name}" in output
                assert f" {command.summary[:20]}" in output
    output = avss("jobs").output
    for verb in ("submit", "list", "logs", "stop"):
        assert f" {verb} " in output


@pytest.mark.parametrize("command", LISTED.values(), ids=LISTED)
def test_the_help_of_a_command_is_the_docstring_of_its_request(command: Command) -> None:
    docstring = inspect.cleandoc(vars(command.load_request())["__doc__"])
    assert command.help.split() == docstring.split()


def test_the_docstrings_of_an_installation_without_sources_are_those_of_the_imported_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched = class_docstrings.__wrapped__("avss_dist.requests")["ScoreAllRequest"]
    monkeypatch.setattr("importlib.machinery.SourceFileLoader.get_source", lambda loader, name: None)
    assert class_docstrings.__wrapped__("avss_dist.requests")["ScoreAllRequest"] == searched


def help_of(name: str, option: str) -> str:
    """Return a help as on a terminal of 100 columns, of which two stay empty."""
    return CliRunner().invoke(app, [*name.split(), option], terminal_width=98).stdout


def test_helps_fit_on_a_screen_and_rare_options_are_shown_on_request() -> None:
    number = 0
    for name, command in commands().items():
        shown = help_of(name, "--help")
        assert "Examples:" in shown
        assert LISTED[name].summary in " ".join(shown.split())
        options = {max(p.opts, key=len): p for p in command.params if p.param_type_name == "option"}
        visible = {option: parameter for option, parameter in options.items() if not parameter.hidden}
        assert len(visible) <= 28, name
        assert len(shown.splitlines()) <= 51, name
        listed = {*re.findall(r"--(?:\[no-\])?[a-z-]+", shown.partition("Examples:")[0])}
        for option, parameter in visible.items():
            if parameter.secondary_opts:
                assert f"--[no-]{option[2:]}" in listed
            else:
                assert option in listed
        everything = help_of(name, "--help-all")
        for option in options:
            assert re.search(rf"--(\[no-\])?{option[2:]}\b", everything)
        for parameter in command.params:
            assert parameter.help
        for parameter in options.values():
            parameter.hidden = max(parameter.opts, key=len) not in visible
        number += len(visible)
    assert number <= 280


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_command_or_option_says_what_to_type(name: str) -> None:
    """The command lines in the advice, between backticks, have only options that exist."""
    commands_with = {
        "--json": "ls",
        "--protect": "plan",
        "--yes": "run",
        "--repair-corpus": "prune",
        "--task": "evaluate",
    }
    if name.startswith("-"):
        result = avss(commands_with.get(name, "score"), f"{name}=1")
    else:
        command, _, option = name.partition(" --")
        result = avss(*command.split(), *([f"--{option}=1"] if option else ()))
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert f"It was removed: {REMOVED[name]}" in message
    for line in re.findall(r"`avss ([^`]+)`", REMOVED[name]):
        words = line.split()
        name = " ".join(words[: 2 if words[0] == "jobs" else 1])
        spellings: set[str] = set()
        for parameter in commands()[name].params:
            spellings.update(parameter.opts)
        assert {word for word in words if word.startswith("-")} <= spellings


def test_a_run_is_named_by_a_part_that_only_it_has(scored: Path) -> None:
    run_id = run_ids(scored)["llama"]
    result = avss("plan", "-w", scored, "--run", "*", "--by", "last", "-o", scored.parent / "plan.yaml")
    assert result.exit_code == 2
    assert "'*' matches 2 runs of several models." in result.stderr
    for name in ("llama", run_id[-10:], "*LLAMA*", run_id):
        result = avss("show", "-w", scored, "--run", name)
        assert result.exit_code == 0
        assert run_id in result.stdout
        assert (f"Run {run_id} is the one" in result.stderr) is (name in ("llama", run_id[-10:]))
    assert "Unknown run 'lama'" in avss("show", "-w", scored, "--run", "lama").stderr  # no word begins there
    result = avss("show", "-w", scored, "--run", "tiny")
    assert result.exit_code == 2
    assert "'tiny' is part of 2 runs." in result.stderr
    result = avss("report", "-w", scored, "--run", "nothing", "-o", scored.parent / "r.html")
    assert result.exit_code == 2
    assert "Unknown run 'nothing'" in result.stderr


def test_names_are_listed_in_help_and_completed() -> None:
    for command, option, names in (
        ("score", "--dtype", DTYPES),
        ("score", "--sites", (*EVERY_SITE, *SITE_FAMILIES)),
        ("score", "--attention", ATTENTIONS),
        ("run", "--executor", EXECUTORS),
        ("compare", "--score", FROM_ACTIVATIONS),
        ("query", "--format", ("table", "csv", "json", "markdown", "parquet")),
    ):
        parameter = _parameters(command)[option]
        if parameter.metavar == "NAME":
            for name in names:
                assert name in parameter.help
        else:
            assert parameter.metavar == f"[{'|'.join(names)}]"
        completed = parameter.shell_complete(None, names[-1][:3])  # type: ignore[arg-type]
        assert names[-1] in [item.value for item in completed]


def test_the_defaults_of_a_picture_are_the_published_ones() -> None:
    request = ShowRequest()
    assert (request.recipe, request.site) == (RECIPES[0], SITES[0]) == ("pooled", "block")
    assert request.threshold == PUBLISHED_THRESHOLD == 1e-5


def test_version() -> None:
    assert avss("--version").stdout == f"avss_dist {avss_dist.__version__}\n"


# From a checkpoint to tables and pictures.


def test_show_draws_the_newest_run(scored: Path) -> None:
    result = avss("show", "-w", scored)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "tiny-llama block / pooled / |x| < 1e-05" in " ".join(result.stdout.split())
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == LAYERS
    best = rows(scored, "SELECT layer FROM scores WHERE rank = 1 AND site = 'block' AND recipe = 'pooled'")
    assert [bool(re.match(r"│\s+\d+ \*", line)) for line in lines].count(True) == 1
    assert any(f" {row['layer']} *" in result.stdout for row in best)
    assert "1 more in" in result.stdout


def test_a_query_without_an_answer_says_so(scored: Path) -> None:
    result = avss("query", "-w", scored, "@drift")
    assert result.exit_code == 0
    assert "No row. @drift: How does" in result.stderr
    assert "It takes two revisions of a series" in result.stderr
    assert avss("query", "-w", scored, "FROM runs WHERE false", "--format", "csv").stderr == "No row.\n"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("ending", "signature"),
    [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<svg"), (".html", b"<!doctype html>"), (".PNG", b"\x89PNG")],
)
def test_a_picture_is_of_the_kind_that_its_ending_says(
    scored: Path, tmp_path: Path, ending: str, signature: bytes
) -> None:
    file = tmp_path / f"scores{ending}"
    result = avss("show", "-w", scored, "-o", file)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout == f"{file}\n1 more in {scored}: avss ls -w {scored}\n"
    data = file.read_bytes()
    assert data.startswith(signature)
    assert len(data) > 10_000


@pytest.mark.nightly
def test_a_page_needs_no_network_and_holds_every_run(scored: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.html"
    runs = []
    for run_id in run_ids(scored).values():
        runs += ["--run", run_id]
    assert avss("show", "-w", scored, *runs, "-o", file).exit_code == 0
    page = file.read_text(encoding="utf-8")
    skeleton = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert skeleton.count("<script") == 3
    assert not re.search(r"\s(src|href)=", skeleton)
    spec = re.search(r'<script type="application/json" id="spec">(.*?)</script>', page, re.DOTALL)
    assert spec is not None
    for run_id in run_ids(scored).values():
        assert run_id[-10:] in spec[1]
    assert json.loads(spec[1])["$schema"].startswith("https://vega.github.io/schema/vega-lite/")


QUERY = "SELECT layer, site, avss_smoothed, nullif(1, 1) AS nothing FROM scores ORDER BY ALL LIMIT 4"


def answer(warehouse: Path, query: str, kind: str) -> list[dict[str, Any]]:
    """Return the rows that a query prints in a format. CSV and tables give texts; a table has no empty values."""
    result = avss("query", "-w", warehouse, query, "--format", kind)
    if kind == "parquet":
        return pq.read_table(io.BytesIO(result.stdout_bytes)).to_pylist()
    if kind == "csv":
        return [*csv.DictReader(io.StringIO(result.stdout))]
    if kind == "json":
        return json_rows(result.stdout)
    lines = [line for line in result.stdout.splitlines() if re.search(r"\w", line)]
    names, *values = [re.findall(r"[\w.-]+", line) for line in lines]
    return [dict(zip(names, line, strict=False)) for line in values]


def as_texts(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as CSV gives it."""
    texts = {}
    for name, value in row.items():
        if value is None:
            texts[name] = ""
        else:
            texts[name] = str(value)
    return texts


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "table"])
def test_a_query_prints_every_row_and_column(scored: Path, kind: str) -> None:
    printed = answer(scored, QUERY, kind)
    expected = rows(scored, QUERY)
    if kind == "csv":
        expected = [as_texts(row) for row in expected]
    if kind == "table":
        assert column(printed, "site") == column(expected, "site")
    else:
        assert printed == expected
    (row,) = answer(scored, "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a", kind)
    assert [int(value) for value in row.values()] == [1, 2, 3, 4]


def test_a_name_of_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    name = "[red]<script>alert(1)<"
    write_scores(tmp_path, "hostile-1", [1.0, 2.0], model=f"org/{name}", corpus="[link=x]<script>alert(3)")
    shown = avss("show", "-w", tmp_path).stdout
    assert f"org/{name}" in shown
    assert "[link=x]<script>alert(3)" in shown
    assert f"org/{name}" in avss("query", "-w", tmp_path, "SELECT model FROM runs").stdout
    assert "[red]a" in avss("query", "-w", tmp_path, "SELECT 1 AS \"[red]a\", '[/]' AS b").stdout


def test_json_has_no_number_that_json_lacks(scored: Path) -> None:
    query = "SELECT 'nan'::DOUBLE AS a, [1.5, 'inf'::DOUBLE] AS b, {'c': '-inf'::DOUBLE} AS d"
    line = avss("query", "-w", scored, query, "--format", "json").stdout
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": [1.5, None], "d": {"c": None}}


# Several models, and runs that are there.


@pytest.mark.nightly
def test_one_missing_model_does_not_stop_the_others(warehouse: Path, tiny_llama: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    before = rows(warehouse, "FROM runs WHERE family = 'llama'")[0]
    result = avss("score", missing, tiny_llama, *SCORE, "-w", warehouse)
    assert result.exit_code == 1
    assert result.stderr == f"There is no folder '{missing}'. This run will fail, and the others go on.\n"
    assert f"failed. There is no folder '{missing}'." in result.stdout
    assert f"{before['run_id']}: done before, nothing to do" in result.stdout
    (failed,) = rows(warehouse, "FROM runs WHERE status = 'failed'")
    assert failed["model"] == str(missing)
    assert failed["error"].startswith(f"There is no folder '{missing}'.")
    shown = avss("show", "-w", warehouse, "--run", failed["run_id"])
    assert shown.exit_code == 2
    assert f"Run '{failed['run_id']}' failed: There is no folder" in shown.stderr
    fresh = avss("score", tiny_llama, *SCORE, "-w", warehouse, "--fresh")
    assert f"{before['run_id']}: 384 tokens in " in fresh.stdout
    assert rows(warehouse, "FROM runs WHERE family = 'llama'")[0]["created_at"] > before["created_at"]


@pytest.mark.parametrize("table", ["scores", "layer_stats"])
def test_a_run_that_was_done_before_and_cannot_be_read_is_told_with_the_command_that_mends_it(
    table: str, warehouse: Path, tiny_llama: Path
) -> None:
    run_id = run_ids(warehouse)["llama"]
    shutil.rmtree(warehouse / table / f"run_id={run_id}")
    result = avss("score", tiny_llama, *SCORE, "-w", warehouse)
    hint = TABLES[table].replaced_by
    assert result.stdout == f"{run_id}: done before, but it cannot be read ({table}: its file is gone). {hint}\n"


def test_a_job_names_runs_that_were_done_before_and_cannot_be_read(
    warehouse: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run_id = run_ids(warehouse)["llama"]
    shutil.rmtree(warehouse / "scores" / f"run_id={run_id}")
    job = tmp_path / "job.yaml"
    settings = {"max_sequences": 12, "sequence_length": 32, "sequences_per_shard": 4}
    values = {"warehouse": str(warehouse), "models": [str(tiny_llama)], "corpora": [TEXT["corpus"]]}
    job.write_text(json.dumps({**values, "settings": settings, "execution": {"executor": "local"}}))
    assert f"{run_id}: done before, but it cannot be read" in avss("run", job).stdout


def test_a_list_of_runs_names_those_that_cannot_be_read(warehouse: Path) -> None:
    run_id = run_ids(warehouse)["llama"]
    (warehouse / "scores" / f"run_id={run_id}" / "scores.parquet").write_bytes(b"no Parquet")
    result = avss("ls", "-w", warehouse)
    assert result.stderr.startswith(f"1 run cannot be read: {run_id} (scores: ")


def test_a_property_by_which_nothing_is_compared_is_told_with_those_to_use(scored: Path) -> None:
    result = avss("compare", "-w", scored, "--by", "model")
    assert "--by run compares runs of any two models" in result.stderr


def test_a_copy_of_a_model_is_told_to_be_measured_once(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy" / tiny_llama.name)
    result = avss("score", tiny_llama, copy, *SCORE, "-w", tmp_path / "w")
    assert f": the same model, text and settings as {tiny_llama}; measured once.\n" in result.stdout
    assert "done before" not in result.stdout


@pytest.mark.nightly
def test_any_exception_of_a_models_code_is_a_failed_run(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def breaks(self: Any, input_ids: Any, **options: Any) -> Any:
        if input_ids.shape[1] == 32:
            raise ZeroDivisionError("in the model")
        return forward(self, input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", breaks)
    result = avss("score", tiny_llama, tiny_bert, *SCORE, "-w", tmp_path)
    assert result.exit_code == 1
    run_rows = rows(tmp_path, "SELECT family, status, error FROM runs ORDER BY status")
    assert column(run_rows, "status") == ["done", "failed"]
    assert run_rows[1]["error"] == "ZeroDivisionError: in the model"
    alone = avss("score", tiny_llama, *SCORE, "-w", tmp_path)
    assert alone.exit_code == 1
    assert alone.stderr == "Error: ZeroDivisionError: in the model\n"


def test_the_options_of_score_reach_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    options = ["--sites", "mlp", "--sites", "block", "--thresholds", "0.5", "--dtype", "bfloat16", "--batch-size", "3"]
    options += ["--layout", "padded", "--skip-first-tokens", "2", "--attention", "eager"]
    options += ["--layers", "layers"]
    result = avss("score", tiny_llama, *SCORE, *options, "--device", "cpu", "-w", tmp_path)
    assert result.exit_code == 0
    (run,) = rows(tmp_path, "FROM runs")
    assert run["sites"] == ["block", "mlp"]
    assert run["thresholds"] == [1e-5, 0.5]
    assert run["dtype"] == "bfloat16"
    assert run["batch_size"] == 3
    assert run["attention_implementation"] == "eager"
    settings = json.loads(run["settings"])
    assert settings["layout"] == "padded"
    assert settings["skip_first_tokens"] == 2
    assert settings["layers"] == "layers"
    assert run["num_tokens"] == 12 * 30


# What is loaded, and what is said.


@pytest.mark.nightly
def test_reading_loads_nothing_heavy_and_scoring_here_no_ray(scored: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """It takes a new process that imports torch and transformers."""
    command = [sys.executable, "-c", PROBE, tiny_llama, scored, tmp_path, *SCORE]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    read, _, said = done.stdout.partition("SCORED\n")
    assert "tiny-llama" in read
    assert re.fullmatch(r"tiny-llama-[0-9a-f]{10}: 384 tokens in [\d.]+ s\.\n", said)


def test_scoring_here_imports_no_ray(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "avss_dist.runs.ray.executor"):
        monkeypatch.setitem(sys.modules, name, None)
    result = avss("score", tiny_llama, *SCORE, "-w", tmp_path)
    assert result.exit_code == 0, result.stderr


def test_stopping_says_that_the_work_is_kept(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avss_dist.runs.planner.resolve", stop)
    result = avss("score", tiny_llama, *SCORE, "-w", tmp_path)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "run the same command again to finish" in result.stderr


@pytest.mark.parametrize(("works", "shown"), [(True, "ok "), (False, "NO ")])
def test_doctor_says_what_works(works: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [CheckResult("torch", True, "2.9.1"), CheckResult("pictures", works, "[red]no\u001b[2J")]
    monkeypatch.setattr("avss_dist.core.doctor.check_machine", lambda: iter(checks))
    done = avss("doctor")
    assert done.exit_code == (0 if works else 1)
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"ok  torch +2\.9\.1", first)
    assert second.startswith(f"{shown} pictures ")
    assert second.endswith("[red]no\ufffd[2J")


# The Python API.


@pytest.mark.parametrize(("function", "models"), [(avss_dist.score, "any"), (avss_dist.score_all, ["any"])])
def test_mistakes_in_keywords_make_no_warehouse(
    function: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Unknown option 'sequence_lenght'") as caught:
        function(models, corpus="builtin:pydoc", warehouse="new", sequence_lenght=32)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Did you mean 'sequence_length'?")
    with pytest.raises(ConfigError, match="`warehouse`: the name is empty"):
        function(models, corpus="builtin:pydoc", warehouse="")
    assert not list(tmp_path.iterdir())


def test_events_tell_how_far_each_model_is(tiny_llama: Path, tmp_path: Path) -> None:
    told: dict[str, list[str]] = {}

    def note(event: events.RunEvent) -> None:
        lines = told.setdefault(Path(event.name).name, [])
        match event:
            case events.RunReading():
                lines.append("planning")
            case events.RunStarted(_, num_tokens, done_tokens, placement):
                lines.append(f"started {num_tokens} {done_tokens} {placement.partition}")
            case events.ShardMeasured(_, num_tokens):
                lines.append(f"advanced {num_tokens}")
            case events.RunEnded(_, run):
                lines.append(f"finished {run.status}")

    sizes: dict[str, Any] = {"max_sequences": 6, "sequence_length": 32, "sequences_per_shard": 4, "executor": "local"}
    models = [str(tiny_llama), "/missing"]
    avss_dist.score_all(models, corpus="builtin:pydoc", warehouse=tmp_path, on_event=note, **sizes)
    measured = ["planning", "started 192 0 single", "advanced 128", "advanced 64", "finished done"]
    assert told == {"tiny-llama": measured, "missing": ["planning", "finished failed"]}


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="scoer"):
        _ = avss_dist.scoer  # type: ignore[attr-defined]


def test_a_list_of_runs_fits_into_the_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that say least go first. The other formats have all."""
    write_scores(tmp_path, "a-long-name-of-a-checkpoint-0123456789", [1.0, 2.0, 3.0])
    headings = {}
    for width in (200, 90, 70):
        monkeypatch.setenv("COLUMNS", str(width))
        done = avss("ls", "-w", tmp_path)
        headings[width] = re.findall(r"\w+", done.stdout.splitlines()[1])
        assert ("Not shown" in done.stderr) is (width < 200)
        assert max(map(len, done.stdout.splitlines())) <= width
    assert headings[200] == ["model", "corpus", "run", "status", "tokens", "dtype", "created"]
    assert headings[70] == ["model", "corpus", "run"]
    assert set(headings[70]) < set(headings[90]) < set(headings[200])
    assert len(avss("ls", "-w", tmp_path, "--format", "csv").stdout.splitlines()[0].split(",")) == 10
