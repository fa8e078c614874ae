"""Experiments whose repairs are followed by distillation: values, checkpoints, resumption, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import one_thread
from support.command_line import files
from support.commands import Command
from support.experiments import experiment_of, run_job_in
from support.processes import wait_until

from avss_dist import evaluate
from avss_dist.core.errors import ConfigError, CorpusError
from avss_dist.distillation.record import read_record
from avss_dist.evaluation import distilled
from avss_dist.pruning.methods import Experiment
from avss_dist.pruning.repair.record import read_repairs
from avss_dist.report.experiments import experiment_sections
from avss_dist.runs.job_file import read_job
from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

READ: dict[str, Any] = {"sequence_length": 32, "batch_size": 4, "sequences_per_shard": 4, "device": "cpu"}
JOB = """
warehouse: {{warehouse}}
models: [{{model}}]
corpora: ["{corpus}"]
settings:
  {{{{max_sequences: 12, sequence_length: 32, batch_size: 4, sequences_per_shard: 4, device: cpu, dtype: float32}}}}
execution: {{{{executor: local}}}}
experiment:
  tasks: ["perplexity:{corpus}"]
  scores: [block_influence]
  shares: [0.25]
  random: 0
  reversed: false
  keep_ends: 0
  last: false
  leave_one_out: false
  repairs: [none, refit, refit+distill, none+distill]
  repair_corpora: ["{corpus}"]
  repair_skip_sequences: 24
  repair_max_sequences: 48
  distill_tokens: 768
  distill_self_texts: 0
  max_sequences: 12
  skip_sequences: 12
"""
REPAIRS = (None, "refit", "refit+distill", "none+distill")


@pytest.fixture(scope="module")
def done(deep: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The job file, with its warehouse beside it, and the rows of its experiment."""
    return run_job_in(tmp_path_factory.mktemp("experiment"), JOB.format(corpus=corpus), deep)


def losses(rows: list[dict[str, Any]]) -> dict[str | None, dict[str, Any]]:
    """The row of each repair of the pruned model."""
    return {row["repair"]: row for row in rows if row["metric"] == "loss" and row["share"]}


def checkpoints(job: Path) -> list[Path]:
    return sorted(file.parent for file in (job.parent / "w" / "distilled").glob("*/*/avss_distill.json"))


def test_distilled_models_are_compared_with_the_others(
    done: tuple[Path, list[dict[str, Any]]], deep: Path, corpus: Path
) -> None:
    """A row's value is what evaluating its checkpoint gives, to the bit."""
    job, rows = done
    (whole,) = (row for row in rows if row["metric"] == "loss" and not row["share"])
    by_repair = losses(rows)
    assert tuple(by_repair) == REPAIRS
    for repair, row in by_repair.items():
        assert row["retention"] == pytest.approx(np.exp(whole["value"] - row["value"]))
        assert row["drop"] == by_repair[None]["drop"] and len(row["drop"]) == 2
        assert (row["patch"] is not None) == (repair or "none").startswith("refit")
    assert len({whole["value"], *(row["value"] for row in by_repair.values())}) == 5
    folders = checkpoints(job)
    with one_thread():
        again = evaluate(
            [*map(str, folders)],
            tasks=[f"perplexity:{corpus}"],
            warehouse=job.parent / "again",
            skip_sequences=12,
            max_sequences=12,
            base=deep,
            dtype="float32",
            **READ,
        )
    values = {by_repair[repair]["value"] for repair in REPAIRS[2:]}
    assert {one.result.value for one in again} == values
    stored = Warehouse(job.parent / "w").table("experiments").to_pylist()
    assert [row["value"] for row in stored] == [row["value"] for row in rows]
    (section,) = experiment_sections(rows)
    assert {"block influence + refit", "block influence + refit+distill"} < {*section.tables[0].values[0].values}


