"""What a record says of the written checkpoint, and students that training would not help."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.distilling import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

import avss_dist
from avss_dist.core.errors import ConfigError, ModelError, RunFailed
from avss_dist.distillation import trainer
from avss_dist.distillation.curve import KEPT, CurvePoint, best, is_better
from avss_dist.distillation.distill import Distilled
from avss_dist.distillation.events import TrainingAdvanced


def distilled(**options: Any) -> Distilled:
    """Distill with the small options."""
    return avss_dist.distill(**SMALL | options)


def changed_copy(folder: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Copy a checkpoint with changed weights."""
    shutil.copytree(folder, to)
    weights = {name: change(name, value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_record_is_of_the_file_as_it_is_loaded(
    dtype: str, student: Path, teacher: Path, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    """Files of 16 bits: rotary frequencies, which are not in them, are not rounded."""
    stored = changed_copy(student, tmp_path / "stored", lambda _, value: value.to(getattr(torch, dtype)))
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    done = distilled(student=stored, teacher=teacher, corpora=[corpus], watch=[other_corpus], output=tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    rows = torch.tensor(tokenizer(other_corpus.read_text(), add_special_tokens=False)["input_ids"])[:128].reshape(4, 32)
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert done.record.after.perplexity["other.txt"] == pytest.approx(math.exp(loss), rel=2e-6)


def no_steps(event: object) -> None:
    assert not isinstance(event, TrainingAdvanced)


def test_a_student_that_predicts_what_its_teacher_does_is_refused(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    same = changed_copy(teacher, tmp_path / "same", lambda _, value: value)
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"bos_token_id": 3}))  # another revision
    with pytest.raises(ConfigError, match=r"predicts what the teacher does.*before training"):
        distilled(student=same, teacher=teacher, corpora=[corpus], output=tmp_path / "out", on_event=no_steps)


@pytest.mark.parametrize(("broken", "message"), [("student", "The student predicts NaN"), ("teacher", "the teacher")])
def test_a_model_with_nan_is_refused_before_training(
    broken: str, message: str, student: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    models = {"student": student, "teacher": teacher}
    models[broken] = changed_copy(
        models[broken], tmp_path / "nan", lambda name, value: value * math.nan if name == "model.norm.weight" else value
    )
    with pytest.raises(ModelError, match=message):
        distilled(**models, corpora=[corpus], output=tmp_path / "out", on_event=no_steps)


def test_a_checkpoint_that_keeps_less_of_every_text_is_not_written(
    student: Path, teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training lowers the divergence, and half as much of the perplexity is kept after it."""
    measure, factors = trainer.held_out_metrics, iter([1.0])

    def halved(*arguments: Any) -> dict[str, float]:
        factor, metrics = next(factors, 0.5), measure(*arguments)
        return {name: value * (factor if name.startswith(KEPT) else 1) for name, value in metrics.items()}

    monkeypatch.setattr(trainer, "held_out_metrics", halved)
    with pytest.raises(
        RunFailed, match=r"no better.*Kept of the teacher's perplexity before training and after"
    ) as told:
        distilled(student=student, teacher=teacher, corpora=[corpus], output=tmp_path / "out")
    assert "of trained.txt. Nothing was written." in told.value.message
    assert not (tmp_path / "out").exists() and [*(tmp_path / "out.part" / "checkpoints").glob("checkpoint-*")]


def test_the_written_dtype_must_be_better_too(
    student: Path, teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last measurement is that of the rounded weights."""
    measure, factors = trainer.held_out_metrics, iter([1.0, 1.0, 1.0])

    def worse_at_last(*arguments: Any) -> dict[str, float]:
        factor = next(factors, 10.0)
        return {name: value * (factor if name == "eval_loss" else 1) for name, value in measure(*arguments).items()}

    monkeypatch.setattr(trainer, "held_out_metrics", worse_at_last)
    with pytest.raises(RunFailed, match="Nothing was written"):
        distilled(student=student, teacher=teacher, corpora=[corpus], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def points(*values: tuple[float, float, float]) -> Iterator[CurvePoint]:
    """Evaluations of two texts: divergence, and what is kept of each."""
    for number, (loss, a, b) in enumerate(values):
        kept = {"a": a, "b": b}
        yield CurvePoint(step=10 * number, loss=loss, kept=kept, perplexity={}, divergence={})


@pytest.mark.parametrize(
    ("values", "chosen", "better"),
    [
        ([(1.0, 0.5, 0.5), (0.8, 0.6, 0.6), (0.7, 0.4, 0.4)], 10, True),
        ([(1.0, 0.5, 0.5), (0.8, 0.6, 0.6), (0.7, 0.4, 0.6)], 20, True),
        ([(1.0, 0.5, 0.5), (0.8, 0.3, 0.4), (0.7, 0.4, 0.4)], 20, False),
        ([(1.0, 1.3, 1.2), (0.8, 1.1, 1.05)], 10, True),  # a perplexity below the teacher's is not aimed at
        ([(1.0, 0.5, 0.5), (1.1, 0.6, 0.6)], 10, False),
    ],
)
def test_the_best_evaluation_keeps_some_text(
    values: list[tuple[float, float, float]], chosen: int, better: bool
) -> None:
    before, *_ = curve = [*points(*values)]
    lowest = best(curve)
    assert lowest is not None and lowest.step == chosen and is_better(lowest, before) is better


def test_a_limit_on_the_size_of_files_is_told(
    student: Path, teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reports it as an error of its stream, without a number; see ``ulimit -f``."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(RunFailed, match="cannot be written: basic_ios") as told:
        distilled(student=student, teacher=teacher, corpora=[corpus], output=tmp_path / "out")
    assert "ulimit -f" in str(told.value)
