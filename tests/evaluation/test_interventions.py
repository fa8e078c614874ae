"""What layers that a contrast names do to multiple choice, beside as many others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import one_thread
from support.command_line import avss, mistake, succeed
from support.experiments import run_job_in
from tasks.test_truthfulqa import QUESTIONS

from avss_dist.analysis.contrast import contrast
from avss_dist.core.errors import ConfigError
from avss_dist.pruning.methods import parse_score
from avss_dist.runs.job_file import read_job
from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

JOB = """
warehouse: {warehouse}
models: [{model}]
corpora: ["truthfulqa:{text}"]
settings: {{max_sequences: 8, sequence_length: 48, batch_size: 4, sequences_per_shard: 4, dtype: float32, device: cpu}}
experiment:
  tasks: ["truthfulqa:{text}"]
  scores: [avss, contrast]
  shares: [0.34]
  random: 2
  reversed: false
  keep_ends: 0
  last: false
  leave_one_out: false
  skip_questions: {skip}
"""
METHODS = {"avss", "contrast", "random 0", "random 1"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions; the first two are contrasted."""
    file = tmp_path_factory.mktemp("text") / "t.jsonl"
    more = [{**question, "question": f"Again: {question['question']}"} for question in QUESTIONS[:2]]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (*more, *QUESTIONS)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def done(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("interventions")
    return run_job_in(folder, JOB.replace("{text}", str(text)).replace("{skip}", "2"), tiny_llama)


def test_named_layers_are_beside_as_many_others(done: tuple[Path, list[dict[str, Any]]]) -> None:
    job, rows = done
    warehouse = Warehouse(read_job(job).warehouse)
    (run,) = warehouse.runs().to_pylist()
    by = {(row["method"], row["metric"]): row for row in rows}
    assert {method for method, _ in by} == {"whole model", *METHODS}
    assert {metric for _, metric in by} == {"mc1", "mc2", "chance"}
    assert {len(row["drop"]) for row in rows if row["share"]} == {1}
    ranks = contrast(warehouse, run).layers.to_pylist()
    (named,) = (row["layer"] for row in ranks if row["rank"] == 1)
    assert by["contrast", "mc2"]["drop"] == [named]
    assert by["whole model", "chance"]["value"] == pytest.approx(np.mean([2 / 3, 1 / 3, 2 / 4]))


def test_a_plan_is_not_asked_the_questions_that_its_layers_were_scored_on(
    done: tuple[Path, list[dict[str, Any]]], text: Path, tmp_path: Path
) -> None:
    job, rows = done
    warehouse, plan, task = read_job(job).warehouse, tmp_path / "plan.yaml", f"truthfulqa:{text}"
    succeed("plan", "-w", warehouse, "--by", "avss", "--share", 0.34, "-o", plan)
    options = ["-w", warehouse, "--sequence-length", 48, "--batch-size", 4, "--sequences-per-shard", 4,
               "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    refused = mistake("evaluate", plan, "--tasks", task, *options)
    assert "2 of the 5 questions of truthfulqa:" in refused
    assert "Ask others: with --skip-questions 2" in refused
    with one_thread():
        shown = avss("evaluate", plan, "--tasks", task, "--skip-questions", 2, "--format", "json", *options)
    (same,) = (row for row in rows if (row["method"], row["metric"]) == ("avss", "mc2"))
    found = {(one["subject"], one["metric"]): one["value"] for one in map(json.loads, shown.stdout.splitlines())}
    assert found[str(plan), "mc2"] == same["value"]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="not a reading of AVSS") as caught:
        parse_score("contrast:block")
    assert "contrast:SITE:RECIPE:THRESHOLD" in str(caught.value.hint)
