"""Shrinking with a distillation after the repair: rows, verdict, resumption, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import one_thread
from support.command_line import avss, files
from support.commands import Command
from support.processes import wait_until

import avss_dist
from avss_dist import evaluate
from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.distillation import memory, trainer
from avss_dist.distillation.events import HeldOutMeasured, TrainingAdvanced
from avss_dist.distillation.record import read_record
from avss_dist.evaluation.shrink import Shrunk
from avss_dist.pruning.repair.record import read_repairs
from avss_dist.warehouse.reader import Warehouse

ROWS = {"max_sequences": 80, "sequence_length": 32, "batch_size": 4, "sequences_per_shard": 4}
READ: dict[str, Any] = {**ROWS, "dtype": "float32", "device": "cpu"}
CONTINUED: dict[str, Any] = {"continuation_tokens": 4}
OPTIONS = [word for name, value in (READ | CONTINUED).items() for word in (f"--{name.replace('_', '-')}", str(value))]
TOKENS = 24 * 4 * 32


def shrunk(model: Path, corpus: Path, out: Path, **options: Any) -> Shrunk:
    with one_thread():
        return avss_dist.shrink(
            model, output=out, corpus=corpus, **READ | CONTINUED | {"distill_tokens": TOKENS} | options
        )


@pytest.fixture(scope="module")
def events() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def done(deep: Path, corpus: Path, events: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Shrunk:
    return shrunk(deep, corpus, tmp_path_factory.mktemp("shrunk") / "out", on_event=events.append)


def test_the_distilled_checkpoint_is_the_output_and_is_evaluated(
    done: Shrunk, deep: Path, corpus: Path, events: list[Any]
) -> None:
    """Evaluating it again gives the reported values, to the bit."""
    (task,), record = done.best.tasks, done.distillation
    assert record is not None and record == read_record(Path(done.folder)) and record.after.tokens <= TOKENS
    assert task.distilled is not None and task.repaired is not None
    assert record.after.loss < record.before.loss
    assert done.best.kept == task.of(task.distilled).value != done.curve[0].kept == task.of(task.repaired).value
    folder = Path(done.folder)
    assert {path.name for path in folder.parent.iterdir()} == {"out", "out-warehouse"}
    assert read_repairs(folder) == [done.record]
    read = {**READ, "max_sequences": 10}
    options: dict[str, Any] = {"tasks": [f"perplexity:{corpus}"], "skip_sequences": 10, **read}
    with one_thread():
        again = evaluate([str(deep), done.folder], warehouse=f"{done.folder}-again", **options)
    assert [one.result.value for one in again] == [task.whole.value, task.distilled.value]
    assert any(isinstance(event, TrainingAdvanced) for event in events)
    assert any(isinstance(event, HeldOutMeasured) for event in events)
    evaluated = Warehouse(f"{done.folder}-warehouse").table("evaluations").to_pylist()
    assert {row["model"] for row in evaluated} == {str(deep), done.folder}


def test_rows_of_each_use_are_apart(done: Shrunk) -> None:
    """Scores read 10 of 80 rows, the evaluation 10, distillation is watched on 10, repair and distillation read 50."""
    assert done.record is not None and done.distillation is not None
    assert (done.record.skip_sequences, done.record.texts[0].rows) == (30, 50)
    text, own = done.distillation.texts
    assert (done.distillation.skip_sequences, text.held_out_rows, text.trained_rows) == (20, 10, 50)
    assert own.corpus == "self" and own.trained_rows > 0


def test_the_distilled_model_continues_the_prompts_of_the_others(done: Shrunk) -> None:
    assert done.distillation is not None
    last = f"2 layers dropped, distilled on {done.distillation.after.tokens:,} tokens"
    models = ["whole model", "2 layers dropped", "2 layers dropped, repaired by refit", last]
    prompts = list(dict.fromkeys(one.prompt for one in done.continuations))
    assert [(one.variant, one.prompt) for one in done.continuations] == [(m, p) for m in models for p in prompts]
    stored = Warehouse(f"{done.folder}-warehouse").table("continuations").to_pylist()
    assert len(stored) == len(done.continuations) == 12
    assert {tuple(row["drop"]) for row in stored if row["variant"] == last} == {done.best.plan.drop}


def test_the_table_the_summary_and_the_card_have_the_verdict(done: Shrunk) -> None:
    (row,) = done.table().to_pylist()
    assert row["distilled"] == done.best.kept and row["kept"] == done.curve[0].kept
    assert "distilled on " in done.summary()
    card = (Path(done.folder) / "README.md").read_text()
    for words in ("Repaired by refit", "Distilled from", " distilled, ", "Kept of the whole model on", "% distilled"):
        assert words in card, words


@pytest.mark.usefixtures("warm_workers")
def test_killed_it_goes_on_and_writes_the_same_bytes(done: Shrunk, deep: Path, corpus: Path, tmp_path: Path) -> None:
    """By SIGKILL in the training. Without a terminal, there are lines and no bars."""
    out, warehouse = tmp_path / "out", f"{done.folder}-warehouse"
    arguments = ["shrink", deep, "--corpus", corpus, "-o", out, "-w", warehouse, *OPTIONS, "--distill-tokens", TOKENS]
    killed = Command(*arguments, OMP_NUM_THREADS="1")
    wait_until(lambda: bool([*out.parent.glob("out.part/*/out.part/checkpoints/*/avss_complete")]))
    killed.kill()
    assert not out.exists()
    code, said, told = Command(*arguments, OMP_NUM_THREADS="1").wait()
    assert code == 0, told
    for words in ("repaired by refit", "distilled on 3,072 tokens", "Distilled from"):
        assert words in " ".join(said.split()), words
    assert "evaluating" not in said and "━" not in told
    same, other = files(Path(done.folder)), files(out)
    assert same.keys() == other.keys()
    assert {name for name in same if same[name] != other[name]} <= {"avss_distill.json"}  # it names the folder
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_a_repair_the_pruned_model_is_distilled(done: Shrunk, deep: Path, corpus: Path, tmp_path: Path) -> None:
    """Results as JSON. Files of the user in the folder of the work remain."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").touch()
    options = ["--repair", "none", "-w", f"{done.folder}-warehouse", "--distill-tokens", 640, "--format", "json"]
    told = avss("shrink", deep, "--corpus", corpus, "-o", tmp_path / "out", *options, *OPTIONS)
    assert told.exit_code == 0, told.stderr
    values = json.loads(told.stdout)
    (distilled,) = values["distilled"]
    assert distilled["kept"] == values["kept"] != values["curve"][0]["kept"]
    assert distilled["low"] < distilled["kept"] < distilled["high"]
    assert [path.name for path in (tmp_path / "out.part").iterdir()] == ["mine"]


