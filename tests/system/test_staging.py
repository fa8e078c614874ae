"""Files and folders appear whole, or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from avss_dist.system import staging
from avss_dist.system.staging import remove_leftovers, staged_file, staged_folder


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("old")
    target.chmod(0o640)
    with staged_file(target, durable=True) as staged:
        staged.write_text("new")
        assert target.read_text() == "old" and staged.parent == tmp_path
    assert target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640
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
    target, link = tmp_path / "kept" / "page.html", tmp_path / "latest.html"
    target.write_text("old")
    link.symlink_to(target)
    with staged_file(link) as staged:
        staged.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with staged_file(pipe) as staged:
        staged.write_text("new")
    reader.join()
    assert read == ["new"] and pipe.is_fifo()


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
    assert (target / "file").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_leftovers_of_killed_writers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    ours = [".run.parquet.avss-0123abcd.tmp", ".run.parquet.4711-0123abcd.tmp"]
    others = [".notes.tmp", "run.parquet.avss-0123abcd.tmp", ".run.parquet.avss-0123abcd.tmp.gz"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, 0))
    fresh = tmp_path / ".fresh.parquet.avss-0123abcd.tmp"
    fresh.write_text("x")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, fresh.name}
    assert staging._STAGED.fullmatch(staging._fresh("run.parquet"))
