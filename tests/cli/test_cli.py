"""The command line and the Python API, from a checkpoint to a picture and a query."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.checkpoints import LAYERS
from support.command_line import avss, commands

import avss_dist
from avss_dist.cli.commands import COMMANDS as LISTED
from avss_dist.cli.commands import MOVED
from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.core.registry import FROM_ACTIVATIONS, LOWEST_SHARE, RECIPES
from avss_dist.core.settings import (
    ATTENTIONS,
    DTYPES,
    EVERY_SITE,
    EXECUTORS,
    PUBLISHED_THRESHOLD,
    SITE_FAMILIES,
    SITES,
    Execution,
    Settings,
)
from avss_dist.report.page import summary
from avss_dist.runs import events
from avss_dist.system.doctor import CheckResult
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

LIMITS = {"--connect-seconds": 10.0, "--answer-seconds": 60.0}
EXECUTION = {f"--{f.name.replace('_', '-')}": getattr(Execution(), f.name) for f in fields(Execution)}
EXECUTION["--max-memory"] = None
del EXECUTION["--node-labels"]
EXECUTION["--node-label"] = None
TRACKER = {"--tracker": EXECUTION.pop("--tracker")}  # of what scores
COMMANDS: dict[str, dict[str, Any]] = {
    "score": {
        "models": None,
        "--corpus": None,
        "--warehouse": "warehouse",
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        "--site": None,
        "--threshold": None,
        **EXECUTION,
        **TRACKER,
        "--label-field": None,
        "--format": "text",
    },
    "estimate": {
        "model": None,
        "--corpus": None,
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        "--site": None,
        "--hardware": None,
        "--ranks": None,
        "--max-memory": None,
        "--teacher": None,
        "--format": "table",
    },
    "ls": {"what": "runs", "--warehouse": "warehouse", "--format": "table"},
    "show": {
        "--warehouse": "warehouse",
        "--run": None,
        "--recipe": "pooled",
        "--site": "block",
        "--threshold": "1e-05",
        "--output": None,
        "--format": "table",
        "--experts": False,
    },
    "plot": {
        "--warehouse": "warehouse",
        "--run": None,
        "--output": None,
        "--recipe": "pooled",
        "--site": "block",
        "--threshold": "1e-05",
    },
    "publish": {"target": None, "--warehouse": "warehouse", "--space": None},
    "compact": {"--warehouse": "warehouse"},
    "query": {"sql": None, "--warehouse": "warehouse", "--schema": False, "--output": None, "--format": "table"},
    "compare": {
        "--warehouse": "warehouse",
        "--run": None,
        "--by": "run",
        "--along": None,
        "--recipe": "pooled",
        "--site": "block",
        "--threshold": "1e-05",
        "--score": "avss",
        "--k": None,
        "--share": LOWEST_SHARE,
        "--allow-mismatch": False,
        "--output": None,
        "--format": "table",
    },
    "findings": {
        "--warehouse": "warehouse",
        "--run": None,
        "--recipe": "pooled",
        "--site": "block",
        "--threshold": "1e-05",
        "--all": False,
        "--format": "table",
    },
    "contrast": {
        "--warehouse": "warehouse",
        "--run": None,
        "--site": "block",
        "--recipe": "pooled",
        "--threshold": "1e-05",
        "--hallucinated": None,
        "--truthful": None,
        "--predictions": False,
        "--format": "table",
    },
    "quantiles": {
        "--warehouse": "warehouse",
        "--q": None,
        "--sparsity": None,
        "--site": "block",
        "--run": None,
        "--format": "table",
    },
    "report": {"--warehouse": "warehouse", "--output": "report.html", "--run": None},
    "plan": {
        "--warehouse": "warehouse",
        "--output": None,
        "--run": None,
        "--by": None,
        "--search": None,
        "--sublayers": False,
        "--corpus": None,
        "--budget": None,
        "--width": None,
        "--share": None,
        "--count": None,
        "--mass": None,
        "--parameters": None,
        "--memory": None,
        "--share-of-parameters": None,
        "--protect": "",
        "--contiguous": False,
        "--seed": 0,
        "--recipe": "pooled",
        "--site": "block",
        "--threshold": "1e-05",
        "--skip-sequences": 0,
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        **EXECUTION,
        "--format": "plan",
        "--json": False,
    },
    "quantize": {
        "--warehouse": "warehouse",
        "--output": None,
        "--run": None,
        "--by": "predicted",
        "--bits": None,
        "--memory": None,
        "--quantize": None,
        "--seed": 0,
        "--format": "plan",
        "--json": False,
    },
    "sparsify": {
        "target": None,
        "--warehouse": "warehouse",
        "--output": None,
        "--run": None,
        "--method": "uniform",
        "--rule": "all",
        "--pattern": None,
        "--corrections": 0,
        "--corpus": None,
        "--skip-sequences": 0,
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        **EXECUTION,
        "--format": "plan",
        "--json": False,
    },
    "prune": {
        "model": None,
        "plan": None,
        "--output": None,
        "--repair": None,
        "--repair-corpus": None,
        "--skip-sequences": 0,
        "--warehouse": None,
        "--push": None,
        "--trust-remote-code": False,
        "--max-sequences": None,
        "--shuffle-seed": None,
        "--chat-template": False,
        "--sequence-length": 256,
        "--batch-size": 8,
        "--layout": "packed",
        "--row-start": "auto",
        "--dtype": "auto",
        "--dequantize": False,
        "--attn-implementation": None,
        "--device": "auto",
        "--threads": 1,
        "--sequences-per-shard": None,
        **EXECUTION,
        "--format": "text",
    },
    "shrink": {
        "model": None,
        "--corpus": None,
        "--output": None,
        "--share": None,
        "--keep": None,
        "--by": "damage",
        "--protect": "",
        "--repair": "refit",
        "--repair-corpus": None,
        "--distill-tokens": None,
        "--task": None,
        "--limit": None,
        "--num-fewshot": None,
        "--prompt": None,
        "--continuation-tokens": 48,
        "--warehouse": None,
        "--allow-overlap": False,
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        **EXECUTION,
        "--format": "text",
    },
    "distill": {
        "student": None,
        "--teacher": None,
        "--output": None,
        "--corpus": None,
        "--self-texts": 256,
        "--watch": None,
        "--held-out": 16,
        "--skip-sequences": 0,
        "--allow-overlap": False,
        "--tokens": 1e6,
        "--train": "all",
        "--lora-rank": 16,
        "--learning-rate": None,
        "--warmup": 20,
        "--batch-size": 4,
        "--evaluations": 8,
        "--patience": 3,
        "--seed": 0,
        **{
            f"--{name.replace('_', '-')}": getattr(Settings(), name)
            for name in ("max_sequences", "sequence_length", "layout", "row_start", "chat_template", "shuffle_seed")
        },
        "--dtype": "auto",
        "--layers-path": None,
        "--attn-implementation": Settings().attention,
        "--device": "auto",
        "--trust-remote-code": False,
        "--text-loss": 0.0,
        "--hidden-loss": 0.0,
        "--ranks": 1,
        "--sharding": "ddp",
        "--placement-seconds": EXECUTION["--placement-seconds"],
        "--hang-seconds": EXECUTION["--hang-seconds"],
        "--picture": None,
        "--teacher-top": None,
        "--warehouse": None,
        **{name: EXECUTION[name] for name in ("--executor", "--replicas", "--address", "--fresh", "--partition")},
        "--node-label": None,
        **{name: EXECUTION[name] for name in ("--gpus-per-replica", "--max-memory")},
        **TRACKER,
        "--format": "text",
    },
    "sample": {
        "model": None,
        "--output": None,
        "--count": 512,
        "--prompt": None,
        "--seed": 0,
        "--sequence-length": 256,
        "--batch-size": 8,
        "--dtype": "auto",
        "--attn-implementation": Settings().attention,
        "--device": "auto",
        "--trust-remote-code": False,
        "--format": "text",
    },
    "ablate": {
        "model": None,
        "--corpus": None,
        "--warehouse": "warehouse",
        "--leave-one-out": True,
        "--sublayers": False,
        "--shapley": 0,
        "--truncation": True,
        "--seed": 0,
        "--gradients": False,
        "--damage": False,
        "--draws": 2,
        "--lens": False,
        "--spectra": False,
        "--quantize": None,
        "--rounded-layers": True,
        "--rounded-maps": False,
        "--skip-sequences": 0,
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        **EXECUTION,
        "--yes": False,
        "--format": "table",
    },
    "evaluate": {
        "subjects": None,
        "--task": None,
        "--warehouse": "warehouse",
        "--skip-sequences": 0,
        "--skip-questions": 0,
        "--limit": None,
        "--num-fewshot": None,
        "--apply-chat-template": False,
        "--system-instruction": None,
        "--fewshot-as-multiturn": False,
        "--base": None,
        "--sparse": None,
        "--allow-overlap": False,
        **{f"--{name.replace('_', '-')}": value for name, value in Settings().as_dict().items()},
        **EXECUTION,
        "--format": "table",
    },
    "scorecard": {"--warehouse": "warehouse", "--run": None, "--all": False, "--format": "table"},
    "run": {
        "job": None,
        **TRACKER,
        "--schema": False,
        "--dry-run": False,
        "--executor": None,
        "--replicas": None,
        "--address": None,
        "--fresh": False,
        "--allow-overlap": False,
        "--yes": False,
        "--format": "table",
    },
    "jobs submit": {"job": None, "--address": None, **LIMITS, "--replicas": None}
    | {"--fresh": False, "--follow": False, "--format": "text"},
    "jobs list": {"--address": None, "job_id": None, **LIMITS, "--format": "table"},
    "jobs logs": {"job_id": None, "--address": None, "--follow": False, **LIMITS},
    "jobs stop": {"job_id": None, "--address": None, **LIMITS, "--format": "text"},
    "doctor": {"--format": "text"},
}
for _command in ("score", "estimate", "ablate", "evaluate", "shrink", "plan", "sparsify"):
    del COMMANDS[_command]["--sites"], COMMANDS[_command]["--thresholds"]
    for _field, _option in (("--layers", "--layers-path"), ("--attention", "--attn-implementation")):
        COMMANDS[_command][_option] = COMMANDS[_command].pop(_field)
    if _command != "score":
        for _field in ("--skip-first-tokens", "--experts", "--allow-pickle"):
            del COMMANDS[_command][_field]
COMMANDS["plan"]["--experts"] = None  # a share, not the measurement of that name
for _options in COMMANDS.values():
    if _options.get("--format") in ("table", "text"):
        _options["--json"] = False
    _options |= {"--quiet": False, "--verbose": False}
TEXT = {"--corpus": "builtin:pydoc", "--max-sequences": 12, "--sequence-length": 32, "--sequences-per-shard": 4}
SCORE = [str(part) for option in TEXT.items() for part in option] + ["--executor", "local", "--quiet"]
HEAVY = ("torch", "ray", "transformers", "deepspeed")
Avss = Callable[..., subprocess.CompletedProcess[str]]


def rows(warehouse: Path, query: str) -> list[dict[str, Any]]:
    return Warehouse(warehouse).sql(query).to_pylist()


@pytest.fixture(scope="module")
def scored(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a run of each tiny model; the Llama's is the newest. Not to be changed."""
    warehouse = tmp_path_factory.mktemp("scored") / "warehouse"
    for model in (tiny_bert, tiny_llama):
        result = avss("score", model, *SCORE, "-w", warehouse)
        assert (result.exit_code, result.stderr) == (0, "")
    return warehouse


