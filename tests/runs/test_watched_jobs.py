"""`avss run --watch`: job files that can be watched, and trainings that write, rewrite and delete meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama
from support.command_line import avss, mistake
from support.tables import assert_same_tables, run_rows

import avss_dist
from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.runs import folder_watch
from avss_dist.runs.events import RunEnded, RunEvent, RunReading, RunStarted, ShardMeasured
from avss_dist.runs.job_file import read_job
from avss_dist.runs.result import Run

SETTINGS = "settings: {max_sequences: 8, sequence_length: 16, sequences_per_shard: 2, batch_size: 2}\n"
OPTIONS: dict[str, Any] = {"watch": True, "watch_seconds": 0.05}
QUIET = {**OPTIONS, "until": "0.01m"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_watch, "SETTLE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def checkpoints(save_checkpoint: Callable[[Any, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of one training. Not to be changed."""
    folder = tmp_path_factory.mktemp("training")
    return [save_checkpoint(llama(step), folder / f"step-{step}") for step in (1, 2)]


def job_file(folder: Path, models: str, more: str = "") -> Path:
    file = folder / "job.yaml"
    file.write_text(
        f"warehouse: {folder}/w\nmodels: [{models}]\ncorpora: [builtin:pydoc]\n"
        f"execution: {{executor: local}}\n{SETTINGS}{more}"
    )
    return file


def replace_weights(checkpoint: Path, other: Path) -> None:
    """Give a checkpoint the weights of another one, in a new file: the process may have the old one in its memory.

    A file that is cut to nothing and filled again would end the process by a signal if it was read in between.
    """
    new = checkpoint / "model.safetensors.new"
    shutil.copyfile(other / "model.safetensors", new)
    new.replace(checkpoint / "model.safetensors")


def statuses(folder: Path) -> list[str]:
    return sorted(row["status"] for row in run_rows(folder / "w"))


# The job file


def test_globs_are_kept_for_the_watch(tmp_path: Path) -> None:
    job = read_job(job_file(tmp_path, f"org/base, '{tmp_path}/step-*'"), watch=True)
    assert [spec.model for spec in job.specs] == ["org/base"]
    assert [spec.model for spec in job.watched] == [f"{tmp_path}/step-*"]


def test_a_job_without_a_glob_cannot_be_watched(tmp_path: Path) -> None:
    said = mistake("run", job_file(tmp_path, "org/base"), "--watch")
    assert "no glob of folders to watch, such as /data/run7/checkpoint-*" in said


