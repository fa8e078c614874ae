"""Text that a model writes itself: as it predicts, the same in every batch and after a stop, as much as is needed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import checkpoint_at, llama
from support.corpora import rows_of
from support.experiments import run_job_in
from support.families import lively
from transformers import AutoModelForCausalLM

import avss_dist
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.corpus.own_text import OwnText
from avss_dist.corpus.seen import REPAIR, SELF, SeenText
from avss_dist.distillation.texts import MOST_ROWS, rows_of_teacher, share_of_teacher
from avss_dist.evaluation import own_text as module
from avss_dist.evaluation.events import CellDone, CellsStarted, CellUnderway, Remark
from avss_dist.evaluation.own_text import OwnTextWriter, rows_of_own_text, start_tokens, writing_obstacle
from avss_dist.evaluation.planned_tasks import earlier_texts
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.plans.plan import Plan
from avss_dist.requests import DistillRequest, ShrinkRequest
from avss_dist.studies.shrink_forecast import forecast_shrinking
from avss_dist.studies.shrink_trial import TextSplit, rows_to_write, with_writable_texts
from avss_dist.tasks import own_text as measuring
from avss_dist.tasks.own_text import random_numbers

SETTINGS = Settings(sequence_length=16, dtype="float32", device="cpu")
TEXT = "builtin:pydoc"
READ: dict[str, Any] = {"sequence_length": 16, "max_sequences": 48, "dtype": "float32", "device": "cpu"}
Save = Callable[[Any, Path], Path]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS_OF_BATCH", {"cpu": 8, "cuda": 8})


@contextmanager
def writer(model: Path, warehouse: Path, on_event: Any = None, **options: Any) -> Iterator[OwnTextWriter]:
    with EvaluationSession.open(warehouse, SETTINGS, on_event=on_event) as session:
        yield OwnTextWriter(session, session.place(checkpoint_at(model)), **options)


def written(model: Path, warehouse: Path, count: int = 16, on_event: Any = None, **options: Any) -> Sequence[str]:
    with writer(model, warehouse, on_event, **options) as own:
        return own.write_texts(count).texts


@pytest.fixture(scope="module")
def texts(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Two batches of eight texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TEXTS_OF_BATCH", {"cpu": 8})
        return written(deep, tmp_path_factory.mktemp("own"))


def test_equal_seeds_write_equal_texts(texts: Sequence[str], deep: Path, tmp_path: Path) -> None:
    assert written(deep, tmp_path) == texts


@pytest.mark.nightly
def test_another_seed_writes_other_texts(texts: Sequence[str], deep: Path, tmp_path: Path) -> None:
    assert not set(written(deep, tmp_path, seed=1)) & set(texts)


def test_texts_differ_from_each_other(texts: Sequence[str]) -> None:
    assert len(set(texts)) == len(texts)


@pytest.mark.nightly
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_number_of_texts_at_once_changes_no_text_in_float32(
    rows: int, texts: Sequence[str], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "rows_at_once", lambda _: rows)
    monkeypatch.setattr(module, "TEXTS_OF_BATCH", {"cpu": 16})
    assert written(deep, tmp_path) == texts


@pytest.mark.nightly
def test_as_many_texts_are_written_at_once_as_there_is_memory_for(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    numbers = measuring.random_numbers

    def noted(seed: int, texts: range, length: int) -> torch.Tensor:
        at_once.append(len(texts))
        return numbers(seed, texts, length)

    monkeypatch.setattr(measuring, "random_numbers", noted)
    monkeypatch.setattr(measuring, "free_memory", lambda _: 80_000)
    written(deep, tmp_path, 8)
    assert at_once == [2, 2, 2, 2]


def test_random_numbers_of_a_text_depend_on_no_other_text() -> None:
    assert torch.equal(random_numbers(3, range(5), 4)[2:], random_numbers(3, range(2, 5), 4))


def test_what_is_stored_is_not_written_again(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(deep, tmp_path)
    monkeypatch.delattr(measuring, "generate_text")
    assert written(deep, tmp_path) == first


def test_a_kill_loses_at_most_one_batch(texts: Sequence[str], deep: Path, tmp_path: Path) -> None:
    def killed(event: object) -> None:
        if isinstance(event, CellDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(deep, tmp_path, on_event=killed)
    started: list[CellsStarted] = []

    def note(event: object) -> None:
        if isinstance(event, CellsStarted):
            started.append(event)

    assert written(deep, tmp_path, on_event=note) == texts
    assert [(len(event.cells), event.done) for event in started] == [(2, 1)]


def test_more_texts_begin_with_those_that_are_there(texts: Sequence[str], deep: Path, tmp_path: Path) -> None:
    written(deep, tmp_path, 3)
    assert written(deep, tmp_path, 16) == texts


@pytest.mark.nightly
def test_a_changed_model_writes_another_text(
    texts: Sequence[str], save_checkpoint: Save, deep: Path, tmp_path: Path
) -> None:
    """In one warehouse. The texts of the first model stay as they are."""
    other = save_checkpoint(lively(llama(seed=7, num_hidden_layers=8)), tmp_path / "other")
    assert written(deep, tmp_path / "w") == texts
    assert not set(written(other, tmp_path / "w")) & set(texts)
    assert written(deep, tmp_path / "w") == texts


def test_rows_are_those_of_as_many_texts_as_that_takes(deep: Path, tmp_path: Path) -> None:
    with writer(deep, tmp_path) as own:
        assert own.read_rows(20, SETTINGS).num_sequences == 20


def test_texts_that_end_early_are_written_in_greater_number(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of a third of a row each."""
    asked: list[int] = []

    def short(self: OwnTextWriter, count: int) -> OwnText:
        asked.append(count)
        return OwnText(("one two",) * count)

    monkeypatch.setattr(OwnTextWriter, "write_texts", short)
    with writer(deep, tmp_path) as own:
        rows = own.read_rows(10, SETTINGS).num_sequences
    assert rows == 10
    assert 10 < asked[-1] <= 80


