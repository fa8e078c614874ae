"""Mistakes and accidents: each is named, with what to do, without a traceback, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support import command_line
from support.checkpoints import llama
from support.command_line import files
from support.disks import SmallDisk
from support.tables import assert_same_tables
from support.tiers import all_of
from support.warehouses import activations, stats_of, write_measured

from avss_dist import Run, score
from avss_dist.runs.events import RunEvent, ShardMeasured
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMA_VERSION

SIZES: dict[str, Any] = {"max_sequences": 12, "sequence_length": 32, "sequences_per_shard": 4}
SCORE = ["--corpus", "builtin:pydoc", "--executor", "local", *command_line.as_words(SIZES)]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


def avss(*args: object) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = command_line.avss(*args)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with one run of the tiny Llama: 3 shards, nothing went wrong. Not to be changed."""
    warehouse = tmp_path_factory.mktemp("undisturbed") / "warehouse"
    assert avss("score", tiny_llama, *SCORE, "-w", warehouse)[0] == 0
    return warehouse


@pytest.fixture
def warehouse(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(undisturbed, tmp_path / "warehouse"))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refused(warehouse: Path, *args: object, says: list[str], failed_row: bool = False) -> None:
    """The command ends with 2 and says all of ``says``; the warehouse is as before, but for the row of a failed run."""
    before = files(warehouse)
    code, output = avss(*args)
    assert code == 2, output
    assert output.startswith(("Error: ", "Usage: ")), output
    assert "Traceback" not in output
    flat = " ".join(output.replace("│", " ").split())
    for part in says:
        assert part in flat
    after = files(warehouse)
    assert {name: after.get(name) for name in before} == before
    new = set(after) - set(before)
    for name in new:
        assert name.startswith("runs/")
    assert len(new) == failed_row


Break = Callable[[Path], object]


def configured(**changes: Any) -> Break:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def removed(pattern: str) -> Break:
    return lambda model: [file.unlink() for file in model.glob(pattern)]


def written(name: str, text: str) -> Break:
    return lambda model: (model / name).write_text(text)