@pytest.fixture
def warehouse(scored: Path, tmp_path: Path) -> Path:
    """A copy of the scored warehouse, to change."""
    return Path(shutil.copytree(scored, tmp_path / "warehouse"))


def run_ids(warehouse: Path) -> dict[str, str]:
    """Run id by family."""
    return {row["family"]: row["run_id"] for row in rows(warehouse, "SELECT family, run_id FROM runs")}


def test_nothing_that_is_refused_is_recommended_to_an_encoder(scored: Path, tmp_path: Path) -> None:
    plan, run = tmp_path / "plan.yaml", ("--run", run_ids(scored)["bert"])
    told = avss("plan", "-w", scored, *run, "-o", plan)
    assert told.exit_code == 2 and "predicts no next token" in told.stderr and "block_influence:" in told.stderr
    assert "shapley" not in told.stderr and "avss ablate /" not in told.stderr
    told = avss("plan", "-w", scored, *run, "--by", "damage", "-o", plan)
    assert told.exit_code == 2 and "predicts no next token" in told.stderr and "--damage" not in told.stderr
    told = avss("plan", "-w", scored, *run, "--by", "block_influence", "-o", plan)
    assert told.exit_code == 0 and "predicts no next token" in told.stdout and "Evaluate it" not in told.stdout
    llama = avss("plan", "-w", scored, "--by", "block_influence", "-o", plan)
    assert "Evaluate it: avss evaluate" in llama.stdout and "predicts no next token" not in llama.stdout
    told = avss("report", "-w", scored, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert told.exit_code == 0 and page.count(summary.NOTHING) == 1 and page.count(summary.HEADLESS) == 1


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
    return {max(p.opts, key=len): p for p in commands()[command].params if p.name != "help"}


def test_the_commands_are_these() -> None:
    assert set(commands()) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_exists_with_the_default_of_the_settings(command: str) -> None:
    assert {name: p.default for name, p in _parameters(command).items()} == COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(command: str) -> None:
    result = avss(*command.split(), "--help")
    assert result.exit_code == 0
    for name, parameter in _parameters(command).items():
        assert name in result.stdout or str(parameter.metavar) in result.stdout
        assert parameter.help
    assert commands()[command].help and "Examples:" in result.stdout


@pytest.mark.parametrize("name", LISTED)
def test_the_help_of_all_commands_has_the_first_sentence_of_each(name: str) -> None:
    if name != "jobs":
        assert commands()[name].help.partition("\n\n")[0].replace("\n", " ") == LISTED[name].summary
    assert LISTED[name].summary[:20] in avss("--help").stdout


def test_help_names_every_command() -> None:
    for args in (["--help"], ["-h"], []):
        result = avss(*args)
        assert all(f" {command.split()[0]} " in result.output for command in COMMANDS)


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in MOVED for option in MOVED[name]])
def test_an_option_that_moved_names_the_command_that_has_it(command: str, option: str) -> None:
    required = {"score": ("m", "--corpus", "c"), "plan": ("-o", "plan.yaml")}
    result = avss(command, *required[command], f"{option}=1")
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert f"No such option: {option}. It is an option of another command: {MOVED[command][option]}" in message
    _, other, *words = MOVED[command][option].split()
    opts = {spelling for parameter in commands()[other].params for spelling in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= opts


def test_a_run_is_named_by_a_part_that_only_it_has(scored: Path) -> None:
    run_id = run_ids(scored)["llama"]
    result = avss("plan", "-w", scored, "--run", "*", "--by", "last", "-o", scored.parent / "plan.yaml")
    assert result.exit_code == 2 and "'*' matches 2 runs." in result.stderr
    for name in ("llama", run_id[-10:], "*LLAMA*", run_id):
        result = avss("show", "-w", scored, "--run", name)
        assert result.exit_code == 0 and run_id in result.stdout
        assert (f"Run {run_id} is the one" in result.stderr) is (name in ("llama", run_id[-10:]))
    assert "Unknown run 'lama'" in avss("show", "-w", scored, "--run", "lama").stderr  # no word begins there
    result = avss("show", "-w", scored, "--run", "tiny")
    assert result.exit_code == 2 and "'tiny' is part of 2 runs." in result.stderr
    result = avss("report", "-w", scored, "--run", "nothing", "-o", scored.parent / "r.html")
    assert result.exit_code == 2 and "Unknown run 'nothing'" in result.stderr


def test_names_are_listed_in_help_and_completed() -> None:
    from avss_dist.analysis.compare import BY
    from avss_dist.read_requests import COMPARED

    assert COMPARED == BY
    for command, option, names in (
        ("score", "--dtype", DTYPES),
        ("score", "--site", (*EVERY_SITE, *SITE_FAMILIES)),
        ("score", "--attn-implementation", ATTENTIONS),
        ("run", "--executor", EXECUTORS),
        ("compare", "--score", FROM_ACTIVATIONS),
        ("query", "--format", ("table", "csv", "json", "markdown", "parquet")),
    ):
        parameter = _parameters(command)[option]
        listed = f"[{'|'.join(names)}]"
        assert parameter.metavar == listed or (parameter.metavar == "<name>" and ", ".join(names) in parameter.help)
        completed = parameter.shell_complete(None, names[-1][:3])  # type: ignore[arg-type]
        assert names[-1] in [item.value for item in completed]


def test_public_names_are_shown() -> None:
    assert {"score", "score_all", "Run", "Warehouse"} <= set(dir(avss_dist))


def test_the_defaults_of_a_picture_are_the_published_ones() -> None:
    assert _parameters("show")["--recipe"].default == RECIPES[0] == "pooled"
    assert _parameters("show")["--site"].default == SITES[0] == "block"
    assert float(_parameters("show")["--threshold"].default) == PUBLISHED_THRESHOLD == 1e-5


def test_version() -> None:
    assert avss("--version").stdout == f"avss_dist {avss_dist.__version__}\n"


# From a checkpoint to tables and pictures.


def test_a_run_is_kept_whole(scored: Path) -> None:
    for name, expected in (("layer_stats", LAYERS * len(SITES)), ("shard_stats", LAYERS * len(SITES) * 3)):
        assert len(rows(scored, f"FROM {name} WHERE family = 'llama'")) == expected
    (run,) = rows(scored, "FROM runs WHERE family = 'llama'")
    assert (run["status"], run["error"], run["num_layers"], run["hidden_size"]) == ("done", None, LAYERS, 32)
    assert (run["num_sequences"], run["num_tokens"], run["num_shards"]) == (12, 12 * 32, 3)
    assert (run["dtype"], run["device"], run["partition"], run["replicas"]) == ("float32", "cpu", "single", 1)
    assert run["run_id"] == f"tiny-llama-{run['fingerprint'][:10]}"


def test_show_draws_the_newest_run(scored: Path) -> None:
    result = avss("show", "-w", scored)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "tiny-llama block / pooled / |x| < 1e-05" in " ".join(result.stdout.split())
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == LAYERS
    best = rows(scored, "SELECT layer FROM scores WHERE rank = 1 AND site = 'block' AND recipe = 'pooled'")
    assert [bool(re.match(r"│\s+\d+ \*", line)) for line in lines].count(True) == 1
    assert any(f" {row['layer']} *" in result.stdout for row in best)
    assert "1 more in" in result.stdout


def test_show_draws_an_encoder(scored: Path) -> None:
    run_id = run_ids(scored)["bert"]
    result = avss("show", "-w", scored, "--run", run_id)
    assert result.exit_code == 0
    assert "tiny-bert" in result.stdout
    assert run_id in result.stdout
    assert sum(line.startswith("│") for line in result.stdout.splitlines()) == LAYERS


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("threshold", ["1e-5", "0.1", "0.1rms"])
def test_show_takes_site_and_threshold(scored: Path, site: str, threshold: str) -> None:
    result = avss("show", "-w", scored, "--site", site, "--threshold", threshold, "--recipe", "element")
    assert result.exit_code == 0
    assert f"{site} / element / |x| < " in " ".join(result.stdout.split())


def test_a_query_without_an_answer_says_so(scored: Path) -> None:
    result = avss("query", "-w", scored, "@drift")
    assert result.exit_code == 0 and "No row. @drift: How does" in result.stderr
    assert "It takes two revisions of a series" in result.stderr
    assert avss("query", "-w", scored, "FROM runs WHERE false", "--format", "csv").stderr == "No row.\n"


@pytest.mark.parametrize(
    ("ending", "signature"),
    [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<svg"), (".html", b"<!doctype html>"), (".PNG", b"\x89PNG")],
)
def test_plot_writes_what_the_ending_says(scored: Path, tmp_path: Path, ending: str, signature: bytes) -> None:
    file = tmp_path / f"scores{ending}"
    result = avss("plot", "-w", scored, "-o", file)
    assert (result.exit_code, result.stdout) == (0, f"{file}\n")
    assert re.fullmatch(r"The newest run, \S+; --run names others, --run '\*' all\.\n", result.stderr)
    data = file.read_bytes()
    assert data.startswith(signature)
    assert len(data) > 10_000


def test_a_page_needs_no_network_and_holds_every_run(scored: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.html"
    runs = [part for run_id in run_ids(scored).values() for part in ("--run", run_id)]
    assert avss("plot", "-w", scored, *runs, "-o", file).exit_code == 0
    page = file.read_text(encoding="utf-8")
    skeleton = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert skeleton.count("<script") == 3
    assert not re.search(r"\s(src|href)=", skeleton)
    spec = re.search(r'<script type="application/json" id="spec">(.*?)</script>', page, re.DOTALL)
    assert spec is not None
    assert all(run_id[-10:] in spec[1] for run_id in run_ids(scored).values())
    assert json.loads(spec[1])["$schema"].startswith("https://vega.github.io/schema/vega-lite/")


QUERY = "SELECT layer, site, avss_smoothed, nullif(1, 1) AS nothing FROM scores ORDER BY ALL LIMIT 4"


def test_query_prints_csv(scored: Path) -> None:
    found = list(csv.DictReader(io.StringIO(avss("query", "-w", scored, QUERY, "--format", "csv").stdout)))
    expected = rows(scored, QUERY)
    assert [(int(r["layer"]), r["site"], float(r["avss_smoothed"]), r["nothing"]) for r in found] == [
        (r["layer"], r["site"], r["avss_smoothed"], "") for r in expected
    ]


def test_query_prints_json_lines(scored: Path) -> None:
    lines = avss("query", "-w", scored, QUERY, "--format", "json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == rows(scored, QUERY)


def test_query_prints_parquet(scored: Path) -> None:
    result = avss("query", "-w", scored, QUERY, "--format", "parquet")
    assert pq.read_table(io.BytesIO(result.stdout_bytes)).to_pylist() == rows(scored, QUERY)


def test_query_prints_a_table(scored: Path) -> None:
    result = avss("query", "-w", scored, QUERY)
    assert all(name in result.stdout for name in ("layer", "site", "avss_smoothed", "nothing", "attention"))
    assert sum(line.startswith("│") for line in result.stdout.splitlines()) == 4


def test_json_has_no_number_that_json_lacks(scored: Path) -> None:
    query = "SELECT 'nan'::DOUBLE AS a, [1.5, 'inf'::DOUBLE] AS b, {'c': '-inf'::DOUBLE} AS d"
    line = avss("query", "-w", scored, query, "--format", "json").stdout
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": [1.5, None], "d": {"c": None}}


@pytest.mark.parametrize("format", ["csv", "json", "parquet", "table"])
def test_columns_of_the_same_name_are_all_kept(scored: Path, format: str) -> None:
    result = avss("query", "-w", scored, "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a", "--format", format)
    if format == "parquet":
        found: list[Any] = pq.read_table(io.BytesIO(result.stdout_bytes)).to_pylist()
    elif format == "csv":
        found = [{k: int(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(result.stdout))]
    elif format == "json":
        found = [json.loads(result.stdout)]
    else:
        names, values = (re.findall(r"\w+", line) for line in result.stdout.splitlines() if re.search(r"\w", line))
        found = [dict(zip(names, map(int, values), strict=True))]
    assert [list(row.values()) for row in found] == [[1, 2, 3, 4]]


# Several models.


def test_one_missing_model_does_not_stop_the_others(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out, missing = tmp_path / "warehouse", tmp_path / "missing"
    result = avss("score", tiny_llama, missing, tiny_bert, *SCORE, "-w", out)
    assert (result.exit_code, result.stderr) == (1, "")
    assert f"failed. There is no folder '{missing}'." in result.stdout
    found = rows(out, "SELECT model, status, error FROM runs ORDER BY status, model")
    assert [(row["model"], row["status"]) for row in found] == [
        *((model, "done") for model in sorted([str(tiny_llama), str(tiny_bert)])),
        (str(missing), "failed"),
    ]
    assert found[2]["error"].startswith(f"There is no folder '{missing}'.")
    assert {row["model"] for row in rows(out, "SELECT DISTINCT model FROM scores")} == {str(tiny_llama), str(tiny_bert)}

    again = avss("score", tiny_llama, missing, tiny_bert, *SCORE, "-w", out)
    assert again.exit_code == 1
    assert again.stdout.count("done before, nothing to do") == 2
    assert len(rows(out, "FROM runs")) == 3

    failed = rows(out, "SELECT run_id FROM runs WHERE status = 'failed'")[0]["run_id"]
    shown = avss("show", "-w", out, "--run", failed)
    assert shown.exit_code == 2
    assert f"Run '{failed}' failed: There is no folder" in shown.stderr


def test_a_model_that_fails_while_it_runs_leaves_one_row(tiny_llama: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken", tmp_path / "warehouse"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = avss("score", broken, tiny_llama, *SCORE, "-w", out)
    assert result.exit_code == 1
    found = rows(out, "SELECT run_id, status, error, num_shards FROM runs ORDER BY status DESC")
    assert [row["status"] for row in found] == ["failed", "done"]
    assert found[0]["error"].startswith(f"The weights of '{broken}' are damaged")
    assert found[0]["num_shards"] == 3
    assert f"{found[0]['run_id']}: failed." in result.stdout


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
    found = rows(tmp_path, "SELECT family, status, error FROM runs ORDER BY status")
    assert [row["status"] for row in found] == ["done", "failed"]
    assert found[1]["error"] == "ZeroDivisionError: in the model"
    alone = avss("score", tiny_llama, *SCORE, "-w", tmp_path)
    assert alone.exit_code == 1
    assert alone.stderr == "Error: ZeroDivisionError: in the model\n"


def test_what_is_done_is_skipped_unless_fresh(warehouse: Path, tiny_llama: Path) -> None:
    before = rows(warehouse, "FROM runs WHERE family = 'llama'")[0]
    scores = Warehouse(warehouse).scores().sort_by([(name, "ascending") for name in ("run_id", "layer", "site")])
    skipped = avss("score", tiny_llama, *SCORE, "-w", warehouse)
    assert f"{before['run_id']}: done before, nothing to do" in skipped.stdout
    assert rows(warehouse, "FROM runs WHERE family = 'llama'")[0] == before
    fresh = avss("score", tiny_llama, *SCORE, "-w", warehouse, "--fresh")
    assert f"{before['run_id']}: 384 tokens in " in fresh.stdout
    assert rows(warehouse, "FROM runs WHERE family = 'llama'")[0]["created_at"] > before["created_at"]
    assert (
        Warehouse(warehouse).scores().sort_by([(name, "ascending") for name in ("run_id", "layer", "site")]) == scores
    )


def test_the_options_of_score_reach_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    options = ["--site", "mlp", "--site", "block", "--threshold", "0.5", "--dtype", "bfloat16", "--batch-size", "3"]
    options += ["--layout", "padded", "--skip-first-tokens", "2", "--attn-implementation", "eager"]
    options += ["--layers-path", "layers"]
    result = avss("score", tiny_llama, *SCORE, *options, "--device", "cpu", "-w", tmp_path)
    assert result.exit_code == 0
    (run,) = rows(tmp_path, "FROM runs")
    assert (run["sites"], run["thresholds"]) == (["block", "mlp"], [1e-5, 0.5])
    assert (run["dtype"], run["batch_size"], run["attention_implementation"]) == ("bfloat16", 3, "eager")
    settings = json.loads(run["settings"])
    assert (settings["layout"], settings["skip_first_tokens"], settings["layers"]) == ("padded", 2, "layers")
    assert run["num_tokens"] == 12 * 30


# Names that are code elsewhere.


@pytest.fixture
def hostile(tiny_llama: Path, tmp_path: Path) -> tuple[Path, str]:
    """A warehouse with a run of a folder whose name is markup, and a row of a model whose name is worse."""
    name = "[red]<script>alert(1)<"
    folder = Path(shutil.copytree(tiny_llama, tmp_path / name))
    out = tmp_path / "warehouse"
    assert avss("score", folder, *SCORE, "-w", out).exit_code == 0
    store = Store(out)
    run = store.table("runs").to_pylist(maps_as_pydicts="strict")[0]
    scores = store.table("scores").to_pylist()
    identity = RunIdentity(run_id="hostile-1", model=f"org/{name}", revision=None, family="[bold]<script>")
    store.write_scores(identity, [row | {"layer_name": "</script><script>alert(2)</script>"} for row in scores])
    store.write_run(run | {"run_id": "hostile-1", "model": f"org/{name}", "corpus": "[link=x]<script>alert(3)"})
    return out, name


def test_a_name_is_harmless_on_a_page(hostile: tuple[Path, str], tmp_path: Path) -> None:
    warehouse, _ = hostile
    for pattern, ending in (("*", "html"), ("hostile-1", "svg")):
        file = tmp_path / f"page.{ending}"
        assert avss("plot", "-w", warehouse, "--run", pattern, "-o", file).exit_code == 0
        page = file.read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert "alert(1)" in page  # it is there, as text
    assert page.count("</script>") == 0


def test_a_name_is_shown_as_it_is_in_the_terminal(hostile: tuple[Path, str]) -> None:
    warehouse, name = hostile
    shown = avss("show", "-w", warehouse, "--run", "hostile-1").stdout
    assert f"org/{name}" in shown
    assert "[link=x]<script>alert(3)" in shown
    assert f"org/{name}" in avss("query", "-w", warehouse, "SELECT model FROM runs").stdout
    assert "[red]a" in avss("query", "-w", warehouse, "SELECT 1 AS \"[red]a\", '[/]' AS b").stdout


# What is loaded, and what is said.


def in_process(*args: object) -> tuple[int, set[str], list[str], str]:
    """Exit code, the heavy modules that a command loads, its lines, and its standard error."""
    code = """
import sys
from avss_dist.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(code or 0, *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    exit_code, *modules = last.split()
    return int(exit_code), {name for name in HEAVY if name in modules}, lines, done.stderr


@pytest.mark.parametrize("command", [["--help"], ["score", "--help"], ["query", "FROM runs"], ["show"]])
def test_reading_loads_nothing_heavy(command: list[str], scored: Path) -> None:
    args: list[object] = [*command]
    if command[0] in ("query", "show"):
        args += ["-w", scored]
    exit_code, heavy, lines, error = in_process(*args)
    assert (exit_code, heavy, error) == (0, set(), "")
    assert lines


@pytest.mark.parametrize("what", ["avss_dist; avss_dist.Warehouse", "avss_dist.executors.ray.heartbeats"])
def test_importing_loads_nothing_heavy(what: str) -> None:
    """The package; and what the process of the actor `HeartbeatMonitor` imports."""
    code = f"import sys, {what}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {*HEAVY, "altair", "datasets"} & set(done.stdout.split())


def test_scoring_here_is_quiet_and_loads_no_ray(tiny_llama: Path, tmp_path: Path) -> None:
    exit_code, heavy, lines, error = in_process("score", tiny_llama, *SCORE, "-w", tmp_path)
    assert (exit_code, error) == (0, "")
    assert len(lines) == 2
    assert re.fullmatch(r"tiny-llama-[0-9a-f]{10}: 384 tokens in [\d.]+ s\.", lines[0])
    assert lines[1].startswith(f"Look at it: avss show -w {tmp_path} --run tiny-llama-")
    assert "torch" in heavy
    assert "ray" not in heavy


def test_stopping_says_that_the_work_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avss_dist.runs.planner.resolve", stop)
    result = avss("score", "any", *SCORE, "-w", tmp_path)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "run the same command again to finish" in result.stderr


@pytest.mark.parametrize(
    ("command", "reader", "lines"),
    [
        ("query -w {} 'FROM layer_stats, range(20)' --format json", "head -1", 1),
        ("query -w {} 'SELECT 1' --format csv", "true", 0),
        ("findings -w {}", "true", 0),
    ],
)
def test_a_closed_pipe_is_no_error(scored: Path, command: str, reader: str, lines: int) -> None:
    line = f"{sys.executable} -m avss_dist {command.format(scored)} | {reader}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == lines


@pytest.mark.parametrize(("works", "shown"), [(True, "ok "), (False, "NO ")])
def test_doctor_says_what_works(works: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [CheckResult("torch", True, "2.9.1"), CheckResult("pictures", works, "[red]no\u001b[2J")]
    monkeypatch.setattr("avss_dist.system.doctor.check_machine", lambda: iter(found))
    done = avss("doctor")
    assert done.exit_code == (0 if works else 1)
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"ok  torch +2\.9\.1", first)
    assert second.startswith(f"{shown} pictures ") and second.endswith("[red]no\ufffd[2J")


# The Python API.


def test_the_api_scores_and_reads(tiny_llama: Path, tmp_path: Path) -> None:
    run = avss_dist.score(
        tiny_llama,
        corpus="builtin:pydoc",
        warehouse=tmp_path,
        max_sequences=8,
        sequence_length=32,
        sequences_per_shard=4,
        executor="local",
    )
    assert isinstance(run, avss_dist.Run)
    assert (run.status, run.num_shards, run.num_tokens, run.error) == ("done", 2, 256, None)
    assert (run.model, run.warehouse) == (str(tiny_llama), str(tmp_path))
    block = run.scores(site="block", recipe="pooled", threshold=1e-5, threshold_kind="absolute")
    assert sorted(block["layer"].to_pylist()) == [0, 1, 2]
    assert sorted(block["rank"].to_pylist()) == [1, 2, 3]
    warehouse = avss_dist.Warehouse(tmp_path)
    assert warehouse.runs()["run_id"].to_pylist() == [run.run_id]
    assert warehouse.scores(run_id=run.run_id).num_rows == warehouse.scores().num_rows > block.num_rows
    assert warehouse.layer_stats().num_rows == LAYERS * len(SITES)
    assert warehouse.sql("SELECT count(*) AS n FROM scores WHERE site = 'block'").to_pylist()[0]["n"] > LAYERS
    with pytest.raises(QueryError, match="Did you mean 'block'"):
        run.scores(site="blok")


@pytest.mark.parametrize("name", ["score", "score_all"])
def test_an_unknown_keyword_names_the_nearest(name: str, tmp_path: Path) -> None:
    model: Any = "any" if name == "score" else ["any"]
    with pytest.raises(ConfigError, match="Unknown option 'sequence_lenght'") as caught:
        getattr(avss_dist, name)(model, corpus="builtin:pydoc", warehouse=tmp_path / "new", sequence_lenght=32)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Did you mean 'sequence_length'?")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["score", "score_all"])
def test_no_warehouse_has_an_empty_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`warehouse`: the name is empty"):
        getattr(avss_dist, name)("any" if name == "score" else ["any"], corpus="builtin:pydoc", warehouse="")
    assert not list(tmp_path.iterdir())


def test_the_api_scores_several_models_and_reports(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    told: dict[str, list[str]] = {}

    def note(event: events.RunEvent) -> None:
        lines = told.setdefault(Path(event.name).name, [])
        match event:
            case events.RunReading():
                lines.append("planning")
            case events.RunPlaced(_, placement):
                lines.append(f"placed {placement.partition}")
            case events.RunStarted(_, num_tokens, done_tokens):
                lines.append(f"started {num_tokens} {done_tokens}")
            case events.ShardMeasured(_, num_tokens):
                lines.append(f"advanced {num_tokens}")
            case events.RunEnded(_, run):
                lines.append(f"finished {run.status}")

    runs = avss_dist.score_all(
        [str(tiny_llama), "/missing", str(tiny_bert)],
        corpus="builtin:pydoc",
        warehouse=tmp_path,
        on_event=note,
        max_sequences=6,
        sequence_length=32,
        sequences_per_shard=4,
        executor="local",
    )
    assert [run.status for run in runs] == ["done", "failed", "done"]
    measured = ["planning", "placed single", "started 192 0", "advanced 128", "advanced 64", "finished done"]
    assert told == {"tiny-llama": measured, "missing": ["planning", "finished failed"], "tiny-bert": measured}


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="scoer"):
        _ = avss_dist.scoer  # type: ignore[attr-defined]
