"""Evaluation: padding and starts of rows, plans and checkpoints beside their whole model, and text that was seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from support.checkpoints import checkpoint_at, host_limit, llama
from support.command_line import as_words, avss, files, mistake, succeed
from support.experiments import cell_times
from support.rows import only_row, where
from support.tables import assert_same_evaluations, evaluation_rows, table_rows
from support.texts import SAME, TEXT, sentences
from support.tiers import nightly
from support.word_tokenizers import word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from avss_dist import ablate, evaluate, score
from avss_dist.analysis.findings import findings
from avss_dist.core.errors import AvssError, ConfigError, CorpusError
from avss_dist.core.settings import Settings
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.planned_tasks import earlier_texts, plan_task, refuse_overlap
from avss_dist.partition.placement import Placement
from avss_dist.plans.plan import Plan, read_plan
from avss_dist.plans.seen import seen_by_run
from avss_dist.pruning.checkpoint import prune, pruned_from
from avss_dist.studies.evaluate import Evaluation
from avss_dist.tasks.task import Task
from avss_dist.warehouse.names import ROW_START
from avss_dist.warehouse.reader import Warehouse

Save = Callable[[Any, Path], Path]
TASK = "perplexity:builtin:pydoc"
SMALL = {"max_sequences": 12, "sequence_length": 32, "batch_size": 4, "sequences_per_shard": 6, "device": "cpu"}


def test_padding_counts_for_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "two.jsonl"
    text.write_text('{"text": "a rather long line of words, and more words"}\n{"text": "short one"}\n')
    padded = {"tasks": [f"perplexity:{text}"], "layout": "padded", "sequence_length": 64}
    warehouse = tmp_path / "w"
    (together, *_) = evaluate([tiny_llama], warehouse=warehouse, **padded)
    (cell, *_) = table_rows(warehouse, "cells")
    (alone, *_) = evaluate([tiny_llama], warehouse=tmp_path / "v", skip_sequences=1, **padded)
    _, second = together.result.samples
    assert second == pytest.approx(alone.result.samples[0], rel=1e-6)
    long_weight, short_weight = cell["weights"]
    assert short_weight < long_weight


def test_a_plan_is_compared_with_its_whole_model_and_no_cell_is_measured_twice(
    tiny_llama: Path, tmp_path: Path
) -> None:
    warehouse = tmp_path / "w"
    score(tiny_llama, corpus="builtin:pydoc", warehouse=warehouse, **SMALL)
    plan = tmp_path / "plan.yaml"
    succeed("plan", "-w", warehouse, "--by", "avss", "--count", 1, "-o", plan)
    with pytest.raises(ConfigError, match="`skip_sequences` 12"):
        evaluate([plan], tasks=[TASK], warehouse=warehouse, **SMALL)
    (evaluation,) = evaluate([plan], tasks=[TASK], warehouse=warehouse, skip_sequences=12, **SMALL)
    assert evaluation.retained is not None
    rows = evaluation_rows(warehouse, TASK)
    (dropped,) = read_plan(plan).drop
    whole = only_row(rows, metric="perplexity", drop=[])
    without = only_row(rows, metric="perplexity", drop=[dropped])
    assert len(where(rows, metric="loss")) == 2
    assert len(rows) == 4
    assert evaluation.retained.value == pytest.approx(whole["value"] / without["value"])
    assert evaluation.retained.low <= evaluation.retained.value <= evaluation.retained.high
    before = cell_times(warehouse)
    assert len(before) == 5  # two shards, whole and without a layer; and the first rows with another start
    evaluate([plan], tasks=[TASK], warehouse=warehouse, skip_sequences=12, **SMALL)
    assert cell_times(warehouse) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 30, "the key 'num_layers' is 30, and {model} has 3 layers"),
        ("layers", "h", "the key 'layers' is 'h', and the layers of {model} are 'layers'"),
        ("layers", None, "layers must be a text, not nothing"),
    ],
)
def test_a_plan_that_contradicts_its_model_is_refused(
    key: str, value: Any, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """With the key of the file, whatever an option of the command is called."""
    plan = tmp_path / "plan.yaml"
    keys = {"model": str(tiny_llama), "num_layers": 3, "layers": "layers", "drop": [1]}
    plan.write_text(yaml.safe_dump({**keys, key: value}))
    result = avss("evaluate", plan, "--tasks", TASK, "-w", tmp_path / "w", "--executor", "local")
    said = result.stderr.replace("\n", " ")
    assert result.exit_code == 2
    assert f"Error: {plan}" in said
    assert message.format(model=tiny_llama) in said
    assert "`" not in said
    assert "layers-path is missing" not in said
    assert not (tmp_path / "w" / "cells").exists()


@pytest.mark.parametrize("command", [("evaluate", "--tasks", TASK), ("ablate", "--corpus", "builtin:pydoc")])
def test_a_model_without_a_head_is_refused_before_it_is_loaded(
    command: tuple[str, ...], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.models.checkpoint.loading.load_model", None)
    name, *options = command
    told = mistake(name, tiny_bert, *options, "--warehouse", tmp_path / "w", "--sequence-length", 64)
    assert "predicts the next token" in told


def refused_by_both(model: Path, error: type[Exception], says: str, **options: Any) -> None:
    with pytest.raises(error, match=says):
        evaluate([model], tasks=[TASK], **SMALL | options)
    with pytest.raises(error, match=says):
        ablate(model, corpus="builtin:pydoc", **SMALL | options)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"partition": "zero3", "ranks": 2, "max_memory": {"cpu": 10**9}}, "`max_memory` has no effect"),
        ({"partition": "streaming", "max_memory": {"cpu": 1000}}, "`max_memory` allows 1 kB of host memory"),
        ({"gpus_per_replica": 2}, "`gpus_per_replica` needs GPUs"),
    ],
)
def test_partitions_refuse_what_they_would_not_honour(
    option: dict[str, Any], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    refused_by_both(tiny_llama, ConfigError, says, **option, warehouse=tmp_path)
    assert files(tmp_path) == {}


@pytest.mark.nightly
def test_streaming_evaluates_what_has_no_room(tiny_llama: Path, tmp_path: Path) -> None:
    """The same rows as of a whole model; `auto` chooses it where memory is limited."""
    limit = host_limit(tiny_llama, 200_000, **SMALL)
    whole = tmp_path / "whole"
    streamed = tmp_path / "streamed"
    for warehouse, memory in ((whole, {}), (streamed, {"max_memory": {"cpu": limit}})):
        options = {**SMALL, **memory, "executor": "local", "warehouse": warehouse}
        evaluate([tiny_llama], tasks=[TASK], **options)
        ablate(tiny_llama, corpus="builtin:pydoc", shapley=1, gradients=True, **options)
    assert_same_evaluations(streamed, whole)


def test_rows_without_a_token_to_predict_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Their loss would be zero over zero."""
    for sizes in ({"sequence_length": 1}, {"sequence_length": 1, "layout": "padded"}):
        refused_by_both(tiny_llama, CorpusError, "has a token that is predicted", **sizes, warehouse=tmp_path / "w")


