"""`avss shrink`: a model, scored, cut, repaired, evaluated and written in one go; stopped, it goes on.

Tests that need no scores of their own measure in a copy of the warehouse of `done`, which has those of the model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rich.console import Console
from support.checkpoints import checkpoint_at
from support.command_line import as_words, avss, in_one_line, mistake, names_in, succeed
from support.corpora import rows_of, tokenized
from support.experiments import cell_times
from support.families import tiny_model
from support.json_files import write_json_lines
from support.quantized import block_fp8
from support.tables import run_rows, table_rows
from support.texts import sentences
from tasks.test_truthfulqa import QUESTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

import avss_dist
from avss_dist import evaluate
from avss_dist.core.devices import Devices
from avss_dist.core.errors import ConfigError, CorpusError, ModelError, RunFailed
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.distillation import memory
from avss_dist.distillation.curve import CurvePoint, TrainingAdvanced
from avss_dist.distillation.record import read_record
from avss_dist.evaluation import continuations
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.repairs import copies_of
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.plans.choice import PlanError
from avss_dist.plans.seen import read_seen
from avss_dist.pruning.repair.registry import read_repairs
from avss_dist.reports.terminal.shrink import continuation_tables, shrunk_tables
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.requests import RANKED_BY, ShrinkRequest
from avss_dist.runs.local import LocalExecutor
from avss_dist.runs.ray.executor import RayExecutor
from avss_dist.stats.catalog import BLOCK_DISTANCE, GREEDY, SCORES
from avss_dist.studies.evaluate import Evaluation
from avss_dist.studies.shrink_trial import MOST_SCORED, TextSplit, held_out_tasks, split_rows
from avss_dist.studies.shrunk import CandidateResult, Shrunk
from avss_dist.tasks.text_loss import TextLoss
from avss_dist.warehouse.store import Store

Observed = tuple[Shrunk, list[Any]]
Save = Callable[[Any, Path], Path]
TEXT = "builtin:pydoc"
TASK = f"perplexity:{TEXT}"
ROWS = {"max_sequences": 80, "sequence_length": 32, "batch_size": 4, "sequences_per_shard": 4}
READ: dict[str, Any] = {**ROWS, "dtype": "float32", "device": "cpu"}
OPTIONS = [*as_words(READ), "--no-speed", "--repair", "refit", "--repair-corpora", TEXT]
"""The repair is fitted on the text alone: what the model writes itself is tried elsewhere. It is `refit`, as the layers
of these models have learned nothing that others could borrow."""
TOKENS = 12 * 4 * 32


def shrunk(model: Path, out: Path, **options: Any) -> Shrunk:
    corpus = options.get("corpus", TEXT)
    given = {"corpus": corpus, "repair": "refit", "repair_corpora": (corpus,), "speed": False}
    return avss_dist.shrink(model, output=out, **{**given, **READ, **options})


def shrink_command(model: Path, out: Path, *options: object) -> tuple[object, ...]:
    """The words of `avss shrink` that do as `shrunk`."""
    return ("shrink", model, "--corpus", TEXT, "-o", out, *OPTIONS, *options)


@pytest.fixture(scope="module", autouse=True)
def short_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "NEW_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def done(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Shrunk:
    """A quarter of the layers less, by the default criterion."""
    return shrunk(deep, tmp_path_factory.mktemp("shrunk") / "out")


def content(folder: str | Path) -> dict[str, str]:
    """The hash of every file in a folder, by name."""
    hashes = {}
    for file in Path(folder).iterdir():
        digest = hashlib.sha256(file.read_bytes())
        hashes[file.name] = digest.hexdigest()
    return hashes


def values_of(evaluations: Iterable[Evaluation]) -> list[float]:
    return [evaluation.result.value for evaluation in evaluations]


@pytest.fixture
def warehouse(done: Shrunk, tmp_path: Path) -> Path:
    """A copy of the warehouse of `done`, to change."""
    return Path(shutil.copytree(f"{done.folder}-warehouse", tmp_path / "w"))


def test_a_quarter_goes_and_is_repaired(done: Shrunk, deep: Path) -> None:
    """What is said of the written checkpoint is what evaluating it gives, to the bit."""
    plan = done.best.plan
    (task,) = done.best.tasks
    assert len(plan.drop) == 2
    assert plan.why["by"] == "damage"
    assert (done.record and done.record.repair) == "refit"
    whole, pruned, repaired = task.results.values()
    assert task.task == TASK
    assert [*task.results] == ["whole", "pruned", "repaired"]
    assert whole.value < repaired.value < pruned.value
    assert done.best.kept == task.retentions["repaired"].value
    assert task.retentions["repaired"].value > task.retentions["pruned"].value
    (candidate,) = done.curve
    assert len(candidate.plan.drop) == 2
    read = {**READ, "max_sequences": 10}
    again = evaluate([deep, done.folder], tasks=[TASK], warehouse=f"{done.folder}-again", skip_sequences=10, **read)
    assert values_of(again) == [whole.value, repaired.value]
    assert read_repairs(Path(done.folder)) == [done.record]
    card = card_of(done)
    assert "repaired, " in card
    assert "without these layers, " in card
    assert "Repaired by refit" in card


def card_of(shrunken: Shrunk) -> str:
    return Path(shrunken.folder, "README.md").read_text()


def greedy(folder: str | Path, prompt: str, number: int) -> str:
    """The continuation by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    (tokens,) = model.generate(ids, max_new_tokens=number, do_sample=False)
    following = tokens[ids.shape[1] :]
    return str(tokenizer.decode(following, skip_special_tokens=True))


