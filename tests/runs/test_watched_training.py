"""A watch beside a training that deletes its checkpoints. It is killed and stopped in the middle, and goes on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from support.checkpoints import one_thread
from support.commands import Command
from support.processes import wait_until
from support.tables import assert_same_tables, run_rows, unit_times

import avss_dist

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("warm_workers")]

STEPS = 8
SHARDS = 32
"""Shards of a run."""
TRAINING = Path(__file__).parents[1] / "support" / "small_training.py"
SETTINGS = "settings: {max_sequences: 256, sequence_length: 64, sequences_per_shard: 8, batch_size: 4}\n"


def job_file(folder: Path, name: str, models: str) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        f"warehouse: {folder}/{name}\nmodels: [{models}]\ncorpora: [builtin:pydoc]\n"
        f"execution: {{executor: local}}\n{SETTINGS}"
    )
    return file


def num_done(folder: Path) -> int:
    return len([*(folder / "watched" / "runs").rglob("run.parquet")])


def num_shards(folder: Path) -> int:
    return len([*(folder / "watched" / "shard_stats").rglob("*.parquet")])


def start_training(kind: str, model: Path, folder: Path, seconds: float) -> Command:
    kept = folder / "kept"
    kept.mkdir()
    return Command(TRAINING, kind, model, folder / "out", kept, STEPS, seconds, program="python")


def start_watch(job: Path, until: object = 1000) -> Command:
    return Command("run", job, "--watch", "--watch-seconds", 0.5, "--until", until)


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_a_watch_that_is_killed_gives_the_tables_of_an_undisturbed_job(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Shards that were stored before the kill are not written again."""
    job = job_file(tmp_path, "watched", f"'{tmp_path}/out/checkpoint-*'")
    with one_thread():
        training = start_training(kind, tiny_llama, tmp_path, 4.0)
        watch = start_watch(job)
        wait_until(lambda: num_done(tmp_path) >= 1 and num_shards(tmp_path) >= SHARDS + 4)
        watch.kill()
        before = unit_times(tmp_path / "watched")
        assert len(before) > SHARDS
        code, _, said = start_watch(job, "0.3m").wait()
        assert training.wait()[0] == 0
    rows = run_rows(tmp_path / "watched")
    failed = [row for row in rows if row["status"] == "failed"]
    assert code == int(bool(failed)), said
    assert all("was deleted while it was measured" in row["error"] for row in failed)
    after = unit_times(tmp_path / "watched")
    again = [name for name in before if name in after and after[name] != before[name]]
    assert again == []
    done = {row["run_id"]: row["model"] for row in rows if row["status"] == "done"}
    assert len(done) >= 2, said
    for partials in (tmp_path / "watched" / "shard_stats").iterdir():
        if partials.name.removeprefix("run_id=") not in done:  # Its folder was deleted before it was finished.
            shutil.rmtree(partials)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").rename(tmp_path / "out")
    with one_thread():
        avss_dist.run(job_file(tmp_path, "undisturbed", ", ".join(done.values())))
    assert_same_tables(tmp_path / "watched", tmp_path / "undisturbed")


def test_a_watch_that_is_interrupted_keeps_what_it_has_measured(tiny_llama: Path, tmp_path: Path) -> None:
    job = job_file(tmp_path, "watched", f"'{tmp_path}/out/step-*'")
    shutil.copytree(tiny_llama, tmp_path / "out" / "step-1")
    with one_thread():
        watch = start_watch(job, 2)
        wait_until(lambda: num_shards(tmp_path) >= 4)
        watch.send(signal.SIGINT)
        code, _, said = watch.wait()
    assert code == 130, said
    assert f"Stopped, {num_shards(tmp_path)} of {SHARDS} shards are kept" in said


def test_a_watch_that_waits_is_interrupted_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    job = job_file(tmp_path, "watched", f"'{tmp_path}/out/step-*'")
    watch = Command("run", job, "--watch", "--watch-seconds", 1000)
    wait_until(lambda: (tmp_path / "watched").exists())
    watch.send(signal.SIGINT)
    assert watch.wait()[0] == 130


def test_two_watches_on_one_warehouse_give_the_tables_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        shutil.copytree(tiny_llama, tmp_path / "out" / f"step-{step}")
    job = job_file(tmp_path, "watched", f"'{tmp_path}/out/step-*'")
    with one_thread():
        watches = [start_watch(job, 2), start_watch(job, 2)]
        assert [watch.wait()[0] for watch in watches] == [0, 0]
        avss_dist.run(job_file(tmp_path, "undisturbed", f"'{tmp_path}/out/step-*'"))
    assert_same_tables(tmp_path / "watched", tmp_path / "undisturbed")
