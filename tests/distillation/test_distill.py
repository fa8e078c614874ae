"""Distilled checkpoints: closer to their teacher, plain, recorded; refusals, students that training would not help."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import checkpoint_at, config_in, llama, weights_in
from support.command_line import avss, files, mistake, succeed
from support.distilling import SMALL
from support.events import events_of
from support.json_files import write_json
from support.pairs import write_pairs
from support.tiers import nightly
from transformers import AutoModelForCausalLM, AutoTokenizer

import avss_dist
from avss_dist.core import devices
from avss_dist.core.errors import AvssError, ConfigError, ModelError, RunFailed
from avss_dist.corpus.seen import SeenText
from avss_dist.distillation import memory, trainer
from avss_dist.distillation.curve import KEPT, CurvePoint, History, TrainingAdvanced
from avss_dist.distillation.distill import Distilled
from avss_dist.distillation.loss import distillation_loss
from avss_dist.distillation.pair import default_learning_rate, write_distilled
from avss_dist.distillation.record import read_record, write_card
from avss_dist.plans.seen import read_seen, write_seen
from avss_dist.reports.terminal.shrink import distilled_table
from avss_dist.requests import DistillRequest

Distill = Callable[..., Distilled]
Observed = tuple[Distilled, list[Any]]
TOKENS = 4 * 32  # of a step
OPTIONS: dict[str, Any] = {**SMALL, "tokens": 10 * TOKENS}


@pytest.fixture
def distill(student: Path, teacher: Path, corpus: Path, tmp_path: Path) -> Distill:
    """Distill the tiny student into ``tmp_path / "out"``, with options in place of the small ones."""

    def run(**options: Any) -> Distilled:
        given = {"student": student, "teacher": teacher, "corpora": [corpus], "output": tmp_path / "out", **OPTIONS}
        return avss_dist.distill(**given | options)

    return run


@pytest.fixture(scope="module")
def distilled(
    student: Path, teacher: Path, corpus: Path, other_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Observed:
    """One distillation on a text and on the teacher's own, with another text watched; and its events."""
    events: list[Any] = []
    done = avss_dist.distill(
        student=student,
        teacher=teacher,
        corpora=[f"{corpus}=3"],
        watch=[other_corpus],
        output=tmp_path_factory.mktemp("distilled") / "out",
        on_event=events.append,
        **OPTIONS | {"self_texts": 40},
    )
    return done, events


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return weights_in(Path(folder))


def advanced(events: list[Any]) -> list[int]:
    """The tokens of a training that events tell of, step by step."""
    return [event.tokens for event in events_of(TrainingAdvanced, events)]


def tokens_after(*steps: int) -> list[int]:
    return [TOKENS * step for step in steps]