MODELS = ("whole model", "2 layers dropped", "2 layers dropped, repaired by refit")


def texts_of(shrunken: Shrunk) -> list[tuple[str, str]]:
    """Return the model and the prompt of every continuation, in order."""
    return [(row["model"], row["prompt"]) for row in shrunken.continuations]


@pytest.mark.nightly
def test_neurons_are_borrowed_unless_another_repair_is_named(deep: Path, tmp_path: Path) -> None:
    done = avss_dist.shrink(deep, corpus=TEXT, output=tmp_path / "out", repair_corpora=[TEXT], speed=False, **READ)
    assert done.record is not None
    assert done.record.repair == "borrow"
    assert all(cut.error_after <= cut.error_before for cut in done.record.cuts)


def test_models_continue_held_out_text_as_plain_transformers_does(done: Shrunk, deep: Path) -> None:
    """The start of three rows that are evaluated on, by the whole and the written model, and by the pruned one."""
    tokenizer = AutoTokenizer.from_pretrained(deep)
    read = Settings(**ROWS | {"max_sequences": 3, "skip_sequences": 10})
    held_out = plan_text(checkpoint_at(deep), TEXT, read)
    prompts = [tokenizer.decode(row[:16]) for row in rows_of(held_out)]
    assert texts_of(done) == [*product(MODELS, prompts)]
    whole, _, repaired = MODELS
    texts = {(row["prompt"], row["model"]): row["text"] for row in done.continuations}
    for prompt in prompts:
        assert texts[prompt, whole] == greedy(deep, prompt, 6)
        assert texts[prompt, repaired] == greedy(done.folder, prompt, 6)
    assert len(set(texts.values())) > len(prompts)


def test_markup_in_a_text_is_shown_as_text() -> None:
    continuation = {"model": "whole", "prompt": "[red]A\nlist", "text": "[/red] b"}
    (table,) = continuation_tables([continuation])
    printed = StringIO()
    console = Console(file=printed, width=80)
    console.print(FittedTable(table))
    shown = in_one_line(printed.getvalue())
    assert "Greedy continuation of: [red]A list" in shown
    assert "[/red] b" in shown