def test_without_the_option_nothing_is_distilled(done: Shrunk, deep: Path, corpus: Path, tmp_path: Path) -> None:
    options = ["--repair", "none", "-w", f"{done.folder}-warehouse", "--format", "json"]
    told = avss("shrink", deep, "--corpus", corpus, "-o", tmp_path / "out", *options, *OPTIONS)
    values = json.loads(told.stdout)
    assert [*values] == ["output", "bytes", "drop", "kept", "tasks", "curve", "difference", "notes", "continuations"]
    assert "avss_distill.json" not in files(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_training_leaves_the_repaired_checkpoint(
    done: Shrunk, deep: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: Any) -> None:
        raise RunFailed("Training diverged.")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(RunFailed, match=r"checkpoint before distillation is in .*student") as raised:
        shrunk(deep, corpus, tmp_path / "out", warehouse=f"{done.folder}-warehouse")
    assert "avss distill" in str(raised.value.hint)
    assert read_repairs(tmp_path / "out.part" / "student") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"distill_tokens": 0}, "`distill_tokens` must be"),
        ({"repair_corpora": ("x.txt", "x.txt=2")}, "names a text twice"),
        ({"dtype": "float16"}, "float16 cannot be trained in"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    options: dict[str, Any], told: str, deep: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        shrunk(deep, corpus, tmp_path / "out", **options)
    assert not [*tmp_path.iterdir()]


def test_too_little_memory_is_refused_before_any_work(
    deep: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: memory.LIBRARIES)
    with pytest.raises(ConfigError, match=r"needs about .* of memory") as raised:
        shrunk(deep, corpus, tmp_path / "out")
    assert "avss distill" in str(raised.value.hint)
    assert not [*tmp_path.iterdir()]


def test_tasks_on_text_that_is_distilled_on_are_refused(deep: Path, tmp_path: Path) -> None:
    """Without a repair too."""
    lines = [f"Line {i}: {i * 7919 % 6131} and {i * 104729 % 7001} make a pair of numbers." for i in range(900)]
    text, same = tmp_path / "text.txt", tmp_path / "same.txt"
    text.write_text("\n\n".join(lines))
    same.write_text("\n\n".join(lines[40:]))
    rows = {"max_sequences": 40, "sequence_length": 128, "repair": "none", "by": "last"}
    with pytest.raises(ConfigError, match="is text that the smaller model is distilled on"):
        shrunk(deep, text, tmp_path / "out", **rows, tasks=[f"perplexity:{same}"])
