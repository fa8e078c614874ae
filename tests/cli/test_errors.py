"""Mistakes and accidents: each is named, with what to do, without a traceback, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
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
from support.tables import assert_same_tables

from avss_dist import Run, score
from avss_dist.runs.events import RunEvent, ShardMeasured
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMA_VERSION

SIZES: dict[str, Any] = {"max_sequences": 12, "sequence_length": 32, "sequences_per_shard": 4}
SCORE = ["--corpus", "builtin:pydoc", "--executor", "local"]
SCORE += [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
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
    assert all(name.startswith("runs/") for name in new)
    assert len(new) == failed_row


# Models.


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": ')


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", 9000)


def small_vocabulary(model: Path) -> None:
    llama(vocab_size=100).save_pretrained(model)


UNKNOWN = {"model_type": "lama", "architectures": ["LamaForCausalLM"]}


@pytest.mark.parametrize(
    ("break_it", "says", "failed_row"),
    [
        (no_config, ["has no config.json", "save_pretrained()"], False),
        (broken_config, ["config.json cannot be read: Expecting value: line 1 column 16"], False),
        (configured(model_type=None), ["cannot be read", "`model_type`"], False),
        (configured(**UNKNOWN), ["cannot be read", "`lama`", "pip install -U transformers"], False),
        (
            configured(**UNKNOWN, auto_map={"AutoConfig": "modeling.Config"}),
            ["custom code", "needs --trust-remote-code"],
            False,
        ),
        (configured(num_attention_heads="four"), ["'num_attention_heads' expected int, got str"], False),
        (no_tokenizer, ["has no tokenizer.", "Copy tokenizer.json"], False),
        (broken_tokenizer, ["has no tokenizer that can be opened: ", "Copy tokenizer.json"], False),
        (pickled, ["has pickled weights only (pytorch_model.bin)", "--allow-pickle opens them"], False),
        (no_weights, ["has no weights (*.safetensors)", "Is the download complete?"], False),
        (small_vocabulary, ["returned token ", "vocabulary has 100", "Put the tokenizer"], False),
        (truncated, ["are damaged or not whole", "Download or copy them again"], True),
        (configured(hidden_size=64), ["its weights have other shapes than its config.json says"], True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_model_is_refused(
    break_it: Callable[[Path], None], says: list[str], failed_row: bool, model: Path, warehouse: Path
) -> None:
    break_it(model)
    refused(warehouse, "score", model, *SCORE, "-w", warehouse, says=[str(model), *says], failed_row=failed_row)


# Options.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sites", "blok"], ["Unknown --sites 'blok'", "Did you mean 'block'?"]),
        (["--attention", "eagr"], ["Unknown --attention 'eagr'", "Did you mean 'eager'?"]),
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
        (["--layers", "layer"], ["LlamaModel has no layer list 'layer'", "Did you mean 'layers'?"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_refused(options: list[str], says: list[str], tiny_llama: Path, warehouse: Path) -> None:
    args = ["score", tiny_llama, *SCORE, *options, "-w", warehouse]
    refused(warehouse, *args, says=says, failed_row=options[0] == "--layers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tiny_llama: Path, warehouse: Path) -> None:
    says = ["--device cuda: torch sees no GPU here", "avss doctor", "set --device to cpu"]
    refused(warehouse, "score", tiny_llama, *SCORE, "--device", "cuda", "-w", warehouse, says=says)


# Reading.


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
    says = [f"Written by a newer avss_dist: schema {SCHEMA_VERSION + 1}", "Update avss_dist where you installed it"]
    refused(warehouse, "score", tiny_llama, *SCORE, "-w", warehouse, says=says)


# Writing.


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("{file}/warehouse", ["Cannot write {file}/warehouse", "who may write there"]),
        ("/proc/warehouse", ["Cannot write /proc/warehouse", "who may write there"]),
        ("ftp://host/warehouse", ["Cannot open ftp://host/warehouse", "Give a folder, or an s3://"]),
    ],
)
def test_an_unwritable_output_is_told_before_any_work(
    out: str, says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.runs.planner.resolve", lambda *_, **__: pytest.fail("the model was opened"))
    file = tmp_path / "file"
    file.write_text("kept")
    args = ["score", "any", *SCORE, "-w", out.format(file=file)]
    refused(tmp_path, *args, says=[part.format(file=file) for part in says])


@AS_ROOT
def test_a_full_disk_keeps_shards_and_the_same_command_finishes(
    tiny_llama: Path, small_disk: Path, undisturbed: Path
) -> None:
    out, ballast = small_disk / "warehouse", small_disk / "ballast"
    shard = max(len(data) for name, data in files(undisturbed).items() if name.startswith("shard_stats/"))
    out.mkdir()
    ballast.write_bytes(bytes((1 << 20) - 8192 - 3 * shard // 2))  # room for one shard, not for three
    command = ["score", tiny_llama, *SCORE, "-w", out]
    code, output = avss(*command)
    kept = [name for name in files(out) if name.startswith("shard_stats/")]
    assert code == 1
    assert "Traceback" not in output
    assert f"Error: No space left on {out}." in output
    assert f"Free some and run the same command again: {len(kept)} shard" in output and "kept." in output
    assert 1 <= len(kept) < 3
    ballast.unlink()
    code, output = avss(*command)
    assert code == 0
    assert f"{len(kept)} of 3 shards from before" in output
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

    whole, out, ballast = tmp_path / "whole" / "w", small_disk / "w", small_disk / "ballast"
    assert avss("run", job(whole))[0] == 0
    shard = max(len(data) for name, data in files(undisturbed).items() if name.startswith("shard_stats/"))
    ballast.write_bytes(bytes((1 << 20) - 8192 - 3 * shard // 2))
    code, output = avss("run", job(out))
    assert code == 1 and "Traceback" not in output
    begun, not_begun = (output.count(f"failed. {says}o space left on {out}.\n") for says in ("N", "Not begun: n"))
    assert begun >= 1 and not_begun >= 1 and begun + not_begun == 4 and ": 1 shard is kept." in output
    kept = [name for name in files(out) if name.startswith("shard_stats/")]
    assert 1 <= len(kept) < 3
    ballast.unlink()
    code, output = avss("run", job(out))
    assert code == 0 and "4 done" in output
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
