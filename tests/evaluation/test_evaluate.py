"""Evaluation: padding, plans beside their whole model, cells once each, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import host_limit
from support.command_line import avss, files, mistake
from support.experiments import cell_times
from support.tables import assert_same_evaluations

from avss_dist import ablate, evaluate
from avss_dist.core.errors import ConfigError, CorpusError
from avss_dist.runs.api import score
from avss_dist.warehouse.reader import Warehouse

TEXT = "perplexity:builtin:pydoc"
SMALL = {"max_sequences": 12, "sequence_length": 32, "batch_size": 4, "sequences_per_shard": 6, "device": "cpu"}


def test_padding_counts_for_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "two.jsonl"
    text.write_text('{"text": "a rather long line of words, and more words"}\n{"text": "short one"}\n')
    padded = {"tasks": [f"perplexity:{text}"], "layout": "padded", "sequence_length": 64}
    together = evaluate([str(tiny_llama)], warehouse=tmp_path / "w", **padded)
    rows = Warehouse(tmp_path / "w").table("cells").to_pylist()
    alone = evaluate([str(tiny_llama)], warehouse=tmp_path / "v", skip_sequences=1, **padded)
    assert together[0].result.samples[1] == pytest.approx(alone[0].result.samples[0], rel=1e-6)
    assert rows[0]["weights"][1] < rows[0]["weights"][0]


def test_a_plan_is_compared_with_its_whole_model_and_no_cell_is_measured_twice(
    tiny_llama: Path, tmp_path: Path
) -> None:
    warehouse = tmp_path / "w"
    score(tiny_llama, corpus="builtin:pydoc", warehouse=warehouse, **SMALL)
    plan = tmp_path / "plan.yaml"
    assert avss("plan", "-w", warehouse, "--by", "avss", "--count", 1, "-o", plan).exit_code == 0
    with pytest.raises(ConfigError, match="`skip_sequences` 12"):
        evaluate([str(plan)], tasks=[TEXT], warehouse=warehouse, **SMALL)
    (found,) = evaluate([str(plan)], tasks=[TEXT], warehouse=warehouse, skip_sequences=12, **SMALL)
    assert found.retained is not None
    store = Warehouse(warehouse)
    rows = [row for row in store.table("evaluations").to_pylist() if row["task"] == TEXT]
    assert sorted((row["metric"], len(row["drop"])) for row in rows) == [
        *(("loss", 0), ("loss", 1), ("perplexity", 0), ("perplexity", 1))
    ]
    value = {(row["metric"], len(row["drop"])): row["value"] for row in rows}
    assert found.retained.value == pytest.approx(value["perplexity", 0] / value["perplexity", 1])
    assert found.retained.low <= found.retained.value <= found.retained.high
    before = cell_times(warehouse)
    assert len(before) == 5  # two shards, whole and without a layer; and the first rows with another start
    evaluate([str(plan)], tasks=[TEXT], warehouse=warehouse, skip_sequences=12, **SMALL)
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
    plan, keys = tmp_path / "plan.yaml", {"model": str(tiny_llama), "num_layers": 3, "layers": "layers", "drop": [1]}
    plan.write_text(yaml.safe_dump({**keys, key: value}))
    result = avss("evaluate", plan, "--tasks", TEXT, "-w", tmp_path / "w", "--executor", "local")
    said = result.stderr.replace("\n", " ")
    assert result.exit_code == 2 and f"Error: {plan}" in said and message.format(model=tiny_llama) in said
    assert "`" not in said and "layers-path is missing" not in said
    assert not [file for file in files(tmp_path) if file.startswith("w/cells")]


@pytest.mark.parametrize("command", [("evaluate", "--tasks", TEXT), ("ablate", "--corpus", "builtin:pydoc")])
def test_a_model_without_a_head_is_refused_before_it_is_loaded(
    command: tuple[str, ...], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avss_dist.models.loading.load_model", None)
    name, *options = command
    told = mistake(name, tiny_bert, *options, "--warehouse", tmp_path / "w", "--sequence-length", 64)
    assert "predicts the next token" in told


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
    options = {**SMALL, **option, "warehouse": tmp_path}
    with pytest.raises(ConfigError, match=says):
        evaluate([str(tiny_llama)], tasks=[TEXT], **options)
    with pytest.raises(ConfigError, match=says):
        ablate(tiny_llama, corpus="builtin:pydoc", **options)
    assert files(tmp_path) == {}


def test_streaming_evaluates_what_has_no_room(tiny_llama: Path, tmp_path: Path) -> None:
    """The same rows as of a whole model; `auto` chooses it where memory is limited."""
    limited = {"max_memory": {"cpu": host_limit(tiny_llama, 200_000, **SMALL)}}
    for name, options in {"whole": {}, "streamed": limited}.items():
        common: dict[str, Any] = {**SMALL, **options, "executor": "local", "warehouse": tmp_path / name}
        evaluate([str(tiny_llama)], tasks=[TEXT], **common)
        ablate(tiny_llama, corpus="builtin:pydoc", shapley=1, gradients=True, **common)
    assert_same_evaluations(tmp_path / "streamed", tmp_path / "whole")


def test_rows_without_a_token_to_predict_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Their loss would be zero over zero."""
    for sizes in ({"sequence_length": 1}, {"sequence_length": 1, "layout": "padded"}):
        with pytest.raises(CorpusError, match="has a token that is predicted"):
            evaluate([str(tiny_llama)], tasks=[TEXT], warehouse=tmp_path / "w", **SMALL | sizes)
        with pytest.raises(CorpusError, match="has a token that is predicted"):
            ablate(tiny_llama, corpus="builtin:pydoc", warehouse=tmp_path / "w", **SMALL | sizes)