def test_the_rows_of_a_fit_are_behind_those_that_are_held_out(deep: Path, tmp_path: Path) -> None:
    with writer(deep, tmp_path) as own:
        all_rows = rows_of(own.read_rows(10, SETTINGS))
    with writer(deep, tmp_path, skipped=4) as own:
        assert (rows_of(own.read_rows(6, SETTINGS)) == all_rows[4:]).all()


def test_progress_is_told_within_a_batch_and_the_number_of_texts_before(deep: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    written(deep, tmp_path, 8, events.append)
    shares = [event.share for event in events if isinstance(event, CellUnderway)]
    assert len(shares) == 16
    assert shares == sorted(shares)
    assert isinstance(events[0], Remark)
    assert "writes 8 texts of up to 16 tokens itself" in events[0].text


@pytest.mark.nightly
def test_the_time_is_said_before_once_a_speed_is_known(deep: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    written(deep, tmp_path, 8)
    written(deep, tmp_path, 16, events.append)
    assert "itself first, in about" in events[0].text


# The texts that shrinking fits on


def shrink_request(model: Path, tmp_path: Path, **options: Any) -> ShrinkRequest:
    given: dict[str, Any] = {"corpus": TEXT, "output": str(tmp_path / "out"), "speed": False, **READ, **options}
    return ShrinkRequest(str(model), **given)


def test_shrinking_fits_on_the_given_text_and_as_much_of_its_own(deep: Path, tmp_path: Path) -> None:
    done = avss_dist.shrink(deep, corpus=TEXT, output=tmp_path / "out", repair="channel", speed=False, **READ)
    assert done.record is not None
    given, own = done.record.texts
    assert (given.corpus, own.corpus) == (TEXT, SELF)
    assert own.rows == given.rows
    (task,) = done.best.tasks
    assert task.task == f"perplexity:{TEXT}"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"text that the whole model wrote ({own.tokens:,} tokens of the first {own.rows} rows)" in card


def test_named_texts_are_taken_as_they_are_named(deep: Path, tmp_path: Path) -> None:
    request = shrink_request(deep, tmp_path, repair_corpora=("x.txt",))
    assert request.weighted_repair_texts == ("x.txt",)


def test_own_text_is_not_among_the_texts_that_are_divided(deep: Path, tmp_path: Path) -> None:
    assert shrink_request(deep, tmp_path, repair_corpora=("x.txt", "self=2")).texts == [TEXT, "x.txt"]


def test_no_text_is_written_for_other_texts_alone(deep: Path, tmp_path: Path) -> None:
    request = shrink_request(deep, tmp_path, repair_corpora=("x.txt",))
    assert rows_to_write([], request, TextSplit(scored=1, evaluated=1, rows=10)) == 0


@pytest.mark.nightly
def test_a_streamed_model_is_fitted_on_the_given_text_alone_and_that_is_said(deep: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, Remark):
            notes.append(event.text)

    options: dict[str, Any] = {"repair": "channel", "partition": "streaming", "speed": False, **READ}
    done = avss_dist.shrink(deep, corpus=TEXT, output=tmp_path / "out", on_event=note, **options)
    assert done.record is not None
    assert [text.corpus for text in done.record.texts] == [TEXT]
    (told,) = [text for text in notes if "text that the model writes" in text]
    assert told in done.notes


@pytest.mark.parametrize("partition", ["streaming", "fsdp", "tensor_parallel"])
def test_own_text_that_is_named_is_refused_where_the_model_is_not_whole(
    partition: str, deep: Path, tmp_path: Path
) -> None:
    with EvaluationSession.open(tmp_path, SETTINGS) as session:
        model = replace(session.place(checkpoint_at(deep)), placement=Placement(partition=partition))
    with pytest.raises(ConfigError, match="`repair_corpora` self: `partition`"):
        with_writable_texts(shrink_request(deep, tmp_path, repair_corpora=("self",)), model)


def test_a_model_whose_tokenizer_has_no_start_is_fitted_on_the_given_text_alone(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "start_tokens", lambda _: [])
    with EvaluationSession.open(tmp_path, SETTINGS) as session:
        model = session.place(checkpoint_at(deep))
    assert "has no token to begin a text with" in str(writing_obstacle(model))


@pytest.mark.nightly
def test_a_model_that_generates_nothing_is_fitted_on_the_given_text_alone(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> torch.Tensor:
        raise ModelError("It generates no text.", "")

    monkeypatch.setattr(measuring, "generate_text", failing)
    done = avss_dist.shrink(deep, corpus=TEXT, output=tmp_path / "out", repair="channel", speed=False, **READ)
    assert done.record is not None
    assert [text.corpus for text in done.record.texts] == [TEXT]


@pytest.mark.nightly
def test_a_dry_run_has_a_step_for_the_text(deep: Path, tmp_path: Path) -> None:
    forecast = forecast_shrinking(shrink_request(deep, tmp_path, repair="channel"))
    (step,) = [step for step in forecast.steps if step.step == "text that the model writes itself"]
    assert (step.evaluations, step.stored, step.tokens) == (5, 0, 5 * 8 * 16)


def test_a_dry_run_with_a_distillation_has_all_rows_that_the_model_writes(deep: Path, tmp_path: Path) -> None:
    """A row is watched. Half of what is trained on are other rows: 20 of 16 tokens."""
    forecast = forecast_shrinking(shrink_request(deep, tmp_path, repair="channel", distill_tokens=20 * 2 * 16))
    (step,) = [step for step in forecast.steps if step.step == "text that the model writes itself"]
    assert step.tokens >= (20 + 1) * 16


def test_without_other_text_as_many_rows_are_read_as_are_allowed() -> None:
    assert rows_of_own_text([], 7) == 7


def test_own_text_is_held_out_from_nothing(deep: Path) -> None:
    seen = SeenText(use=REPAIR, by="x", corpus=SELF, sequence_length=16)
    assert not earlier_texts([seen], checkpoint_at(deep))


# Other commands


@pytest.mark.nightly
def test_pruning_and_distillation_read_one_text(
    deep: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written once, and kept in the user's cache without a warehouse."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan = Plan(model=str(deep), num_layers=8, layers="layers", drop=(2,))
    options: dict[str, Any] = {**READ, "repair": "channel"}
    done = avss_dist.prune(deep, plan, output=tmp_path / "out", repair_corpora=[TEXT, "self=0.5"], **options)
    assert done.repair is not None
    assert [(text.rows, text.weight) for text in done.repair.texts] == [(48, 1.0), (48, 0.5)]
    monkeypatch.delattr(measuring, "generate_text")
    training: dict[str, Any] = {"sequence_length": 16, "dtype": "float32", "device": "cpu", "held_out": 4}
    training |= {"tokens": 4 * 4 * 16, "learning_rate": 1e-3, "warmup": 1, "evaluations": 1}
    result = avss_dist.distill(tmp_path / "out", teacher=deep, corpora=[corpus], output=tmp_path / "done", **training)
    trained = {text.corpus: text.trained_rows for text in result.record.texts}
    assert trained[SELF] == 8


def distillation(**options: Any) -> DistillRequest:
    return DistillRequest("student", **{"teacher": "teacher", "output": "out", "held_out": 4, **options})


def test_the_rows_of_the_teacher_follow_the_tokens() -> None:
    request = distillation(tokens=1600)
    assert rows_of_teacher(request, SETTINGS, 0.5) == 4 + 50


def test_a_long_training_draws_rows_of_the_teacher_again() -> None:
    request = distillation(tokens=1e9)
    assert rows_of_teacher(request, SETTINGS, 0.5) == 4 + MOST_ROWS


def test_the_share_of_the_teacher_is_its_weight() -> None:
    assert share_of_teacher(distillation(corpora=("self=3",)), []) == 1.0


JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["builtin:pydoc"]
settings: {{max_sequences: 8, sequence_length: 16, dtype: float32, device: cpu}}
experiment:
  tasks: ["perplexity:builtin:pydoc"]
  scores: [avss]
  shares: [0.25]
  random: 0
  reversed: false
  leave_one_out: false
  repairs: [channel]
  repair_corpora: ["self=0.5"]
  repair_max_sequences: 12
  max_sequences: 8
  skip_sequences: 72
"""


@pytest.mark.nightly
def test_an_experiment_repairs_on_own_text(deep: Path, tmp_path: Path) -> None:
    _, rows = run_job_in(tmp_path, JOB, deep)
    assert {row["repair"] for row in rows} == {None, "channel"}


# Sampling


@pytest.mark.nightly
def test_tokens_are_drawn_as_the_model_predicts_them(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, whatever its generation_config.json says: as often as softmax of the logits, but for chance."""
    monkeypatch.setattr(module, "TEXTS_OF_BATCH", {"cpu": 1000})
    folder = tmp_path / "greedy"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "temperature": 0.01}')
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = load_tokenizer(checkpoint_at(tiny_llama))
    with torch.no_grad():
        expected = model(torch.tensor([start_tokens(tokenizer)])).logits[0, -1].softmax(-1)
    share: Counter[str] = Counter()
    for token, probability in enumerate(expected.tolist()):
        word = tokenizer.decode([token], skip_special_tokens=True)
        share[word] += probability
    count = 4000
    one_token = Settings(sequence_length=1, dtype="float32", device="cpu")
    with EvaluationSession.open(tmp_path / "w", one_token, Execution()) as session:
        own = OwnTextWriter(session, session.place(checkpoint_at(folder)))
        seen = Counter(own.write_texts(count).texts)
    for word, wanted in share.items():
        if word.strip():
            difference = abs(seen[word] / count - wanted)
            assert difference < 5 * (wanted / count) ** 0.5 + 1e-3
    assert len(seen) > 20
