"""The watch over folders of checkpoints: which one is taken next, when it ends, and what it says at the end."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.planning import run_spec
from support.written import safetensors_bytes, write_pieces, write_weights

from avss_dist.core.errors import ConfigError, ModelError, StorageFull
from avss_dist.core.watch_end import WatchEnd
from avss_dist.requests import RunJobRequest
from avss_dist.runs import folder_watch
from avss_dist.runs.folder_watch import Arrival, FolderWatch

SETTLE = 0.05
LOOK = 0.02
FEW = WatchEnd(minutes=0.2 / 60)  # 0.2 seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_watch, "SETTLE_SECONDS", SETTLE)


def watch_of(*patterns: Path, end: WatchEnd | None = FEW) -> FolderWatch:
    return FolderWatch([run_spec(pattern) for pattern in patterns], end, LOOK)


def taken(arrival: Arrival) -> str:
    """Return the name of the folder of an arrival, or an empty text at the end of the watch."""
    return Path(arrival.specs[0].model).name if arrival.specs else ""


def take_all(watch: FolderWatch) -> Sequence[str]:
    """Return the names of the folders that a watch takes, until it ends."""
    names = []
    while name := taken(watch.take()):
        names.append(name)
    return names


# Which one is next


def test_those_that_are_there_are_taken_the_newest_name_first(tmp_path: Path) -> None:
    for step in (9, 100, 10):
        write_weights(tmp_path / f"step {step}")
    assert take_all(watch_of(tmp_path / "step *")) == ["step 100", "step 10", "step 9"]


def test_one_that_comes_later_is_taken_before_those_that_wait(tmp_path: Path) -> None:
    write_weights(tmp_path / "step-20")
    write_weights(tmp_path / "step-10")
    watch = watch_of(tmp_path / "step-*")
    watch.take()
    write_weights(tmp_path / "step-1")
    assert take_all(watch) == ["step-1", "step-10"]


def test_those_that_wait_are_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_weights(tmp_path / f"step-{step}")
    note = watch_of(tmp_path / "step-*").take().note
    assert note == f"2 complete checkpoints waiting; the newest is first: {tmp_path}/step-3"


def test_the_line_on_those_that_wait_comes_once_in_half_a_minute(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_weights(tmp_path / f"step-{step}")
    watch = watch_of(tmp_path / "step-*")
    watch.take()
    assert watch.take().note == ""


def test_a_folder_is_taken_when_it_becomes_complete(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-1")
    (folder / "model.safetensors").write_bytes(safetensors_bytes()[:-1])
    watch = watch_of(tmp_path / "step-*", end=None)
    with ThreadPoolExecutor() as pool:
        arrival = pool.submit(watch.take)
        time.sleep(5 * SETTLE)
        assert not arrival.done()
        (folder / "model.safetensors").write_bytes(safetensors_bytes())
        assert taken(arrival.result()) == "step-1"


def test_a_folder_is_not_taken_while_its_files_change(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*", end=None)
    with ThreadPoolExecutor() as pool:
        arrival = pool.submit(watch.take)
        for number in range(40):
            (folder / "notes.txt").write_text("a" * number)
            time.sleep(SETTLE / 5)
        assert not arrival.done()
        assert taken(arrival.result()) == "step-1"


def test_pieces_of_tensors_are_taken_once(tmp_path: Path) -> None:
    write_pieces(tmp_path / "step-1")
    spec = run_spec(tmp_path / "step-*")
    spec = replace(spec, settings=replace(spec.settings, allow_pickle=True))
    assert take_all(FolderWatch([spec], FEW, LOOK)) == ["step-1"]


def test_a_folder_that_has_not_changed_is_taken_once(tmp_path: Path) -> None:
    write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    assert take_all(watch) == ["step-1"]
    assert take_all(watch) == []


def test_a_folder_that_goes_and_comes_back_is_taken_once(tmp_path: Path) -> None:
    """As on a network file system whose folder cannot be listed for a moment."""
    folder = write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    watch.take()
    folder.rename(tmp_path / "elsewhere")
    assert take_all(watch) == []
    (tmp_path / "elsewhere").rename(folder)
    assert take_all(watch) == []


def test_a_step_that_is_written_again_is_taken_again_by_another_name(tmp_path: Path) -> None:
    write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    first = watch.take()
    write_weights(tmp_path / "step-1", 1)
    second = watch.take()
    assert second.specs[0].model == first.specs[0].model
    assert second.specs[0].name == f"{first.specs[0].name}, written again (2)"


def test_a_file_that_is_added_later_is_no_new_checkpoint(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    watch.take()
    (folder / "metrics.json").write_text("{}")
    assert take_all(watch) == []


def test_a_link_to_another_folder_of_the_glob_is_left_out(tmp_path: Path) -> None:
    write_weights(tmp_path / "run" / "step-1")
    (tmp_path / "run" / "latest").symlink_to("step-1")
    assert take_all(watch_of(tmp_path / "run" / "*")) == ["step-1"]


def test_a_link_to_a_folder_elsewhere_is_taken(tmp_path: Path) -> None:
    write_weights(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-1").symlink_to(tmp_path / "elsewhere")
    assert take_all(watch_of(tmp_path / "run" / "step-*")) == ["step-1"]


def test_a_link_to_nothing_and_a_file_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-1").symlink_to(tmp_path / "gone")
    (tmp_path / "step-2").write_text("a file")
    watch = watch_of(tmp_path / "step-*")
    take_all(watch)
    assert [*watch.remarks()] == []


def test_a_folder_has_the_runs_of_every_glob_that_matches_it(tmp_path: Path) -> None:
    write_weights(tmp_path / "step-1")
    arrival = watch_of(tmp_path / "step-*", tmp_path / "*-1").take()
    assert [spec.model for spec in arrival.specs] == [f"{tmp_path}/step-1"] * 2


# The end


def test_a_watch_ends_after_so_many_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_weights(tmp_path / f"step-{step}")
    watch = watch_of(tmp_path / "step-*", end=WatchEnd(checkpoints=2))
    assert take_all(watch) == ["step-3", "step-2"]
    assert [*watch.remarks()] == [f"Complete, and not measured: {tmp_path}/step-1."]


def test_a_watch_of_nothing_ends_after_idle_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    assert take_all(watch_of(tmp_path / "step-*")) == []
    assert time.monotonic() - began >= 0.2


def test_a_folder_that_is_being_written_is_no_idleness(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    watch = watch_of(tmp_path / "step-*")
    with ThreadPoolExecutor() as pool:
        arrival = pool.submit(watch.take)
        for number in range(10):
            (tmp_path / "step-1" / f"part-{number}").write_text("")
            time.sleep(0.05)
        write_weights(tmp_path / "step-1")
        assert taken(arrival.result()) == "step-1"


def test_a_watch_that_is_closed_ends_at_once(tmp_path: Path) -> None:
    watch = FolderWatch([run_spec(tmp_path / "step-*")], None, 1000.0)
    closing = threading.Timer(0.1, watch.close)
    closing.start()
    assert watch.take() == Arrival()
    closing.join()


def test_a_folder_that_never_becomes_complete_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path / "step-2")
    (tmp_path / "step-2" / "config.json").unlink()
    watch = watch_of(tmp_path / "step-*")
    take_all(watch)
    assert [*watch.remarks()] == [f"{tmp_path}/step-2 is not complete: no config.json."]


def test_a_checkpoint_that_is_deleted_before_its_turn_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        write_weights(tmp_path / f"step-{step}")
    watch = watch_of(tmp_path / "step-*")
    watch.take()
    shutil.rmtree(tmp_path / "step-1")
    take_all(watch)
    assert [*watch.remarks()] == [f"Deleted before their turn: {tmp_path}/step-1."]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("20", WatchEnd(checkpoints=20)),
        (1, WatchEnd(checkpoints=1)),
        ("30m", WatchEnd(minutes=30.0)),
        ("0.5m", WatchEnd(minutes=0.5)),
    ],
)
def test_the_end_is_a_number_of_checkpoints_or_minutes(text: Any, end: WatchEnd) -> None:
    assert RunJobRequest("job.yaml", watch=True, until=text).until == end


@pytest.mark.parametrize("text", ["0", "-1", "0m", "2h", "30 min", "m", "1e3m", "nan", "9" * 5000, ""])
def test_another_end_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"a number of checkpoints \(20\), or minutes without a new one \(30m\)"):
        RunJobRequest("job.yaml", watch=True, until=text)


def test_an_end_without_a_watch_is_refused() -> None:
    with pytest.raises(ConfigError, match="`until` is the end of a watch"):
        RunJobRequest("job.yaml", until="20")


@pytest.mark.parametrize("text", ["20", "30m", "0.5m"])
def test_the_end_of_a_submitted_watch_is_written_as_it_was_given(text: str) -> None:
    assert str(RunJobRequest("job.yaml", watch=True, until=text).watching["until"]) == text


# Runs that fail


def test_the_failure_of_a_checkpoint_that_is_gone_says_so(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    (spec,) = watch.take().specs
    shutil.rmtree(folder)
    explained = watch.explain(spec, ModelError("a file is missing"))
    assert explained.message == f"'{folder}' was deleted while it was measured."


def test_the_failure_of_a_checkpoint_that_was_written_again_says_so(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    (spec,) = watch.take().specs
    write_weights(folder, 1)
    explained = watch.explain(spec, ModelError("other tensors"))
    assert explained.message == f"'{folder}' was written again while it was measured."


def test_another_failure_stays_as_it_is(tmp_path: Path) -> None:
    write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    (spec,) = watch.take().specs
    error = ModelError("of another family")
    assert watch.explain(spec, error) is error


def test_a_full_disk_stays_one(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "step-1")
    watch = watch_of(tmp_path / "step-*")
    (spec,) = watch.take().specs
    shutil.rmtree(folder)
    error = StorageFull("full")
    assert watch.explain(spec, error) is error