def test_the_checkpoints_are_kept_with_the_rows_that_they_were_trained_on(
    done: tuple[Path, list[dict[str, Any]]], corpus: Path
) -> None:
    """Of 48 rows, 6 are watched. The repair and the training read the other 42. Students are gone."""
    job, _ = done
    folders = checkpoints(job)
    assert [folder.name for folder in folders] == ["deep"] * 2
    for folder in folders:
        assert [path.name for path in folder.parent.iterdir()] == ["deep"]
        record = read_record(folder)
        assert record is not None and record.after.loss < record.before.loss
        assert [(text.corpus, text.held_out_rows, text.trained_rows) for text in record.texts] == [(str(corpus), 6, 42)]
        assert record.skip_sequences == 24
        assert all((fit.skip_sequences, fit.texts[0].rows) == (30, 42) for fit in read_repairs(folder))
        assert "Distilled from" in (folder / "README.md").read_text()
    assert sorted(len(read_repairs(folder)) for folder in folders) == [0, 1]


def test_nothing_is_made_twice(done: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    job, rows = done
    cells = {file: file.stat().st_mtime_ns for file in (job.parent / "w" / "cells").rglob("*.parquet")}

    def refuse(*_: object) -> None:
        raise AssertionError("distilled again")

    monkeypatch.setattr(distilled, "distill", refuse)
    monkeypatch.setattr(distilled, "prune", refuse)
    with one_thread():
        _, again = experiment_of(job)
    assert [row["value"] for row in again] == [row["value"] for row in rows]
    assert {file: file.stat().st_mtime_ns for file in (job.parent / "w" / "cells").rglob("*.parquet")} == cells


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_killed_it_goes_on_and_has_the_same_values(
    done: tuple[Path, list[dict[str, Any]]], deep: Path, corpus: Path, tmp_path: Path
) -> None:
    """By SIGKILL in the first training."""
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(corpus=corpus).format(warehouse=tmp_path / "w", model=deep))
    killed = Command("run", job, OMP_NUM_THREADS="1")
    wait_until(
        lambda: bool([*tmp_path.glob("w/distilled/*/*.part/checkpoints/*/avss_complete")]) or not killed.running()
    )
    killed.kill()
    assert len(checkpoints(job)) < 2
    with one_thread():
        _, rows = experiment_of(job)
    assert [row["value"] for row in rows] == [row["value"] for row in done[1]]
    weights = [[files(folder)["model.safetensors"] for folder in checkpoints(path)] for path in (job, done[0])]
    assert weights[0] == weights[1]


def test_text_that_is_distilled_on_is_not_evaluated_on(deep: Path, corpus: Path, tmp_path: Path) -> None:
    text = JOB.format(corpus=corpus).replace("  skip_sequences: 12", "  skip_sequences: 24")
    with pytest.raises(ConfigError, match="is text that models are repaired and distilled on"):
        run_job_in(tmp_path, text, deep)
    assert not (tmp_path / "w" / "distilled").exists()


def test_too_little_text_is_refused_before_training(deep: Path, corpus: Path, tmp_path: Path) -> None:
    text = JOB.format(corpus=corpus).replace("repair_max_sequences: 48", "repair_max_sequences: 7")
    with pytest.raises(CorpusError, match="has 7 rows; one to watch and others to distill on take 8"):
        run_job_in(tmp_path, text, deep)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"repairs": ("refit+destill",), "distill_tokens": 1e3}, r"refit\+destill(?s:.*)Did you mean 'refit\+distill'"),
        ({"repairs": ("refit+distill",)}, "`repairs` refit[+]distill needs a number of tokens"),
        ({"repairs": ("refit",), "distill_tokens": 1e3}, "`distill_tokens` has no effect"),
        ({"repairs": ("refit",), "distill_train": "near"}, "`distill_train` has no effect"),
        ({"repairs": ("none+distill",), "distill_tokens": 1e3, "repair_corpora": ()}, "needs text to be fitted on"),
        ({"prompts": ("Once",)}, "`prompts` have no effect without"),
    ],
)
def test_mistakes(options: dict[str, Any], told: str) -> None:
    values: dict[str, Any] = {"tasks": ("perplexity:a.txt",)}
    values |= {"repair_corpora": ("b.txt",)} if "repairs" in options else {}
    with pytest.raises(ConfigError, match=told) as raised:
        Experiment(**values | options)
    assert raised.value.message


def test_a_warehouse_that_is_no_folder_is_refused(deep: Path, corpus: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        JOB.format(corpus=corpus).format(warehouse="s3://bucket/w?endpoint_override=localhost:1", model=deep)
    )
    assert read_job(job).experiment is not None
    with pytest.raises(ConfigError, match=r"Distilled checkpoints are written into a folder(?s:.*)s3://"):
        experiment_of(job)
