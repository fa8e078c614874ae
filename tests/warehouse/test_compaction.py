"""Compaction: copies of many files in few, in the cache and in the warehouse, are like the files at each moment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from benchmarks.warehouse import main
from support.command_line import avss
from support.tiers import nightly
from support.warehouses import Terminal, activations, stats_of, write_measured, write_scores

from avss_dist.analysis.findings import findings
from avss_dist.warehouse import compaction, reader
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import TABLES
from avss_dist.warehouse.storage import Storage


def of_parts(monkeypatch: pytest.MonkeyPatch, minimum: int, maximum: int) -> None:
    """Make parts of a few runs."""
    monkeypatch.setattr(compaction, "MIN_RUNS", minimum)
    monkeypatch.setattr(reader, "MIN_RUNS", minimum)
    monkeypatch.setattr(compaction, "MAX_RUNS", maximum)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten runs. Not to be changed."""
    root = tmp_path_factory.mktemp("template") / "many"
    for i in range(10):
        write_scores(root, f"run-{i}", [1.0 + i, 2.0, 3.0, 4.0])
    return root


@pytest.fixture
def many(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten runs, copied in parts of three, at least two."""
    of_parts(monkeypatch, 2, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(template, tmp_path / "many")


SUMS = "SELECT count(*), count(DISTINCT run_id), sum(avss_smoothed) FROM scores JOIN runs USING (run_id)"


def sums(root: Path) -> tuple[int, int, float]:
    (row,) = Warehouse(root).sql(SUMS).to_pylist()
    return tuple(row.values())  # type: ignore[return-value]


def parts(root: Path) -> list[Path]:
    return sorted((root.parent / "cache").rglob("*.parquet"))


def delete_run(root: Path, run_id: str) -> None:
    for name in ("runs", "scores"):
        for file in (root / name / f"run_id={run_id}").iterdir():
            file.unlink()


def without_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let readers have no cache, and read few runs from parts too."""
    (tmp_path / "in-the-way").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in-the-way"))


def with_garbage(files: Iterator[Path]) -> None:
    """Replace the content of files, without a trace in their size and time of change."""
    for file in files:
        stat = file.stat()
        file.write_bytes(b"x" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def compacted(root: Path) -> list[Path]:
    return sorted((root / "compacted").rglob("*.parquet"))


def test_copies_hold_the_same_rows_and_spare_reading_the_files(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sums(many)
    assert first == (40, 10, 45 + 10 + 90) == sums(many)
    assert len(parts(many)) == 2 * 3  # of runs and of scores: 3 + 3 + 3, and one run that is read where it is
    copied = {name: Warehouse(many).table(name).sort_by("run_id") for name in TABLES}
    with monkeypatch.context() as patch:
        of_parts(patch, 1000, 1000)
        for name, table in copied.items():
            order = [("run_id", "ascending"), *([("layer", "ascending")] if "layer" in table.column_names else [])]
            assert table.sort_by(order).equals(Warehouse(many).table(name).sort_by(order)), name
    with_garbage(many.glob("scores/run_id=run-[0-8]/*.parquet"))
    assert sums(many) == first


def test_copying_is_shown_where_somebody_looks(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for shown in (True, False):  # what is copied is not copied again
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal := Terminal())
            sums(many)
        assert ("Copying the scores of 10 runs, once" in terminal.getvalue()) == shown
        assert shown or not terminal.getvalue()


def test_a_half_written_run_is_in_no_copy(many: Path) -> None:
    (many / "runs/run_id=run-3/run.parquet").unlink()
    assert sums(many)[:2] == (36, 9)


def test_a_damaged_copy_is_made_again(many: Path) -> None:
    before = sums(many)
    for part in parts(many):
        part.write_bytes(b"damaged")
    assert sums(many) == before == sums(many)


def test_without_a_cache_it_works_all_the_same(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cache(monkeypatch, tmp_path)
    assert sums(many) == (40, 10, 145)


# Parts in the warehouse itself.


def test_a_compacted_warehouse_is_read_from_its_parts_by_everybody(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sums(many)
    done = avss("compact", "-w", many)
    assert (done.exit_code, done.stderr) == (0, "") and "copied runs of 10 runs, scores of 10 runs" in done.stdout
    assert len(compacted(many)) == 2 * 4
    assert "every finished run was compacted before" in avss("compact", "-w", many).stdout
    without_cache(monkeypatch, tmp_path)
    for file in compacted(many):
        file.rename(file.with_suffix(".aside"))
    assert sums(many) == before, "the files stay valid without the parts"
    for file in (many / "compacted").rglob("*.aside"):
        file.rename(file.with_suffix(".parquet"))
    with_garbage(many.glob("scores/*/*.parquet"))
    assert sums(many) == before


@pytest.mark.parametrize("compactions", [2, *nightly(0, 1)])
def test_runs_that_come_change_and_go_are_seen(
    compactions: int, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache, after a compaction, and after another one."""
    if compactions:
        without_cache(monkeypatch, tmp_path)
        Warehouse(many).compact()
    else:
        sums(many)
    write_scores(many, "run-1", [100.0, 2.0, 3.0, 4.0])
    write_scores(many, "run-x", [1.0] * 4)
    delete_run(many, "run-5")
    if compactions == 2:
        assert Warehouse(many).compact()["scores"] == 2 + 2 + 2, "the changed and the new run, and those beside them"
        with_garbage(many.glob("scores/*/*.parquet"))
        assert len(compacted(many)) == 2 * 4, "parts that are out of date are gone"
    expected = (40, 10, 45 + 10 + 90 + 98 + 4 - 15)
    assert sums(many) == expected == sums(many)


@pytest.mark.nightly
def test_parts_of_a_version_with_other_columns_are_ignored(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_columns", lambda name: b"other")
        Warehouse(many).compact()
    others = compacted(many)
    with_garbage(iter(others))
    assert sums(many)[:2] == (40, 10)
    assert Warehouse(many).compact()["scores"] == 10 and set(others) < set(compacted(many))


class Killed(BaseException):
    """What ends a process at any point; nothing handles it."""


def before_each_change(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[str]:
    """Call a function with the number of each change of a file before it is made. Return the list of the changes."""
    changes: list[str] = []
    for name in ("write", "delete"):
        change = getattr(Storage, name)

        def counted(storage: Storage, path: str, *data: Any, change: Any = change, name: str = name) -> None:
            changes.append(f"{name} {path}")
            act(len(changes) - 1)
            change(storage, path, *data)

        monkeypatch.setattr(Storage, name, counted)
    return changes


@pytest.fixture(scope="module")
def changed_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compacted warehouse with a changed run, three new ones and one less. Not to be changed."""
    folder = tmp_path_factory.mktemp("changed")
    root = shutil.copytree(template, folder / "many")
    with pytest.MonkeyPatch.context() as patch:
        of_parts(patch, 2, 3)
        without_cache(patch, folder)
        Warehouse(root).compact()
    write_scores(root, "run-1", [100.0, 2.0, 3.0, 4.0])
    for name in ("x", "y", "z"):
        write_scores(root, f"run-{name}", [1.0] * 4)
    delete_run(root, "run-5")
    return root


@pytest.fixture
def changed(changed_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, whose readers have no cache."""
    of_parts(monkeypatch, 2, 3)
    without_cache(monkeypatch, tmp_path)
    return shutil.copytree(changed_template, tmp_path / "many")


EVERY_THIRD = [0, *nightly(1, 2)]  # change of a file, from one of the first three on
CHANGED = (48, 12, 45 + 10 + 90 + 98 + 12 - 15)


def assert_compacted(root: Path) -> None:
    """Every run is in one part, and readers see all of them."""
    held = [run for part in compacted(root) if part.parent.name == "scores" for run in run_ids(part)]
    assert len(held) == len(set(held)) == 12
    with_garbage(root.glob("scores/*/*.parquet"))
    assert sums(root) == CHANGED


def run_ids(part: Path) -> list[str]:
    return list(pc.unique(pq.ParquetFile(part).read(["run_id"])["run_id"]).to_pylist())


@pytest.mark.parametrize("first", EVERY_THIRD)
def test_compaction_that_is_killed_at_any_write_harms_nothing(
    first: int, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each write or deletion: readers see all runs, and the next compaction ends as if nothing had happened.

    It is the only proof that none of a compaction's steps can lose a row.
    """
    for last in count(first, 3):

        def kill(number: int, last: int = last) -> None:
            if number == last:
                raise Killed

        root = shutil.copytree(changed, changed.with_name(f"killed-{last}"))
        with monkeypatch.context() as patch:
            before_each_change(patch, kill)
            try:
                Warehouse(root).compact()
            except Killed:
                assert sums(root) == CHANGED
            else:
                break
        Warehouse(root).compact()
        assert_compacted(root)
    assert last > 6


@pytest.mark.nightly
@pytest.mark.parametrize("first", EVERY_THIRD)
def test_two_compactions_at_once_and_readers_during_both(
    first: int, changed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second compaction runs from start to end before a change of the first, which then goes on; at each change.

    It is the only proof that no interleaving loses a row.
    """
    for step in count(first, 3):
        root = shutil.copytree(changed, changed.with_name(f"both-{step}"))
        before = Warehouse(root)

        def interfere(number: int, step: int = step, root: Path = root, before: Warehouse = before) -> None:
            if number == step:
                Warehouse(root).compact()
                assert sums(root) == CHANGED
                assert before.table("scores").num_rows == CHANGED[0]

        with monkeypatch.context() as patch:
            changes = before_each_change(patch, interfere)
            Warehouse(root).compact()
        if len(changes) <= step:
            break
        assert sums(root) == CHANGED
        Warehouse(root).compact()
        assert_compacted(root)
    assert step > 6


def test_a_reader_whose_parts_are_replaced_reads_the_new_ones(changed: Path) -> None:
    replaced = []

    def rows(datasets: Any) -> pa.Table:
        if not replaced:  # the reader has opened the parts, and has not read them yet
            before = compacted(changed)
            Warehouse(changed).compact()
            replaced.extend(set(before) - set(compacted(changed)))
        return datasets["scores"].to_table(["avss_smoothed"])

    table = Warehouse(changed)._read(["scores"], rows)
    assert replaced and (table.num_rows, pc.sum(table.column(0)).as_py()) == (CHANGED[0], CHANGED[2])


# Digests of layer statistics.


@pytest.mark.nightly
def test_digests_from_parts_and_from_files_give_the_same_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "w"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in range(3):
        x = activations(seed)
        x[:, 2, :, :, 1] *= 100 * seed  # a unit that carries most of the variance
        write_measured(root, f"run-{seed}", stats_of(x), 8)
    expected, digests = findings(Warehouse(root)), Warehouse(root).digests(["run-1", "run-2"])
    assert "dominant_unit" in expected["kind"].to_pylist() and not parts(root)
    of_parts(monkeypatch, 1, 2)
    for _ in range(2):
        assert findings(Warehouse(root)).equals(expected)
    copied = Warehouse(root).digests(["run-1", "run-2"])
    order = [(name, "ascending") for name in ("run_id", "site", "layer")]
    assert copied.sort_by(order).equals(digests.sort_by(order))
    assert {path.parent.name for path in parts(root)} == {"runs", "scores", "digests"}


@pytest.mark.nightly
def test_the_benchmark_of_many_runs_measures_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["ls", "compare --by family", "query @drift"]
    main([str(tmp_path / "many"), "--runs", "24", "--layers", "4", "--rounds", "1", "--only", *wanted])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].strip() for line in lines[2:]] == wanted
    assert all(int(line[28:].split()[4].replace(",", "")) > 500 for line in lines[2:]), "each has printed its table"


@pytest.mark.nightly
def test_the_benchmark_counts_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.warehouse.os.environ", dict(os.environ))
    main([str(tmp_path / "many"), "--runs", "3", "--layers", "2", "--rounds", "2", "--s3", "--only", "ls", "compact"])
    lines = capsys.readouterr().out.splitlines()[2:]
    first, again = (int(number.strip(",")) for number in lines[0].split()[-2:])
    assert first >= again + 3, "the files of three runs are requested once"
    assert lines[1].startswith("compact ")