@pytest.mark.nightly
def test_a_model_that_generates_no_text_is_shrunk_all_the_same(
    done: Shrunk, warehouse: Path, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no generation here")

    monkeypatch.setattr(continuations, "NEW_TOKENS", 5)  # which are not in the warehouse
    monkeypatch.setattr(LanguageModel, "generate", refuse)
    shrunken = shrunk(deep, tmp_path / "out", warehouse=warehouse)
    assert not shrunken.continuations
    assert content(shrunken.folder) == content(done.folder)
    assert "generates no text: no generation here" in "\n".join(shrunken.notes)


def test_every_criterion_has_a_measurement() -> None:
    assert {*RANKED_BY, GREEDY, BLOCK_DISTANCE} == {*SCORES}


def test_the_parts_of_the_text_are_apart(done: Shrunk, deep: Path) -> None:
    """An eighth, at most `MOST_SCORED` rows, is scored on, the next one is evaluated on, the repair reads the rest."""
    assert done.record is not None
    (run,) = run_rows(f"{done.folder}-warehouse")
    assert run["num_sequences"] == 10
    assert done.record.skip_sequences == 20
    assert done.record.max_sequences == 60
    assert done.record.texts[0].rows == 60
    (task,) = done.best.tasks
    assert len(task.results["whole"].samples) == 10
    read = Settings(max_sequences=160, sequence_length=32)
    split = split_rows(checkpoint_at(deep), [RedactedURI(TEXT)], read)
    assert split == TextSplit(scored=MOST_SCORED, evaluated=20, rows=160)


def test_the_checkpoint_keeps_the_texts_that_its_layers_were_chosen_on(done: Shrunk) -> None:
    (text,) = read_seen(Path(done.folder))
    assert text.use == "scores"
    assert text.corpus == TEXT
    assert text.skip_sequences == 0
    assert text.max_sequences == 10


def test_the_checkpoint_is_not_evaluated_on_the_rows_of_its_scores(done: Shrunk, tmp_path: Path) -> None:
    rows = {**READ, "max_sequences": 10}
    with pytest.raises(ConfigError, match="is text that the scores of"):
        evaluate([done.folder], tasks=[TASK], warehouse=tmp_path, **rows)


def task_rows(model: Path, text: Path, split: TextSplit, **options: Any) -> np.ndarray:
    """Return the rows of a task of a model that is shrunk on `TEXT`: the perplexity of a text."""
    request = ShrinkRequest(model, output="out", corpus=TEXT, tasks=[f"perplexity:{text}"], **READ, **options)
    placed = PlacedModel(checkpoint=checkpoint_at(model), settings=request.settings, placement=Placement())
    (planned,) = held_out_tasks(placed, request, split).values()
    rows = [part.shard.input_ids for part in planned.task.parts if isinstance(part, TextLoss)]
    return np.concatenate(rows)


def test_rows_of_an_independent_text_are_not_skipped(tiny_llama: Path, tmp_path: Path) -> None:
    """One of as few rows as are scored on can be evaluated on, and is from its first row on."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(sentences(12, seed=7)))
    split = TextSplit(scored=16, evaluated=8, rows=256)
    rows = task_rows(tiny_llama, other, split)
    whole = rows_of(tokenized(tiny_llama, other, **ROWS))
    assert np.array_equal(rows, whole[:8])


def test_rows_of_the_scored_text_are_skipped_under_another_name(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(60, seed=8)))
    copy = tmp_path / "copy.txt"
    shutil.copy(text, copy)
    split = TextSplit(scored=4, evaluated=8, rows=60)
    repaired_on = {"repair_corpora": [str(text)]}
    plain = task_rows(tiny_llama, text, split, **repaired_on)
    copied = task_rows(tiny_llama, copy, split, **repaired_on)
    unskipped = task_rows(tiny_llama, text, split)
    assert np.array_equal(copied, plain)
    assert not np.array_equal(unskipped, plain)


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_two_workers_do_what_one_process_does(
    done: Shrunk, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one Ray for all steps. Both fit the repair together, so that its last digits are others."""
    init = ray.init
    starts = list[dict[str, Any]]()

    def counted(**options: Any) -> Any:
        starts.append(options)
        return init(**options)

    monkeypatch.setattr(ray, "init", counted)
    shrunken = shrunk(deep, tmp_path / "out", executor="ray", replicas=2)
    assert len(starts) == 1
    assert not ray.is_initialized()
    (task,) = shrunken.best.tasks
    (expected,) = done.best.tasks
    assert shrunken.best.plan.drop == done.best.plan.drop
    assert shrunken.best.plan.why == done.best.plan.why
    assert task.results["pruned"].value == expected.results["pruned"].value
    assert shrunken.best.kept == pytest.approx(done.best.kept, rel=1e-4)


def test_all_workers_that_there_is_room_for_share_the_fit(tmp_path: Path) -> None:
    def at_once(placement: Placement, *, cpus: int, gpus: int, replicas: int | str | None) -> int:
        kind = "cuda" if gpus else "cpu"
        count = gpus or 1
        execution = Execution(executor="ray", replicas=replicas, address="ray://head")
        executor = RayExecutor(execution, Settings(threads=2))
        executor.devices = Devices(
            kind=kind,
            count=count,
            count_of_largest_node=count,
            device_bytes=1,
            host_bytes=1,
            cpus=cpus,
            cpus_of_largest_node=cpus,
            cpus_of_nodes=(cpus, cpus),
        )
        session = EvaluationSession(Store(tmp_path), executor, execution)
        return copies_of(placement, Settings(threads=2), session)

    one_process = Placement()
    on_gpu = Placement(gpus=1)
    assert at_once(one_process, cpus=16, gpus=0, replicas=None) == 1
    assert at_once(one_process, cpus=16, gpus=0, replicas=4) == 4
    assert at_once(one_process, cpus=6, gpus=0, replicas="2..64") == 3
    assert at_once(on_gpu, cpus=64, gpus=8, replicas=None) == 8
    assert at_once(replace(on_gpu, gpus=2), cpus=64, gpus=8, replicas=16) == 4
    assert at_once(one_process, cpus=1, gpus=0, replicas=2) == 1
    local = EvaluationSession(Store(tmp_path), LocalExecutor(Settings(device="cpu")))
    assert copies_of(one_process, Settings(), local) == 1


@pytest.mark.nightly
def test_with_one_layer_more_less_is_kept_than_was_asked_for(
    done: Shrunk, warehouse: Path, deep: Path, tmp_path: Path
) -> None:
    """By bisection, whose steps are shown as a curve. As much is asked for as is kept without two layers."""
    (task,) = done.best.tasks
    keep = task.retentions["pruned"].value
    shrunken = shrunk(deep, tmp_path / "out", keep=keep, repair="none", warehouse=warehouse)
    kept_without = {len(attempt.plan.drop): attempt.kept for attempt in shrunken.curve}
    most = len(shrunken.best.plan.drop)
    assert kept_without[most] >= keep
    assert kept_without[most + 1] < keep
    printed = StringIO()
    Console(file=printed, width=120).print(shrunk_tables(shrunken))
    assert "layers dropped" in printed.getvalue()
    assert "█" in printed.getvalue()


@pytest.mark.nightly
@pytest.mark.parametrize("repair", ["none", "map"])
def test_as_many_layers_go_as_can(repair: str, warehouse: Path, deep: Path, tmp_path: Path) -> None:
    """By bisection: with one more, less is kept than was asked for. What was tried is not tried again."""
    tight = shrunk(deep, tmp_path / "tight", keep=0.9, repair=repair, warehouse=warehouse)
    times = cell_times(warehouse)
    loose = shrunk(deep, tmp_path / "loose", keep=0.3, repair=repair, warehouse=warehouse)
    assert times.items() <= cell_times(warehouse).items()

    def gone(attempt: CandidateResult) -> int:
        return len(attempt.plan.drop)

    for shrunken, keep in ((tight, 0.9), (loose, 0.3)):
        kept_without = {gone(attempt): attempt.kept for attempt in shrunken.curve}
        most = gone(shrunken.best)
        assert list(kept_without) == sorted(kept_without)
        assert kept_without[most] >= keep
        for count, share in kept_without.items():
            if count > most:
                assert share < keep
        assert most == 7 or most + 1 in kept_without
    assert gone(tight.best) <= gone(loose.best)


@pytest.mark.nightly
def test_where_no_layer_can_go_nothing_is_written(warehouse: Path, deep: Path, tmp_path: Path) -> None:
    unwritten = tmp_path / "none"
    with pytest.raises(PlanError, match=r"Without layer \d, the first to go, .* is kept, under 99.9%"):
        shrunk(deep, unwritten, keep=0.999, repair="none", warehouse=warehouse)
    assert not unwritten.exists()


@pytest.mark.nightly
@pytest.mark.parametrize(("by", "repaired"), [("avss", False), ("damage", True), ("loss", True), ("last", True)])
def test_layers_are_chosen_by_a_score_and_repaired_if_others_stand_before_them(
    by: str, repaired: bool, warehouse: Path, deep: Path, tmp_path: Path
) -> None:
    """Where none does, nothing is repaired, and that is no mistake."""
    options = {"last": 6} if by == "avss" else {}
    shrunken = shrunk(deep, tmp_path / "out", by=by, repair="channel", warehouse=warehouse, **options)
    (task,) = shrunken.best.tasks
    assert shrunken.best.plan.why["by"] == by
    assert (shrunken.record is not None) == repaired
    assert ("repaired" in task.results) == repaired
    if not repaired:
        assert shrunken.best.plan.drop == (0, 1)


@pytest.mark.nightly
def test_a_search_repairs_on_enough_text(deep: Path, tmp_path: Path) -> None:
    """Where the rows that scores use are too few for the equations."""
    shrunken = shrunk(deep, tmp_path / "out", by="greedy", repair="map", max_sequences=24)
    assert shrunken.best.plan.why["sequences"] == 3
    assert shrunken.record is not None
    rows = {settings["max_sequences"] for settings in settings_of_fits(tmp_path / "out-warehouse")}
    assert len(rows) == 2
    assert min(rows) > 3
    assert max(rows) == 18


def settings_of_fits(warehouse: Path) -> list[dict[str, Any]]:
    """The settings of the text that each repair was fitted on."""
    settings = []
    for row in table_rows(warehouse, "evaluations"):
        if row["patch"] and row["metric"] == "missing":
            settings.append(json.loads(row["settings"]))
    return settings


@pytest.mark.nightly
def test_greedy_goes_by_what_is_lost_after_the_repair(warehouse: Path, deep: Path, tmp_path: Path) -> None:
    """Every set that it tries is repaired, on text that it is not measured on."""
    shrunken = shrunk(deep, tmp_path / "out", by="greedy", repair="channel", warehouse=warehouse)
    why = shrunken.best.plan.why
    rows = [row for row in table_rows(warehouse, "evaluations") if row["run_id"] == why["evaluation"]]
    losses = {tuple(row["drop"]): row["value"] for row in rows if row["metric"] == "loss"}
    repaired = {tuple(row["drop"]) for row in rows if row["patch"]}
    assert why["sets"] == 4 + 3
    assert len(losses) == 4 + 3
    assert repaired == losses.keys() - {(0,)}
    singles = [drop for drop in losses if len(drop) == 1]
    (first,) = min(singles, key=losses.__getitem__)
    pairs = [drop for drop in losses if len(drop) == 2]
    best = min(pairs, key=losses.__getitem__)
    for drop in pairs:
        assert first in drop
    assert shrunken.best.plan.drop == best
    assert why["loss"] == round(losses[best], 6)
    for settings in settings_of_fits(warehouse):
        assert settings["skip_sequences"] == 20  # after those that are measured
    assert shrunken.record is not None
    assert shrunken.record.removed == shrunken.best.plan.drop


@pytest.mark.nightly
def test_a_search_that_is_repeated_measures_nothing(warehouse: Path, deep: Path, tmp_path: Path) -> None:
    first = shrunk(deep, tmp_path / "first", by="greedy", repair="channel", warehouse=warehouse)
    times = cell_times(warehouse)
    again = shrunk(deep, tmp_path / "again", by="greedy", repair="channel", warehouse=warehouse)
    assert content(again.folder) == content(first.folder)
    assert cell_times(warehouse) == times


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another text."""
    file = tmp_path / "other.txt"
    lines = [f"On day {i} the {i * 7919 % 613} ships of {i * 31 % 97} sailed." for i in range(700)]
    file.write_text("\n\n".join(lines))
    return file


@pytest.mark.nightly
def test_every_domain_is_evaluated(other: Path, warehouse: Path, deep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = succeed(*shrink_command(deep, out, "-w", warehouse, "--repair-corpora", other, "--repair", "channel"))
    printed = in_one_line(told.stdout)
    for text in ("whole model", "2 layers dropped", "repaired by channel", "other.txt", "6 of 8 layers", "kept", "%"):
        assert text in printed
    (record,) = read_repairs(out)
    first, second = record.texts
    assert first.corpus == TEXT
    assert second.corpus == str(other)


@pytest.mark.nightly
def test_tasks_that_are_named_are_the_only_ones(other: Path, warehouse: Path, deep: Path, tmp_path: Path) -> None:
    tasks = ("--tasks", f"perplexity:{other}", "--repair", "none")
    told = succeed(*shrink_command(deep, tmp_path / "out", "-w", warehouse, *tasks))
    assert "other.txt" in told.stdout
    assert "perplexity:builtin" not in told.stdout


@pytest.mark.nightly
def test_the_command_prints_the_curve(warehouse: Path, deep: Path, tmp_path: Path) -> None:
    options = ("--keep", "0.4", "--repair", "none", "--first", 1, "--last", 1, "-w", warehouse)
    told = succeed(*shrink_command(deep, tmp_path / "out", *options))
    assert "layers dropped" in told.stdout
    assert "█" in told.stdout
    assert "repaired" not in told.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"share": 0.25, "keep": 0.9}, "`share` and `keep` are mutually exclusive"),
        ({"share": 1.5}, "`share` must be less than 1"),
        ({"by": "avs"}, "Did you mean 'avss'"),
        ({"sites": ("block",)}, "`sites` has no effect|Unknown|tasks measure nothing"),
        ({"partition": "tensor_parallel"}, "weights where they cannot be changed"),
        ({"max_sequences": 7}, "rows; a part to score on"),
        ({"nonsense": 1}, "Unknown option 'nonsense'"),
        ({"distill_tokens": 0}, "`distill_tokens` must be"),
        ({"distill_tokens": TOKENS, "repair_corpora": ("x.txt", "x.txt=2")}, "names a text twice"),
        ({"distill_tokens": TOKENS, "dtype": "float16"}, "float16 cannot be trained in"),
    ],
)
def test_mistakes(options: dict[str, Any], told: str, deep: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises((ConfigError, CorpusError), match=told):
        shrunk(deep, output, **options)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "is text that the repair is fitted on"),
        (
            {"distill_tokens": TOKENS, "repair": "none", "by": "last"},
            "is text that the smaller model is distilled on",
        ),
    ],
)
def test_text_that_is_fitted_on_is_not_evaluated_on(
    options: dict[str, Any], told: str, deep: Path, tmp_path: Path
) -> None:
    """Under another name too, where rows are long enough to hold a window that begins elsewhere."""
    sentences = [f"Line {i}: {i * 7919 % 6131} and {i * 104729 % 7001} make a pair of numbers." for i in range(300)]
    text = tmp_path / "text.txt"
    same = tmp_path / "same.txt"
    text.write_text("\n\n".join(sentences))
    same.write_text("\n\n".join(sentences[40:]))
    rows = {"max_sequences": 40, "sequence_length": 128, "tasks": [f"perplexity:{same}"]}
    with pytest.raises(ConfigError, match=told):
        shrunk(deep, tmp_path / "out", corpus=text, **rows, **options)


def test_too_little_text_is_refused_before_anything_is_scored(deep: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    told = mistake(*shrink_command(deep, output, "--max-sequences", "9"))
    assert "needs at least 192 tokens to fit to, not 186" in told
    assert "Raise --max-sequences" in told
    assert not list(tmp_path.iterdir())
    short = tmp_path / "short.txt"
    lines = [f"Line {i}: {i * 7919 % 6131} and {i * 104729 % 7001}." for i in range(15)]
    short.write_text("\n\n".join(lines))
    with pytest.raises(CorpusError, match="give longer texts, or choose a `repair` of fewer unknowns"):
        shrunk(deep, tmp_path / "none", corpus=str(short))
    assert not list(tmp_path.glob("none*"))


@pytest.mark.nightly
def test_just_enough_text_is_fitted_to(deep: Path, tmp_path: Path) -> None:
    shrunken = shrunk(deep, tmp_path / "out", max_sequences=10, by="last")
    assert shrunken.record is not None
    (text,) = shrunken.record.texts
    assert text.tokens == 217


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("tiny_bert", "has no head that predicts the next token"),
        ("dbrx", "No layer of .* has an MLP that ends in one linear map, or in those of its routed experts"),
        ("fp8", "as F8_E4M3, quantized or fused: nothing can be added to it"),
        ("linked", "is a link to .*, outside of the checkpoint"),
    ],
)
def test_what_cannot_be_shrunk_is_refused_before_anything_is_scored(
    model: str, told: str, tiny_llama: Path, tiny_bert: Path, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = tmp_path / model
    if model == "tiny_bert":
        folder = tiny_bert
    elif model == "dbrx":
        save_checkpoint(tiny_model("causal", "dbrx"), folder)
    elif model == "fp8":
        block_fp8(tiny_llama, folder)
    else:
        shutil.copytree(tiny_llama, folder)
        (folder / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises((ModelError, PlanError), match=told):
        shrunk(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_paired_text_has_no_parts(deep: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    write_json_lines(file, QUESTIONS * 5)
    output = tmp_path / "out"
    paired = f"truthfulqa:{file}"
    for corpora in (("--corpus", paired), ("--corpus", TEXT, "--repair-corpora", paired)):
        done = mistake("shrink", deep, *corpora, "-o", output, *OPTIONS)
        assert "is paired text" in done
        assert "scoring" not in done
    assert not output.exists()


def test_a_folder_that_is_not_empty_is_refused_first(deep: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(PlanError, match="not empty"):
        shrunk(deep, output)
    assert not (tmp_path / "out-warehouse").exists()


# With a distillation after the repair


@pytest.fixture(scope="module")
def distilled(done: Shrunk, deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """The same with a distillation, in a copy of the warehouse, and its events."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    events = list[Any]()
    shutil.copytree(f"{done.folder}-warehouse", f"{out}-warehouse")
    return shrunk(deep, out, distill_tokens=TOKENS, on_event=events.append), events


@pytest.mark.nightly
def test_the_distilled_checkpoint_is_the_output_and_is_evaluated(
    distilled: Observed, deep: Path, tmp_path: Path
) -> None:
    """Evaluating it again gives the reported values, to the bit. Rows of each use are apart.

    Takes more than 5 seconds, because the first test of this part waits for the one training of the default tier.
    """
    shrunken, events = distilled
    (task,) = shrunken.best.tasks
    record = shrunken.distillation
    folder = Path(shrunken.folder)
    assert record is not None
    assert record == read_record(folder)
    assert record.after.tokens <= TOKENS
    assert [*task.results] == ["whole", "pruned", "repaired", "distilled"]
    assert record.after.loss < record.before.loss
    (candidate,) = shrunken.curve
    assert shrunken.best.kept == task.retentions["distilled"].value
    assert shrunken.best.kept != candidate.kept
    assert candidate.kept == task.retentions["repaired"].value
    assert names_in(folder.parent) == ["out", "out-warehouse"]
    assert shrunken.record is not None
    assert read_repairs(folder) == [shrunken.record]
    rows = {**READ, "max_sequences": 10, "skip_sequences": 10}
    again = evaluate([shrunken.folder], tasks=[TASK], warehouse=tmp_path, base=deep, **rows)
    assert values_of(again) == [task.results["distilled"].value]
    kinds = {type(event) for event in events}
    assert TrainingAdvanced in kinds
    assert CurvePoint in kinds
    evaluated = {row["model"] for row in table_rows(f"{folder}-warehouse", "evaluations")}
    assert evaluated == {str(deep), shrunken.folder}
    (fitted,) = shrunken.record.texts
    assert shrunken.record.skip_sequences == 30
    assert fitted.rows == 50
    text, own = record.texts
    assert record.settings.skip_sequences == 20
    assert text.held_out_rows == 10
    assert text.trained_rows == 50
    assert own.corpus == "self"
    assert own.trained_rows > 0


@pytest.mark.nightly
def test_the_table_the_card_and_the_texts_are_those_of_the_distilled_model(distilled: Observed) -> None:
    shrunken, _ = distilled
    assert shrunken.distillation is not None
    last = f"2 layers dropped, distilled on {shrunken.distillation.after.tokens:,} tokens"
    texts = texts_of(shrunken)
    prompts = dict.fromkeys(prompt for _, prompt in texts)
    assert texts == [*product((*MODELS, last), prompts)]
    (row,) = shrunken.table().to_pylist()
    assert row["distilled"] == shrunken.best.kept
    assert row["kept"] == shrunken.curve[0].kept
    assert "distilled on " in shrunken.summary()
    card = card_of(shrunken)
    for words in ("Repaired by refit", "Distilled from", " distilled, ", "Kept of the whole model on", "% distilled"):
        assert words in card, words


@pytest.mark.nightly
def test_the_card_says_which_rows_were_fitted_and_which_were_evaluated(distilled: Observed) -> None:
    shrunken, _ = distilled
    card = card_of(shrunken)
    for words in ("50 rows after the first 30", "50 rows after the first 30, weight", "10 rows after the first 10"):
        assert words in card, words


@pytest.mark.nightly
def test_the_card_has_the_value_of_the_distilled_model_alone(distilled: Observed) -> None:
    shrunken, _ = distilled
    assert card_of(shrunken).count("Evaluated: ") == len(shrunken.best.tasks)


class Stopped(Exception):
    """A training that is stopped after a step."""


@pytest.mark.nightly
def test_stopped_in_the_training_it_goes_on_and_writes_the_same_bytes(
    distilled: Observed, warehouse: Path, deep: Path, tmp_path: Path
) -> None:
    """After its first checkpoint. Without a terminal, there are lines and no bars."""

    def stop(event: Any) -> None:
        complete = list(tmp_path.glob("out.part/*/out.part/checkpoints/*/avss_complete"))
        if complete and isinstance(event, TrainingAdvanced):
            raise Stopped

    out = tmp_path / "out"
    with pytest.raises(Stopped):
        shrunk(deep, out, warehouse=warehouse, distill_tokens=TOKENS, on_event=stop)
    assert not out.exists()
    told = succeed(*shrink_command(deep, out, "-w", warehouse, "--distill-tokens", TOKENS))
    printed = in_one_line(told.stdout)
    for words in ("repaired by refit", "distilled on ", "Distilled from"):
        assert words in printed
    assert "evaluating" not in told.stdout
    assert "━" not in told.stderr
    shrunken, _ = distilled
    expected = content(shrunken.folder)
    written = content(out)
    assert written.keys() == expected.keys()
    for name, digest in written.items():
        if name != "avss_distill.json":  # it names the folder
            assert digest == expected[name], name
    assert names_in(tmp_path) == ["out", "w"]


@pytest.mark.nightly
def test_without_a_repair_the_pruned_model_is_distilled(warehouse: Path, deep: Path, tmp_path: Path) -> None:
    """Results as JSON. Files of the user in the folder of the work remain."""
    unfinished = tmp_path / "out.part"
    unfinished.mkdir()
    (unfinished / "mine").touch()
    options = ("--repair", "none", "-w", warehouse, "--distill-tokens", 640, "--format", "json")
    told = succeed(*shrink_command(deep, tmp_path / "out", *options))
    values = json.loads(told.stdout)
    (candidate,) = values["curve"]
    (distilled,) = values["distilled"]
    assert distilled["kept"] == values["kept"]
    assert values["kept"] != candidate["kept"]
    assert distilled["low"] < distilled["kept"] < distilled["high"]
    assert names_in(unfinished) == ["mine"]


@pytest.mark.nightly
def test_without_the_option_nothing_is_distilled(warehouse: Path, deep: Path, tmp_path: Path) -> None:
    options = ("--repair", "none", "-w", warehouse, "--format", "json")
    output = tmp_path / "out"
    told = avss(*shrink_command(deep, output, *options))
    values = json.loads(told.stdout)
    assert [*values] == ["output", "bytes", "drop", "kept", "tasks", "curve", "difference", "notes", "continuations"]
    assert "avss_distill.json" not in content(output)
    assert names_in(tmp_path) == ["out", "w"]


@pytest.mark.nightly
def test_a_failed_training_leaves_the_repaired_checkpoint(
    warehouse: Path, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunFailed("Training diverged.")

    monkeypatch.setattr("avss_dist.distillation.trainer.train", fail)
    output = tmp_path / "out"
    with pytest.raises(RunFailed, match=r"checkpoint before distillation is in .*student") as raised:
        shrunk(deep, output, warehouse=warehouse, repair="channel", distill_tokens=TOKENS)
    assert "avss distill" in str(raised.value.hint)
    assert read_repairs(tmp_path / "out.part" / "student")
    assert not output.exists()


def test_too_little_memory_is_refused_before_any_work(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: memory.LIBRARIES)
    with pytest.raises(ConfigError, match=r"needs about .* of memory") as raised:
        shrunk(deep, tmp_path / "out", distill_tokens=TOKENS)
    assert "avss distill" in str(raised.value.hint)
    assert not [*tmp_path.iterdir()]