# A pruned checkpoint beside the model that it was made of

SIZES: dict[str, Any] = {"max_sequences": 4, "sequence_length": 32, "device": "cpu", "executor": "local"}


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the model, and the model without layer 1 beside it."""
    folder = tmp_path_factory.mktemp("pruned")
    whole = folder / "whole"
    shutil.copytree(tiny_llama, whole)
    plan = Plan(model=str(whole), num_layers=3, layers="layers", drop=(1,))
    plan.write(folder / "plan.yaml")
    prune(str(whole), plan, folder / "smaller")
    return folder


@pytest.mark.nightly
def test_the_base_model_of_the_card_is_evaluated_too(pruned: Path, tmp_path: Path) -> None:
    """Its losses, and what is kept, are those of the plan that the checkpoint was made by."""
    warehouse = tmp_path / "w"
    smaller = pruned / "smaller"
    subjects = [str(smaller), str(pruned / "plan.yaml")]
    written, planned = evaluate(subjects, tasks=[TASK], warehouse=warehouse, **SIZES)
    assert written.whole is not None
    assert written.retained is not None
    assert planned.retained is not None
    assert written.whole.value == planned.whole.value  # type: ignore[union-attr]
    assert np.array_equal(written.result.samples, planned.result.samples)
    assert written.retained.value == planned.retained.value
    cells = Warehouse(warehouse).table("cells").num_rows
    evaluate([smaller], tasks=[TASK], warehouse=warehouse, **SIZES)
    assert Warehouse(warehouse).table("cells").num_rows == cells


@pytest.fixture
def moved(pruned: Path, tmp_path: Path) -> Path:
    """A copy of the pruned checkpoint whose card names a model that is not there."""
    folder = tmp_path / "smaller"
    shutil.copytree(pruned / "smaller", folder)
    card = folder / "README.md"
    text = card.read_text()
    gone = tmp_path / "gone" / "whole"
    card.write_text(text.replace(str(pruned / "whole"), str(gone)))
    return folder


def evaluate_moved(moved: Path, **options: Any) -> Evaluation:
    """Evaluate the moved checkpoint, in a warehouse beside it."""
    (evaluation,) = evaluate([moved], tasks=[TASK], warehouse=moved.parent / "w", **SIZES, **options)
    return evaluation


def test_a_base_model_that_is_not_found_is_refused_before_work(moved: Path, tmp_path: Path) -> None:
    warehouse = tmp_path / "w"
    with pytest.raises(ConfigError, match=r"whole, the base model of .*smaller, is not found"):
        evaluate([moved], tasks=[TASK], warehouse=warehouse, **SIZES)
    assert not warehouse.exists()


def test_a_base_model_that_has_changed_is_refused_before_work(moved: Path, save_checkpoint: Save) -> None:
    save_checkpoint(llama(seed=9), moved.parent / "whole")
    with pytest.raises(ConfigError, match="was made of it at"):
        evaluate_moved(moved)


def test_a_base_model_beside_the_checkpoint_is_found(moved: Path, pruned: Path) -> None:
    shutil.copytree(pruned / "whole", moved.parent / "whole")
    assert evaluate_moved(moved).retained is not None


def test_a_base_model_can_be_named(moved: Path, pruned: Path) -> None:
    assert evaluate_moved(moved, base=pruned / "whole").retained is not None


def test_a_pruned_checkpoint_that_is_its_own_base_is_evaluated_alone(moved: Path) -> None:
    assert evaluate_moved(moved, base=moved).retained is None


def test_a_plan_is_evaluated_as_its_file_is(pruned: Path, tmp_path: Path) -> None:
    plan_file = pruned / "plan.yaml"
    plan = read_plan(plan_file)
    subjects = [plan, str(plan_file)]
    planned, from_file = evaluate(subjects, tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    assert planned.subject.label == "whole without 1"
    assert planned.retained is not None
    assert from_file.retained is not None
    assert planned.retained.value == from_file.retained.value


def test_models_that_were_not_pruned_have_no_base(pruned: Path, tmp_path: Path) -> None:
    whole = pruned / "whole"
    assert pruned_from(whole) is None
    (tmp_path / "README.md").write_text("---\nbase_model: org/name\n---\n\nA fine-tuned model.\n")
    assert pruned_from(tmp_path) is None
    (alone,) = evaluate([whole], tasks=[TASK], warehouse=tmp_path / "w", **SIZES)
    assert alone.retained is None


def test_a_base_that_cannot_be(pruned: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"tasks": [TASK], "warehouse": tmp_path / "w", **SIZES}
    with pytest.raises(ConfigError, match="`base` has no effect on plans"):
        evaluate([pruned / "plan.yaml"], base=pruned / "whole", **common)
    with pytest.raises(AvssError, match="nowhere"):
        evaluate([pruned / "smaller"], base=tmp_path / "nowhere", **common)


# Text that scores have seen is refused, however it is written; other text is not


class Seen(NamedTuple):
    """A run, and the text that it has read."""

    warehouse: Path
    run_id: str
    text: Path


SHORT: dict[str, Any] = {"sequence_length": 16, "device": "cpu", "sequences_per_shard": 100}


@pytest.fixture(scope="module")
def seen(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("seen")
    text = folder / "text.txt"
    text.write_text(TEXT)
    warehouse = folder / "w"
    options = {"sites": ("block",), "executor": "local", "batch_size": 100}
    run = score(tiny_llama, corpus=text, warehouse=warehouse, **options, **SHORT)
    return Seen(warehouse, run.run_id, text)


def refuse(seen: Seen, model: Path, task: Task) -> None:
    run = Warehouse(seen.warehouse).run(seen.run_id)
    assert run is not None
    earlier = earlier_texts(seen_by_run(run), checkpoint_at(model))
    refuse_overlap([task], earlier)


def task_on(text: str, model: Path, folder: Path, name: str = "read.txt", **changes: Any) -> Task:
    file = folder / name
    file.write_bytes(text.encode())
    settings = Settings(**SHORT | changes)
    placed = PlacedModel(checkpoint=checkpoint_at(model), settings=settings, placement=Placement())
    return plan_task(placed, f"perplexity:{file}").task


def text_of(seed: int) -> str:
    return "\n".join(sentences(60, seed=seed))


@pytest.mark.parametrize("name", SAME)
def test_seen_text_in_short_rows_is_refused(name: str, seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    same = task_on(SAME[name], tiny_llama, tmp_path)
    with pytest.raises(ConfigError, match=r"% of perplexity:.* is text that the scores of .* were measured on"):
        refuse(seen, tiny_llama, same)
    other = task_on(text_of(seed=40), tiny_llama, tmp_path)
    refuse(seen, tiny_llama, other)


def test_text_that_cannot_be_compared_is_refused(seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    text = '{"text": "yes"}\n{"text": "no"}\n{"text": "perhaps"}\n'
    task = task_on(text, tiny_llama, tmp_path, name="words.jsonl", layout="padded")
    with pytest.raises(
        ConfigError, match=r"cannot be compared with the text that the scores of .*: one of them has no 16"
    ):
        refuse(seen, tiny_llama, task)


def test_text_that_has_changed_cannot_be_compared(seen: Seen, tiny_llama: Path, tmp_path: Path) -> None:
    other = task_on(text_of(seed=41), tiny_llama, tmp_path)
    seen.text.write_text(text_of(seed=42))
    try:
        with pytest.raises(ConfigError, match=r"text of run .* has changed since it was read: .*text\.txt"):
            refuse(seen, tiny_llama, other)
    finally:
        seen.text.write_text(TEXT)
    refuse(seen, tiny_llama, other)


# The start of a row: against plain transformers with the tokenizer's defaults, and other starts

SHORT_ROWS = {"max_sequences": 12, "sequence_length": 16, "device": "cpu"}
WORDS = 100


def save_with_words(folder: Path, model: Any, added: str) -> Path:
    """Save a model with a tokenizer of whole words, which puts special tokens around a text as ``added`` says."""
    model.save_pretrained(folder)
    words = [f"w{i}" for i in range(WORDS)]
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    names = [*special.values(), *words]
    markers = ("<bos>", "<eos>")
    tokenizer = word_tokenizer(names, unknown="<pad>", added=added, markers=markers, **special)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """One document of random words."""
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.integers(0, WORDS, 400)]
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.mark.parametrize("added", ["$A", "<bos> $A <eos>", *nightly("<bos> $A")])
def test_the_perplexity_of_a_text_is_that_of_transformers(added: str, text: Path, tmp_path: Path) -> None:
    folder = save_with_words(tmp_path / "model", llama(), added)
    (evaluation,) = evaluate([folder], tasks=[f"perplexity:{text}"], warehouse=tmp_path / "w", **SHORT_ROWS)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = text.read_text().split()
    losses = []
    weights = []
    length = SHORT_ROWS["sequence_length"] - added.startswith("<bos>")
    for row in range(SHORT_ROWS["max_sequences"]):
        words_of_row = words[row * length : (row + 1) * length]
        ids = tokenizer(" ".join(words_of_row), return_tensors="pt").input_ids
        ids = ids[:, : SHORT_ROWS["sequence_length"]]  # an EOS ends a text, and a row does not
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss))
        weights.append(ids.shape[1] - 1)
    assert evaluation.result.weights.tolist() == weights
    assert evaluation.result.samples / weights == pytest.approx(losses, rel=1e-5)


def expecting_bos() -> Any:
    """Return a Llama that gives every word the same probability after BOS, and nearly none without it.

    Unit 0 of the stream is -1 at every token, and decides between words and all other tokens. Attention is uniform, and
    adds to it what BOS alone has in unit 1.
    """
    model = llama(tie_word_embeddings=False)
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.zero_()
        model.model.embed_tokens.weight[:, 0] = -1
        model.model.embed_tokens.weight[1, 1] = 1
        layer.v_proj.weight[0, 1] = 1
        layer.o_proj.weight[0, 0] = 100
        model.lm_head.weight[:, 0] = -1
        model.lm_head.weight[3 : 3 + WORDS, 0] = 1
    return model


def findings_on_starts(warehouse: Path) -> list[dict[str, Any]]:
    """The findings of a warehouse on the starts of rows."""
    table = findings(Warehouse(warehouse))
    return where(table.to_pylist(), kind="row_start")


@pytest.mark.nightly
def test_a_model_that_expects_another_start_is_found_out(text: Path, tmp_path: Path) -> None:
    folder = save_with_words(tmp_path / "model", expecting_bos(), "<bos> $A")
    warehouse = tmp_path / "w"
    tasks = [f"perplexity:{text}"]
    wrong = SHORT_ROWS | {"row_start": "none"}
    score(folder, corpus=text, warehouse=warehouse, **SHORT_ROWS)
    score(folder, corpus=text, warehouse=warehouse, **wrong)
    evaluations = evaluate([folder], tasks=tasks, warehouse=warehouse, **SHORT_ROWS)
    (right, *_) = evaluations
    assert right.result.value == pytest.approx(np.log(WORDS), rel=1e-3)
    assert not evaluations.findings
    assert not findings_on_starts(warehouse)
    evaluations = evaluate([folder], tasks=tasks, warehouse=warehouse, **wrong)
    (other, *_) = evaluations
    (sentence,) = evaluations.findings
    first_losses = (other.result.samples / other.result.weights)[:4]
    perplexity = np.exp(first_losses.mean())
    assert f"model has a perplexity of {perplexity:,.1f} on the first rows of {text}" in sentence
    assert sentence.endswith(
        "Write --row-start auto if it is none; else see whether its tokenizer lacks add_bos_token."
    )
    (row,) = findings_on_starts(warehouse)
    assert row["severity"] == "warning"
    assert "model has a perplexity of" in row["message"]
    assert row["value"] > 1000


def test_a_tokenizer_that_does_not_add_the_bos_that_its_model_expects_is_found_out(text: Path, tmp_path: Path) -> None:
    folder = save_with_words(tmp_path / "model", expecting_bos(), "$A")
    task = f"perplexity:{text}"
    warehouse = tmp_path / "w"
    evaluations = evaluate([folder], tasks=[task], warehouse=warehouse, **SHORT_ROWS)
    (sentence,) = evaluations.findings
    assert "with another start of each row, which it seems to expect" in sentence
    rows = evaluation_rows(warehouse, f"{ROW_START}{text}")
    other_start = only_row(rows, metric="loss_other_start")
    assert other_start["value"] == pytest.approx(np.log(WORDS), rel=1e-3)
    again = succeed("evaluate", folder, "--tasks", task, "-w", warehouse, *as_words(SHORT_ROWS))
    assert "which it seems to expect" in again.output