WEIGHTS = "model.safetensors"
UNKNOWN = {"model_type": "lama", "architectures": ["LamaForCausalLM"]}


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (removed("config.json"), ["has no config.json", "save_pretrained()"]),
        (written("config.json", '{"model_type": '), ["config.json cannot be read: Expecting value: line 1 column 16"]),
        (configured(model_type=None), ["cannot be read", "`model_type`"]),
        (configured(**UNKNOWN), ["cannot be read", "`lama`", "pip install -U transformers"]),
        (
            configured(**UNKNOWN, auto_map={"AutoConfig": "modeling.Config"}),
            ["custom code", "needs --trust-remote-code"],
        ),
        (configured(num_attention_heads="four"), ["'num_attention_heads' expected int, got str"]),
        (removed("tokenizer*"), ["has no tokenizer.", "Copy tokenizer.json"]),
        (written("tokenizer.json", '{"version": '), ["has no tokenizer that can be opened: ", "Copy tokenizer.json"]),
        (
            lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"),
            ["has pickled weights only (pytorch_model.bin)", "--allow-pickle opens them"],
        ),
        (removed(WEIGHTS), ["has no weights (*.safetensors)", "Is the download complete?"]),
        (
            lambda model: llama(vocab_size=100).save_pretrained(model),
            ["returned token ", "vocabulary has 100", "Put the tokenizer"],
        ),
        (lambda model: os.truncate(model / WEIGHTS, 9000), ["are damaged or not whole", "Download or copy them again"]),
        (configured(hidden_size=64), ["its weights have other shapes than its config.json says"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_broken_model_is_refused(break_it: Break, says: list[str], model: Path, warehouse: Path) -> None:
    """Weights are read in a run, which then has failed."""
    failed_row = says[0].startswith(("are damaged", "its weights have other shapes"))
    break_it(model)
    refused(warehouse, "score", model, *SCORE, "-w", warehouse, says=[str(model), *says], failed_row=failed_row)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sites", "blok"], ["Unknown --sites 'blok'", "Did you mean 'block'?"]),
        (["--sit", "block"], ["No such option: --sit", "--sites"]),
        (["--thresholds", "small"], ["'small' is not a threshold", "Write an absolute one like 1e-5"]),
        (
            ["--thresholds", "0.1rms"],
            ["--thresholds: 0.1rms: expected an absolute threshold", "Write 1e-4, for example"],
        ),
        (["--sequence-length", "129"], ["128 tokens", "129", "Make --sequence-length 128 or less"]),
        (["--sequence-length", "many"], ["--sequence-length must be a whole number, not 'many'"]),
        (["--skip-first-tokens", "32"], ["--skip-first-tokens 32 leaves nothing of 32 tokens", "It must be smaller"]),
        (["--replicas", "2"], ["--executor local is one replica", "Use --executor ray"]),
        (["--replicas", "64..4"], ["--replicas: the minimum of '64..4' is larger than its maximum", "Write 4..64"]),
        pytest.param(
            ["--device", "cuda"],
            ["--device cuda: torch sees no GPU here", "avss doctor", "set --device to cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--layers", "layer"], ["LlamaModel has no layer list 'layer'", "Did you mean 'layers'?"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_refused(options: list[str], says: list[str], tiny_llama: Path, warehouse: Path) -> None:
    args = ["score", tiny_llama, *SCORE, *options, "-w", warehouse]
    refused(warehouse, *args, says=says, failed_row=options[0] == "--layers")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["show", "--run", "tiny-lama"], ["Unknown run 'tiny-lama'", "Did you mean 'tiny-llama-"]),
        (["show", "--site", "mpl"], ["Unknown --site 'mpl'", "Did you mean 'mlp'?"]),
        (["show", "--recipe", "pool"], ["Unknown --recipe 'pool'", "Did you mean 'pooled'?"]),
        (["show", "--recipe", "unit", "--site", "mlp"], ["No scores of site 'mlp' with recipe 'unit'", "Scored: "]),
        (["show", "-o", "/no/such/folder/a.svg"], ["/no/such/folder/a.svg cannot be written", "output"]),
        (["query", "COPY scores TO 'a.csv'"], ["COPY is not allowed in a query"]),
        (["query", "SELEC 1"], ['syntax error at or near "SELEC"', "Tables: runs, scores"]),
        (["query", "FROM runs", "--format", "jsn"], ["Unknown --format 'jsn'", "Did you mean 'json'?"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("show", "query") else "",
)
def test_a_wrong_question_is_refused(
    args: list[str], says: list[str], warehouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    refused(warehouse, *args, "-w", warehouse, says=says)
    assert files(tmp_path) == before


def test_nothing_is_written_beside_a_newer_schema(tiny_llama: Path, warehouse: Path) -> None:
    (file,) = (warehouse / "runs").rglob("*.parquet")
    table = pq.read_table(file, partitioning=None)
    metadata = {b"avss_schema_version": str(SCHEMA_VERSION + 1).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), file)
    says = [f"Written by a newer avss_dist: schema {SCHEMA_VERSION + 1}", "Get a newer avss_dist"]
    refused(warehouse, "score", tiny_llama, *SCORE, "-w", warehouse, says=says)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("{file}/warehouse", ["Cannot write {file}/warehouse", "who may write there"]),
        ("/proc/warehouse", ["Cannot write /proc/warehouse", "who may write there"]),
        ("ftp://host/warehouse", ["Cannot open ftp://host/warehouse", "Give a folder, or an s3://"]),
    ],
)
def test_an_unwritable_output_is_told_before_any_work(
    out: str, says: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.runs.planner.resolve", lambda *_, **__: pytest.fail("the model was opened"))
    file = tmp_path / "file"
    file.write_text("kept")
    args = ["score", tiny_llama, *SCORE, "-w", out.format(file=file)]
    refused(tmp_path, *args, says=[part.format(file=file) for part in says])


def shards(warehouse: Path) -> list[bytes]:
    return [data for name, data in files(warehouse).items() if name.startswith("shard_stats/")]


def leave_room(disk: Path, undisturbed: Path) -> Path:
    """Fill the disk, with room for one shard and not for three, by a file to delete."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes((1 << 20) - 8192 - 3 * max(map(len, shards(undisturbed))) // 2))
    return ballast


@AS_ROOT
def test_a_full_disk_keeps_shards_and_the_same_command_finishes(
    tiny_llama: Path, small_disk: Path, undisturbed: Path
) -> None:
    out = small_disk / "warehouse"
    ballast = leave_room(small_disk, undisturbed)
    command = ["score", tiny_llama, *SCORE, "-w", out]
    code, output = avss(*command)
    shards_before = shards(out)
    assert code == 1
    assert "Traceback" not in output
    assert f"Error: No space left on {out}." in output
    assert f"Free some and run the same command again: {len(shards_before)} shard" in output
    assert "kept." in output
    assert 1 <= len(shards_before) < 3
    ballast.unlink()
    code, output = avss(*command)
    assert code == 0
    assert f"{len(shards_before)} of 3 shards from before" in output
    assert_same_tables(out, undisturbed)


@pytest.mark.nightly
@AS_ROOT
def test_a_full_disk_ends_a_sweep_and_the_same_command_finishes(
    tiny_llama: Path, tiny_bert: Path, small_disk: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Runs that were on their way fail; those after them are not begun, and no model of theirs is opened."""
    copies = [shutil.copytree(tiny_llama, tmp_path / f"copy-{i}") for i in range(2)]
    for copy in copies:
        text = (copy / "config.json").read_text()
        (copy / "config.json").write_text(text.replace("{", f'{{"copy": "{copy.name}",', 1))
    models = [str(path) for path in (tiny_llama, tiny_bert, *copies)]

    def job(out: Path) -> Path:
        what = {"warehouse": str(out), "models": models, "corpora": ["builtin:pydoc"], "settings": SIZES}
        file = tmp_path / f"{out.parent.name}.yaml"
        file.write_text(yaml.safe_dump({**what, "execution": {"executor": "local"}}))
        return file

    whole = tmp_path / "whole" / "w"
    out = small_disk / "w"
    ballast = leave_room(small_disk, undisturbed)
    assert avss("run", job(whole))[0] == 0
    code, output = avss("run", job(out))
    assert code == 1
    assert "Traceback" not in output
    begun = output.count(f"failed. No space left on {out}.\n")
    not_begun = output.count(f"failed. Not begun: no space left on {out}.\n")
    assert begun >= 1
    assert not_begun >= 1
    assert begun + not_begun == 4
    assert ": 1 shard is kept." in output
    shards_before = shards(out)
    assert 1 <= len(shards_before) < 3
    ballast.unlink()
    code, output = avss("run", job(out))
    assert code == 0
    assert "4 done" in output
    assert_same_tables(out, whole)


def test_two_drivers_on_one_warehouse_agree(tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One begins and ends while the other has measured one of its shards."""
    common = {"corpus": "builtin:pydoc", "warehouse": tmp_path, "executor": "local", **SIZES}
    others: list[Run] = []

    def start_another(event: RunEvent) -> None:
        if isinstance(event, ShardMeasured) and not others:
            others.append(score(tiny_llama, **common))

    run = score(tiny_llama, on_event=start_another, **common)
    assert [run.status, *(other.status for other in others)] == ["done", "done"]
    assert_same_tables(tmp_path, undisturbed)
    assert Warehouse(tmp_path).runs()["status"].to_pylist() == ["done"]
    assert not list(tmp_path.rglob("*.tmp"))


TEXT = ["--corpus", "text.txt", "--max-sequences", "4", "--sequence-length", "16", "--executor", "local"]
SETTINGS = {"max_sequences": 4, "sequence_length": 16}
EXPERIMENT = {"tasks": ["perplexity:text.txt"], "scores": ["block_influence"], "shares": [0.34], "skip_sequences": 4}
COMMANDS = [
    ["score", "MODEL", *TEXT, "-w", "disk/w"],
    ["ablate", "MODEL", *TEXT, "--warehouse", "disk/w"],
    ["evaluate", "MODEL", "--tasks", "perplexity:text.txt", *TEXT[2:], "--warehouse", "disk/w"],
    ["run", "job.yaml"],
    ["prune", "MODEL", "plan.yaml", "-o", "disk/pruned"],
    ["shrink", "MODEL", *TEXT[:2], *TEXT[4:], "--repair", "channel", "--warehouse", "disk/w", "-o", "disk/shrunk"],
    ["plan", "-w", "w", "--by", "avss", "-o", "disk/plan.yaml"],
    ["report", "-w", "w", "-o", "disk/page.html"],
    ["show", "-w", "w", "--format", "csv", "-o", "disk/table.csv"],
    ["show", "-w", "w", "-o", "disk/picture.svg"],
]
QUICK_COMMANDS = [command for command in COMMANDS if command[0] in ("score", "ablate", "prune", "plan")]


def with_model(command: list[str], model: Path) -> list[str]:
    """Return a command with the folder of a model in place of the word MODEL."""
    words = []
    for word in command:
        if word == "MODEL":
            words.append(str(model))
        else:
            words.append(word)
    return words


@AS_ROOT
@pytest.mark.parametrize("command", all_of(COMMANDS, QUICK_COMMANDS), ids=lambda command: command[0])
def test_a_full_disk_is_a_failed_run(
    command: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {"warehouse": "disk/w", "models": [str(tiny_llama)], "corpora": ["text.txt"], "settings": SETTINGS}
    job |= {"execution": {"executor": "local"}, "experiment": EXPERIMENT}
    Path("job.yaml").write_text(yaml.safe_dump(job))
    Path("plan.yaml").write_text(f"{{model: {tiny_llama}, num_layers: 3, layers: model.layers, drop: [1]}}")
    Path("text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    write_measured(tmp_path / "w", "tiny-1", stats_of(activations(0)), 8)
    before = files(tmp_path)
    with SmallDisk(tmp_path / "disk", megabytes=1) as disk:
        disk.fill()
        code, output = avss(*with_model(command, tiny_llama))
        disk.free()
        assert files(tmp_path) == before  # no half of a file either
    assert code == 1, output
    assert "o space left" in output
    assert "Traceback" not in output
    assert output.count("Error: ") <= 1


REFUSED = """
import sys
from avss_dist.cli import app
try:
    app({arguments})
except SystemExit as stop:
    print(stop.code, sorted({{"torch", "transformers", "ray"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "org/a", "--corpus", "a.txt", "--dtype", "q"],
        pytest.param(["distill", "a", "--teacher", "b", "-o", "c", "--dtype", "q"], marks=pytest.mark.nightly),
        pytest.param(["ablate", "org/a", "--corpus", "a.txt", "--dtype", "q"], marks=pytest.mark.nightly),
    ],
)
def test_a_wrong_value_is_refused_without_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(arguments=arguments)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 []\n"
    assert "Unknown --dtype 'q'" in done.stderr
