"""Files and folders appear whole, or not at all, and arrays grow in memory or in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from avss_dist.core import files
from avss_dist.core.files import remove_leftovers, staged_file, staged_folder


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")
    target.chmod(0o640)
    with staged_file(target, durable=True) as staged:
        staged.write_text("new")
        assert target.read_text() == "old"
        assert staged.parent == tmp_path
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")
    with pytest.raises(RuntimeError), staged_file(target) as staged:
        staged.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    target = tmp_path / "kept" / "page.html"
    link = tmp_path / "latest.html"
    target.write_text("old")
    link.symlink_to(target)
    with staged_file(link) as staged:
        staged.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with staged_file(pipe) as staged:
        staged.write_text("new")
    reader.join()
    assert read == ["new"]
    assert pipe.is_fifo()


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), staged_file(tmp_path):
        raise AssertionError("nothing is staged")


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_whole_also_in_place_of_an_empty_one(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "a" / "new"
    if exists:
        target.mkdir(parents=True)
    with staged_folder(target) as staged:
        (staged / "file").write_text("x")
        assert not (target / "file").exists()
    assert list(target.parent.iterdir()) == [target]
    assert (target / "file").read_text() == "x"


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "new") as staged:
        (staged / "file").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(OSError), staged_folder(target) as staged:
        (staged / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_killed_writers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    end = ".avss-89abcdef-4711-12-0123abcd.tmp"
    others = [".notes.tmp", f"run.parquet{end}", f".run.parquet{end}.gz"]
    for name in (f".run.parquet{end}", *others):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, 0))
    fresh = tmp_path / f".fresh.parquet{end}"
    fresh.write_text("x")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, fresh.name}
    assert files._STAGED.fullmatch(files._fresh("run.parquet"))


HOLD = """
import sys, time
from pathlib import Path
from avss_dist.core.files import staged_folder
with staged_folder(Path(sys.argv[1])) as staged:
    (staged / "weights").write_text("x")
    print(staged.name, flush=True)
    time.sleep(600)
"""


def test_the_folder_of_a_killed_writer_is_deleted_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    """By the next writer beside it, whatever it writes."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = [writer.stdout.readline().strip() for writer in writers if writer.stdout]
    try:
        writers[0].kill()
        writers[0].wait()
        for name in names:
            os.utime(tmp_path / name / "weights", (0, 0))
            os.utime(tmp_path / name, (0, 0))  # a live writer may be slow
        with staged_folder(tmp_path / "other"):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {names[1], "other"}
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_a_process_of_the_same_number_is_not_the_writer(tmp_path: Path) -> None:
    """As in a container that was started again, where the command has the same number each time."""
    left = tmp_path / f".out.avss-{files._machine()}-{os.getpid()}-1-0123abcd.tmp"
    left.mkdir()
    with staged_folder(tmp_path / "new") as staged:
        remove_leftovers(tmp_path)
        assert staged.is_dir()
        assert not left.exists()


@pytest.mark.parametrize("machine", ["89abcdef", files._UNKNOWN])
def test_the_folder_of_a_writer_on_another_machine_is_kept_for_a_week(machine: str, tmp_path: Path) -> None:
    """Since the last change to anything in it."""
    left = tmp_path / f".out.avss-{machine}-4711-12-0123abcd.tmp"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "weights").write_text("x")
    for path in (left / "sub", left):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert (left / "sub" / "weights").exists()
    os.utime(left / "sub" / "weights", (0, 0))
    remove_leftovers(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("seconds", [files.LEFTOVER_SECONDS, files.LEFTOVER_FOLDER_SECONDS])
def test_a_clock_that_is_ahead_deletes_nothing_that_another_machine_writes(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = ".avss-89abcdef-4711-12-0123abcd.tmp"
    (tmp_path / f".run.parquet{end}").write_text("x")
    (tmp_path / f".weights{end}").mkdir()
    ahead = time.time() + 2 * seconds
    monkeypatch.setattr(time, "time", lambda: ahead)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".run.parquet{end}", f".weights{end}"}


def test_a_link_in_place_of_a_leftover_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    link = tmp_path / f".out.avss-{files._machine()}-{os.getpid()}-1-0123abcd.tmp"
    link.symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert link.is_symlink()
    assert (tmp_path / "mine").is_dir()


PIECES = np.split(np.arange(400_000, dtype=np.int32).reshape(-1, 4), [0, 1, 5_000, 60_000])


def spooled(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(files, "KEPT_BYTES", kept_bytes)
    growing = files.Spool(4)
    for piece in PIECES:
        growing.add(piece)
    return growing.array()


@pytest.mark.parametrize("kept_bytes", [1 << 30, 100_000, 0])
def test_rows_come_back_from_memory_or_from_a_file(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = spooled(kept_bytes, monkeypatch)
    assert np.array_equal(rows, np.concatenate(PIECES))
    assert rows.dtype == np.int32
    assert rows.flags.writeable == (kept_bytes == 1 << 30), "a file is mapped, and read only"
    assert files.Spool(4).array().shape == (0, 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_where_the_disk_is_full_the_rest_stays_in_memory(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    rows = spooled(100_000, monkeypatch)
    assert np.array_equal(rows, np.concatenate(PIECES))