def test_a_job_with_an_experiment_cannot_be_watched(tmp_path: Path) -> None:
    file = job_file(tmp_path, f"'{tmp_path}/step-*'", "experiment: {tasks: [perplexity:builtin:pydoc]}\n")
    with pytest.raises(ConfigError, match="leave it out while a training is watched, and run it after"):
        read_job(file, watch=True)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ("'/data/*.gguf'", "folders are watched, and no .gguf files"),
    ],
)
def test_what_is_not_watched_is_refused(models: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read_job(job_file(tmp_path, models), watch=True)


def test_patterns_of_names_are_not_looked_for_in_globs(tmp_path: Path) -> None:
    job = read_job(job_file(tmp_path, "{model: '/data/run-*/at-*', names: 'at-{step}'}"), watch=True)
    assert job.watched[0].names == ("at-{step}",)


def test_a_job_that_was_read_without_the_watch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    job = read_job(job_file(tmp_path, f"'{tmp_path}/step-*'"))
    with pytest.raises(ConfigError, match="was not read for a watch"):
        avss_dist.run(job, watch=True)


# Trainings


def test_a_watch_gives_the_tables_of_a_job_that_comes_after_the_training(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    pattern = f"'{checkpoints[0].parent}/step-*'"
    watched = avss_dist.run(job_file(tmp_path, pattern), **OPTIONS, until=2)
    assert [Path(run.model).name for run in watched] == ["step-2", "step-1"]
    (tmp_path / "after").mkdir()
    avss_dist.run(job_file(tmp_path / "after", pattern))
    assert_same_tables(tmp_path / "w", tmp_path / "after" / "w")


def test_a_watch_skips_what_was_done_before(checkpoints: list[Path], tmp_path: Path) -> None:
    file = job_file(tmp_path, f"'{checkpoints[0].parent}/step-*'")
    avss_dist.run(file, **OPTIONS, until=1)
    again = avss_dist.run(file, **OPTIONS, until=2)
    assert [run.status for run in again] == ["skipped", "done"]


def test_models_of_the_job_come_before_the_checkpoints(
    tiny_llama: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    file = job_file(tmp_path, f"'{checkpoints[0].parent}/step-*', {tiny_llama}")
    runs = avss_dist.run(file, **OPTIONS, until=1)
    assert [Path(run.model).name for run in runs] == ["tiny-llama", "step-2"]


def test_a_checkpoint_that_is_deleted_fails_alone(checkpoints: list[Path], tmp_path: Path) -> None:
    for folder in checkpoints:
        shutil.copytree(folder, tmp_path / folder.name)

    def delete(event: RunEvent) -> None:
        if isinstance(event, RunReading) and event.name.endswith("step-2"):
            shutil.rmtree(tmp_path / "step-2")

    runs = avss_dist.run(job_file(tmp_path, f"'{tmp_path}/step-*'"), **QUIET, on_event=delete)
    assert [run.status for run in runs] == ["failed", "done"]
    assert str(runs[0].error).startswith(f"'{tmp_path}/step-2' was deleted while it was measured.")
    assert statuses(tmp_path) == ["done", "failed"]


@pytest.mark.nightly
def test_a_step_that_is_written_again_is_another_run(checkpoints: list[Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints[0], tmp_path / "step-1")

    def write_again(event: RunEvent) -> None:
        if isinstance(event, RunEnded):
            replace_weights(tmp_path / "step-1", checkpoints[1])

    runs = avss_dist.run(job_file(tmp_path, f"'{tmp_path}/step-*'"), **OPTIONS, until=2, on_event=write_again)
    assert len({run.run_id for run in runs}) == 2
    assert statuses(tmp_path) == ["done", "done"]


def test_a_checkpoint_that_is_deleted_after_it_was_read_is_finished(checkpoints: list[Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints[0], tmp_path / "step-1")

    def delete(event: RunEvent) -> None:
        if isinstance(event, ShardMeasured):
            shutil.rmtree(tmp_path / "step-1", ignore_errors=True)

    (run,) = avss_dist.run(job_file(tmp_path, f"'{tmp_path}/step-*'"), **OPTIONS, until=1, on_event=delete)
    assert run.status == "done"


@pytest.fixture
def written_again(checkpoints: list[Path], tmp_path: Path) -> Run:
    """Return the run of a checkpoint whose weights are replaced after its revision was computed."""
    shutil.copytree(checkpoints[0], tmp_path / "step-1")

    def write_again(event: RunEvent) -> None:
        if isinstance(event, RunStarted):
            replace_weights(tmp_path / "step-1", checkpoints[1])

    (run,) = avss_dist.run(job_file(tmp_path, str(tmp_path / "step-1")), on_event=write_again)
    return run


def test_a_checkpoint_that_is_written_again_while_it_is_measured_fails(written_again: Run, tmp_path: Path) -> None:
    assert str(written_again.error).startswith(f"'{tmp_path}/step-1' was written again while it was measured.")


@pytest.mark.usefixtures("written_again")
def test_nothing_resumes_from_shards_that_may_have_other_weights(tmp_path: Path) -> None:
    assert [*(tmp_path / "w" / "shard_stats").rglob("*.parquet")] == []


@pytest.mark.nightly
def test_a_checkpoint_of_another_model_is_measured(checkpoints: list[Path], tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints[0], tmp_path / "step-1")
    shutil.copytree(tiny_bert, tmp_path / "step-2")
    runs = avss_dist.run(job_file(tmp_path, f"'{tmp_path}/step-*'"), **OPTIONS, until=2)
    assert [run.status for run in runs] == ["done", "done"]


def test_a_watch_that_finds_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="became a complete checkpoint"):
        avss_dist.run(job_file(tmp_path, f"'{tmp_path}/step-*'"), **QUIET)


@pytest.mark.nightly
def test_the_command_counts_its_runs(checkpoints: list[Path], tmp_path: Path) -> None:
    file = job_file(tmp_path, f"'{checkpoints[0].parent}/step-*'")
    result = avss("run", file, "--watch", "--until", 2, "--watch-seconds", 0.05)
    assert "2 runs: 2 done." in result.stdout
    assert result.exit_code == 0


def test_the_log_of_a_watch_says_what_is_watched(checkpoints: list[Path], tmp_path: Path) -> None:
    file = job_file(tmp_path, f"'{checkpoints[0].parent}/step-*'")
    said = avss("run", file, "--watch", "--until", 1, "--watch-seconds", 0.05).stderr
    pattern = f"{checkpoints[0].parent}/step-*"
    assert f"Watching {pattern}: a look every 0.05 s. It ends after 1 checkpoint." in said