def changed(before: Path, after: Path | str) -> set[str]:
    """Names of the tensors that differ between two checkpoints."""
    old = weights_of(before)
    new = weights_of(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


# The result


@pytest.mark.nightly
def test_the_default_learning_rate_is_in_proportion_to_the_weights_and_the_root_of_the_rows(
    distill: Distill, student: Path, tmp_path: Path
) -> None:
    matrices = [tensor for tensor in weights_of(student).values() if tensor.ndim > 1]
    sizes = [matrix.square().mean().sqrt().item() for matrix in matrices]
    rate = default_learning_rate(checkpoint_at(student), "all", 4)
    assert rate == pytest.approx(1.5e-3 * float(np.median(sizes)), rel=0.05)
    assert default_learning_rate(checkpoint_at(student), "all", 1) == pytest.approx(rate / 2, rel=0.05)

    larger = checkpoint_at(changed_copy(student, tmp_path / "larger", lambda _, value: value * 8))
    assert default_learning_rate(larger, "all", 4) == pytest.approx(8 * rate, rel=0.05)
    assert default_learning_rate(larger, "lora", 4) == pytest.approx(40 / 1.5 * rate, rel=0.05)

    done = distill(learning_rate=None)
    assert done.record.learning_rate == rate


def test_the_learning_rate_rises_in_a_tenth_of_the_steps_and_falls_to_zero(
    distill: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trainer.train
    histories = []

    def observed_train(*arguments: Any) -> History:
        history = train(*arguments)
        histories.append(history)
        return history

    monkeypatch.setattr(trainer, "train", observed_train)
    done = distill(tokens=20 * TOKENS, warmup=None)
    assert done.record.warmup == 2
    (history,) = histories
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    expected = [*np.linspace(0, 3e-3, 2, endpoint=False), *np.linspace(3e-3, 0, 18, endpoint=False)]
    assert rates == pytest.approx(expected)


def test_a_step_has_a_row_for_each_rank_by_default(distill: Distill) -> None:
    record = distill(batch_size=None, tokens=20 * 32).record
    assert (record.batch_size, record.steps) == (1, 20)
    two_ranks = DistillRequest("student", teacher="teacher", output="out", ranks=2)
    assert (two_ranks.step_rows, two_ranks.rows) == (2, 1)


def test_a_student_comes_closer_to_its_teacher(distilled: Observed, student: Path) -> None:
    done, events = distilled
    record = done.record
    folder = Path(done.folder)
    assert record.after.loss < 0.95 * record.before.loss
    assert {text.label: text.weight for text in record.texts} == {"trained.txt": 3, "self": 1, "other.txt": 0}
    for text in record.texts:
        assert (text.trained_rows > 0) == (text.weight > 0)
    assert [point.step for point in record.curve] == [0, 5, 10, 10]
    assert record.before.train_loss is None
    assert record.curve[1].train_loss is not None
    for text in record.texts:
        kept = text.teacher_perplexity / record.after.perplexity[text.label]
        assert record.after.kept[text.label] == pytest.approx(kept)
    weighted = 0.75 * record.after.divergence["trained.txt"] + 0.25 * record.after.divergence["self"]
    assert record.after.loss == pytest.approx(weighted)
    assert read_record(folder) == record
    assert done.table().num_rows == len(record.curve) * 3
    assert advanced(events) == tokens_after(*range(1, 11))
    assert len(events_of(CurvePoint, events)) == 3
    assert not folder.with_name("out.part").exists()
    assert done.notes == ()
    card = (folder / "README.md").read_text()
    card_of_student = (student / "README.md").read_text()
    assert card.startswith(card_of_student[:200])
    assert "Distilled from" in card
    assert {"config.json", "tokenizer.json", "avss_distill.json"} <= files(folder).keys()
    assert (folder / "config.json").read_bytes() == (student / "config.json").read_bytes()


def test_the_written_checkpoint_is_what_the_last_point_measured(
    distilled: Observed, teacher: Path, other_corpus: Path
) -> None:
    """Plain transformers opens it, and finds the divergence from the teacher that the record has."""
    done, _ = distilled
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    ids = tokenizer(other_corpus.read_text(), add_special_tokens=False, return_tensors="pt").input_ids
    rows = ids[0, : 4 * 32].reshape(4, 32)

    def loss_of(folder: Path | str) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return float(model(input_ids=rows, labels=rows).loss)

    student = loss_of(done.folder)
    rise = student - loss_of(teacher)
    after = done.record.after
    assert after.perplexity["other.txt"] == pytest.approx(math.exp(student), rel=1e-4)
    assert after.kept["other.txt"] == pytest.approx(math.exp(-rise), rel=1e-4)


@pytest.mark.nightly
def test_what_is_trained_and_the_memory_that_it_takes(
    distill: Distill, distilled: Observed, student: Path, tmp_path: Path
) -> None:
    """The tied embedding stays as it is."""
    layers = {name for name in weights_of(student) if ".layers." in name}
    lora_folder = tmp_path / "lora"
    lora = distill(train="lora", lora_rank=4, tokens=8 * TOKENS, learning_rate=1e-2, output=lora_folder)
    whole, _ = distilled
    assert changed(student, whole.folder) == layers | {"model.norm.weight"}
    assert changed(student, lora.folder) == {name for name in layers if "_proj." in name}
    record = lora.record
    assert record.lora_rank == 4
    assert record.after.loss < record.before.loss
    assert not list(lora_folder.glob("adapter*"))
    assert whole.memory.trained > lora.memory.trained
    for estimate in (whole.memory, lora.memory):
        assert estimate.parts["gradients"] == 4 * estimate.trained
        assert estimate.parts["optimizer"] == 8 * estimate.trained
    numbers = [tensor.numel() for tensor in weights_of(whole.folder).values()]
    assert whole.memory.parts["student"] == 4 * sum(numbers)


# Endings


@pytest.mark.nightly
def test_the_checkpoint_of_the_lowest_held_out_loss_is_written(distill: Distill, tmp_path: Path) -> None:
    """With few rows, which are learned by heart, the best checkpoint is an early one."""
    done = distill(max_sequences=7, tokens=200 * 128, evaluations=50, learning_rate=2e-3)
    assert done.record.ended == "complete"
    assert done.record.steps < 200
    losses = [point.loss for point in done.record.curve]
    assert losses[-1] == pytest.approx(min(losses), rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{done.record.after.tokens:,} tokens of 25,600, after which held-out loss was lowest" in card


def test_a_training_that_diverges_writes_its_best_checkpoint(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From step 8 the loss is not a number; the checkpoint before is that of step 5."""
    steps = []

    def fail(*arguments: Any) -> torch.Tensor:
        loss = distillation_loss(*arguments)
        steps.append(loss)
        if len(steps) >= 8:
            return loss * torch.nan
        return loss

    monkeypatch.setattr(trainer, "distillation_loss", fail)
    with pytest.raises(RunFailed, match=r"diverged.*best checkpoint.*of 640 tokens.*out") as caught:
        distill()
    assert caught.value.exit_code == 1
    assert len(steps) == 8
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.ended == "diverged"
    assert record.steps == 5
    assert record.after.loss < record.before.loss
    assert not (tmp_path / "out.part").exists()


def test_a_training_that_gains_nothing_writes_nothing(distill: Distill, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="Nothing was written") as caught:
        distill(learning_rate=1e4, warmup=0)
    assert caught.value.exit_code == 1
    assert "learning_rate" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_full_disk_keeps_what_is_complete_and_the_same_request_resumes(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same bytes as of a training that nothing interrupts."""
    written = []
    save = trainer.DistillationTrainer.save_model

    def fill(self: Any, folder: str, *args: Any, **options: Any) -> None:
        if written:
            raise OSError(28, "No space left on device", folder)
        written.append(folder)
        save(self, folder, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.DistillationTrainer, "save_model", fill)
        with pytest.raises(AvssError, match="no space left") as caught:
            distill()
    assert caught.value.exit_code == 1
    complete = trainer.last_checkpoint(tmp_path / "out.part" / "checkpoints")
    assert complete is not None
    assert complete.name == "checkpoint-5"
    resumed: list[Any] = []
    distill(on_event=resumed.append)
    assert advanced(resumed) == tokens_after(6, 7, 8, 9, 10)
    whole = tmp_path / "whole"
    distill(output=whole)
    assert files(tmp_path / "out") == files(whole)


# Refusals


def refused(distill: Distill, match: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        distill(**options)
    assert caught.value.exit_code == 2


def test_requests_that_cannot_be_are_refused(
    distill: Distill, student: Path, corpus: Path, save_checkpoint: Callable[[Any, Path], Path], tmp_path: Path
) -> None:
    wider = save_checkpoint(llama(vocab_size=384), tmp_path / "wider")
    refused(distill, "different vocabularies: 320 and 384 logits", teacher=wider)
    assert not (tmp_path / "out.part").exists()
    refused(distill, "no text to train on", corpora=())
    refused(distill, "names a text twice", corpora=[corpus, f"{corpus}=2"])


def test_too_little_memory_is_refused_before_loading(
    distill: Distill, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory of a rank counts for all ranks of this machine."""
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000_000)
    refused(distill, r"`train` all needs about .* of memory: .*optimizer")
    monkeypatch.setattr(devices, "available_memory", lambda: 600_000_000)
    refused(distill, r"needs about .* of memory.*exchange.*There are 300 MB", ranks=2)
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 3}, "`batch_size` 4 cannot be divided among 3 `ranks`.*such as 6"),
        ({"sharding": "zero3"}, "`sharding` zero3 divides nothing with one rank"),
        ({"address": "127.0.0.1:6379"}, "`address` has no effect with one rank"),
        ({"ranks": 512, "batch_size": 512}, "`ranks` 512 need 512 CPUs; there are"),
        ({"ranks": 2, "sharding": "zero"}, "zero1"),
        ({"ranks": 2, "sharding": "fsdp", "dtype": "bfloat16"}, "`sharding` fsdp computes in float32 on CPUs"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    distill: Distill, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    refused(distill, f"(?s){words}", **options)
    assert not (tmp_path / "out.part").exists()


@pytest.mark.nightly
def test_paired_text_can_only_be_watched(distill: Distill, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, 20)
    refused(distill, "paired text", corpora=[pairs])
    done = distill(watch=[pairs], sequence_length=48, held_out=8)
    assert done.record.texts[1].held_out_rows == 8


def test_watched_text_that_is_trained_on_is_refused(distill: Distill, corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_text().split("\n")
    same = tmp_path / "same.txt"
    same.write_text("\n".join(reversed(lines[100:])))
    told = r"of the held-out rows of .*same.txt is text that is trained on"
    refused(distill, told, watch=[same], held_out=16)
    done = distill(watch=[same], held_out=16, allow_overlap=True, tokens=2 * TOKENS)
    assert done.record.texts[1].label == "same.txt"


@pytest.mark.nightly
def test_a_student_without_a_common_ancestor_is_distilled_and_noted(distill: Distill, tiny_llama: Path) -> None:
    done = distill(student=tiny_llama, tokens=4 * TOKENS)
    assert "Nothing says that" in done.notes[0]


def test_a_folder_of_another_request_is_not_resumed(distill: Distill, tmp_path: Path) -> None:
    unfinished = tmp_path / "out.part"
    unfinished.mkdir()
    (unfinished / "checkpoints").mkdir()
    write_json(unfinished / "request.json", {"seed": 3, "train": "lora"})
    refused(distill, r"out.part was begun with other values of .*seed")


def test_text_that_has_changed_is_not_resumed(
    distill: Distill, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(corpus, text)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Mix", None)
        with pytest.raises(TypeError):
            distill(corpora=[text])
    text.write_text(corpus.read_text().upper())
    refused(distill, r"text of text.txt has changed", corpora=[text])


@pytest.mark.nightly
def test_trained_text_is_not_held_out_from_an_evaluation(
    distilled: Observed, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    folder = distilled[0].folder
    evaluate = ["evaluate", folder, "-w", tmp_path / "warehouse", "--sequence-length", 32, "--device", "cpu"]
    assert "was distilled on" in mistake(*evaluate, "--tasks", f"perplexity:{corpus}", "--skip-sequences", 8)
    assert avss(*evaluate, "--tasks", f"perplexity:{other_corpus}").exit_code == 0


def test_text_of_an_earlier_distillation_is_not_held_out(
    distill: Distill, distilled: Observed, corpus: Path, other_corpus: Path
) -> None:
    told = rf"of the held-out rows of .*{corpus.name} is text that .* was distilled on"
    refused(distill, told, student=distilled[0].folder, corpora=[other_corpus], watch=[corpus], held_out=16)


def test_a_student_keeps_what_was_read_for_it(distilled: Observed, tmp_path: Path) -> None:
    """The texts of its plan, and those of an earlier distillation, whose record is replaced."""
    folder = Path(shutil.copytree(distilled[0].folder, tmp_path / "student"))
    write_seen(folder, [SeenText(use="scores", by="a-1", corpus="scored.txt")])
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = tmp_path / "out"
    write_distilled(checkpoint_at(folder), model, output, distilled[0].record)
    assert [text.use for text in read_seen(output)] == ["scores", "distillation"]


def test_the_command_prints_a_table_or_json(
    student: Path, teacher: Path, corpus: Path, other_corpus: Path, tmp_path: Path
) -> None:
    arguments = ["distill", student, "--teacher", teacher, "--corpora", corpus, "--watch", other_corpus]
    arguments += ["--sequence-length", 32, "--tokens", "5e2", "--self-texts", 0, "--held-out", 4, "--device", "cpu"]
    shown = succeed(*arguments, "-o", tmp_path / "table")
    assert "trained.txt" in shown.stdout
    assert "other.txt, watched" in shown.stdout
    assert "Distilled from" in shown.stdout
    assert "tokens: kept" in shown.stderr
    values = json.loads(avss(*arguments, "-o", tmp_path / "json", "--format", "json", "-q").stdout)
    assert values["curve"][0]["tokens"] == 0
    assert values["output"] == str(tmp_path / "json")


def test_the_last_evaluation_is_named_as_that_of_the_written_checkpoint(distilled: Observed) -> None:
    """It has as many tokens as the best one of the training."""
    rows = distilled[0].table().to_pylist()
    last = {row["tokens"] for row in rows if row["as_written"]}
    assert last == {distilled[0].record.after.tokens}
    table = distilled_table(distilled[0])
    (tokens, *_) = table.value_columns
    assert tokens.text(table.rows[-1].values[tokens.key]) == f"{distilled[0].record.after.tokens:,}, as written"


def test_lines_on_a_distillation_say_which_rows_were_trained_on_and_held_out(distilled: Observed) -> None:
    record = distilled[0].record
    text, own, watched = record.texts
    first, trained, of_own, of_watched = record.describe()
    assert f"{text.trained_rows} rows after the first {text.held_out_rows}, weight 3" in first
    assert f"(the first {text.held_out_rows} rows, not trained on)" in trained
    assert f"self (the first {own.held_out_rows} rows, not trained on)" in of_own
    assert f"(the first {watched.held_out_rows} rows, not trained on, nor any of this text)" in of_watched


@pytest.mark.parametrize(
    ("evaluated", "lines"),
    [
        ((), ["Evaluated before distillation: t: acc 0.5, 0.6 of the whole model."]),
        (("Evaluated: t: acc 0.55 distilled.",), ["Evaluated: t: acc 0.55 distilled."]),
    ],
    ids=["not evaluated", "evaluated"],
)
def test_the_card_of_a_distilled_model_has_no_value_of_the_student_as_its_own(
    distilled: Observed, tmp_path: Path, evaluated: tuple[str, ...], lines: list[str]
) -> None:
    student = tmp_path / "student"
    folder = tmp_path / "distilled"
    student.mkdir()
    folder.mkdir()
    card = "# m\n\n- Finding: f.\n- Evaluated: t: acc 0.5, 0.6 of the whole model.\n\nWritten by avss_dist.\n"
    (student / "README.md").write_text(card)
    write_card(student, folder, distilled[0].record, evaluated)
    written = (folder / "README.md").read_text()
    assert [line[2:] for line in written.splitlines() if line.startswith("- Evaluated")] == lines


# What training would not help, and what is written


def changed_copy(folder: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Copy a checkpoint with changed weights."""
    shutil.copytree(folder, to)
    weights = {name: change(name, value) for name, value in weights_of(folder).items()}
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("dtype", ["bfloat16", *nightly("float16")])
def test_the_record_is_of_the_file_as_it_is_loaded(
    dtype: str, distill: Distill, student: Path, other_corpus: Path, tmp_path: Path
) -> None:
    """Files of 16 bits: rotary frequencies, which are not in them, are not rounded."""
    stored = changed_copy(student, tmp_path / "stored", lambda _, value: value.to(getattr(torch, dtype)))
    config = config_in(stored)
    write_json(stored / "config.json", config | {"dtype": dtype})
    done = distill(student=stored, watch=[other_corpus])
    assert {value.dtype for value in weights_of(done.folder).values()} == {getattr(torch, dtype)}
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    rows = torch.tensor(tokenizer(other_corpus.read_text(), add_special_tokens=False)["input_ids"])[:128].reshape(4, 32)
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert done.record.after.perplexity["other.txt"] == pytest.approx(math.exp(loss), rel=2e-6)


def no_steps(event: object) -> None:
    assert not isinstance(event, TrainingAdvanced)


def test_a_student_that_predicts_what_its_teacher_does_is_refused(
    distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    same = changed_copy(teacher, tmp_path / "same", lambda _, value: value)
    config = config_in(same)
    write_json(same / "config.json", config | {"bos_token_id": 3})  # another revision
    refused(distill, r"predicts what the teacher does.*before training", student=same, on_event=no_steps)


@pytest.mark.parametrize(("broken", "message"), [("student", "The student predicts NaN"), ("teacher", "the teacher")])
def test_a_model_with_nan_is_refused_before_training(
    broken: str, message: str, distill: Distill, student: Path, teacher: Path, tmp_path: Path
) -> None:
    model = {"student": student, "teacher": teacher}[broken]
    broken_copy = changed_copy(
        model, tmp_path / "nan", lambda name, value: value * math.nan if name == "model.norm.weight" else value
    )
    with pytest.raises(ModelError, match=message):
        distill(**{broken: broken_copy}, on_event=no_steps)


@pytest.mark.parametrize(
    "case",
    [
        (KEPT, 1, 0.5, "no better.*Kept of the teacher's perplexity before training and after.*trained.txt. Nothing"),
        ("eval_loss", 3, 10.0, "Nothing was written"),  # the last measurement is that of the rounded weights
    ],
)
def test_a_checkpoint_that_keeps_less_of_every_text_or_is_worse_as_written_is_not_written(
    case: tuple[str, int, float, str], distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training lowers the divergence; a metric is worse by a factor after its first measurements."""
    metric, first, factor, message = case
    measure = trainer.held_out_metrics
    factors = iter([1.0] * first)

    def worse(*arguments: Any) -> dict[str, float]:
        times = next(factors, factor)
        return {k: value * (times if k.startswith(metric) else 1) for k, value in measure(*arguments).items()}

    monkeypatch.setattr(trainer, "held_out_metrics", worse)
    with pytest.raises(RunFailed, match=f"(?s){message}"):
        distill()
    assert not (tmp_path / "out").exists()
    assert [*(tmp_path / "out.part" / "checkpoints").glob("checkpoint-*")]


def test_a_limit_on_the_size_of_files_is_told(
    distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reports it as an error of its stream, without a number; see ``ulimit -f``."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(RunFailed, match="cannot be written: basic_ios") as told:
        distill()
    assert "ulimit -f" in str(told.value)
