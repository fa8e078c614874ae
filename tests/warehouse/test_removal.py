"""Removal of runs and evaluations: what goes, what stays, and what a reader sees if it is killed at any moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command_line import avss, files, mistake, succeed
from support.rows import columns
from support.warehouses import Stats, activations, stats_of, write_measured, write_scores
from typer.testing import CliRunner

import avss_dist
from avss_dist.cli import app
from avss_dist.core.errors import ConfigError, NoRuns, QueryError, WarehouseError
from avss_dist.core.files import LEFTOVER_SECONDS, process_mark
from avss_dist.warehouse import compaction, reader
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.removal import QUIET_SECONDS, Catalog
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
RUN, OTHER, SECOND = "llama-aaaaaaaaaa", "gemma-bbbbbbbbbb", "llama-cccccccccc"
EVALUATION = "llama-dddddddddd"


def write_evaluation(
    root: Path, run_id: str, revision: str, *, patch: bytes | None = None, result: bool = True
) -> None:
    """Write two cells of an evaluation of a checkpoint and its result, perhaps with a repair."""
    store = Store(root)
    run = RunIdentity(run_id=run_id, model="org/llama", revision=revision, family="llama")
    key = store.storage.write_patch(patch) if patch else None
    about = {
        "task": "perplexity:heldout.txt",
        "metric": "loss",
        "drop": [],
        "drop_parts": [],
        "created_at": MOMENT,
        "patch": key,
    }
    for part in range(2):
        store.cells.write(run, f"{part:020x}", [{**about, "part": part, "samples": [1.0], "weights": [1.0]}])
    if result:
        store.write_rows("evaluations", run, [{**about, "value": 1.0}])


@pytest.fixture(scope="module")
def shards() -> list[Stats]:
    return stats_of(activations(shards=2))


@pytest.fixture(scope="module")
def template(shards: list[Stats], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two checkpoints, one with an evaluation, a repair and experiments. Not to be changed."""
    root = tmp_path_factory.mktemp("template") / "w"
    write_measured(root, RUN, shards, 8, model="org/llama", revision="1")
    write_scores(root, OTHER, [1.0, 2.0, 3.0], model="org/gemma", revision="2")
    write_evaluation(root, EVALUATION, "1", patch=b"repair")
    run = RunIdentity(run_id=RUN, model="org/llama", revision="1", family="llama")
    tried = {
        "method": "avss",
        "share": 0.25,
        "task": "perplexity:heldout.txt",
        "metric": "loss",
        "drop": [1],
        "drop_parts": [],
    }
    for name in ("1" * 20, "2" * 20):
        Store(root).write_rows("experiments", run, [{**tried, "created_at": MOMENT}], name)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(template, tmp_path / "w")


def ids(root: Path) -> set[str]:
    """Return the ids that anything in a warehouse is stored under."""
    return {path.name.removeprefix("run_id=") for path in root.glob("*/run_id=*")}


def age(root: Path, seconds: float) -> None:
    """Let all files of a warehouse be as old as that."""
    moment = time.time() - seconds
    for path in root.rglob("*"):
        os.utime(path, (moment, moment))


def removed(root: Path, *names: str, **options: Any) -> set[tuple[str, str]]:
    """Remove runs, and return the kind and the id of all that was removed."""
    rows = avss_dist.rm(list(names), warehouse=root, **options).table().to_pylist()
    return set(columns(rows, "kind", "run_id"))


def test_a_run_goes_from_every_table_and_other_runs_stay_as_they_are(root: Path) -> None:
    before = files(root)
    avss_dist.rm(OTHER, warehouse=root)
    assert files(root) == {path: data for path, data in before.items() if OTHER not in path}


def test_evaluations_and_repairs_go_with_the_last_run_of_their_checkpoint(root: Path) -> None:
    kinds = removed(root, RUN)
    assert {kind for kind, _ in kinds} == {"run", "evaluation", "patch"}
    assert ids(root) == {OTHER}
    assert not list((root / "patches").iterdir())


def test_the_table_counts_files_rows_and_bytes(root: Path) -> None:
    rows = avss_dist.rm(RUN, warehouse=root, dry_run=True).table().to_pylist()
    stored = {row["table"]: row for row in rows if row["run_id"] == RUN}
    assert stored["shard_stats"]["files"] == 2
    assert stored["shard_stats"]["rows"] == 2 * 8
    sizes = [path.stat().st_size for path in (root / "shard_stats").rglob("*.parquet")]
    assert stored["shard_stats"]["bytes"] == sum(sizes)


@pytest.mark.parametrize("changes", [{"status": "done"}, {"status": "failed", "revision": None}])
def test_evaluations_that_another_run_may_share_stay(changes: dict[str, Any], root: Path) -> None:
    """A run of the checkpoint, and one of the same name whose checkpoint is not known."""
    write_scores(root, SECOND, [1.0, 2.0], model="org/llama", **{"revision": "1", **changes})
    assert removed(root, RUN) == {("run", RUN)}
    assert EVALUATION in ids(root)


def test_evaluations_go_with_the_second_of_two_runs(root: Path) -> None:
    write_scores(root, SECOND, [1.0, 2.0], model="org/llama", revision="1")
    assert ("evaluation", EVALUATION) in removed(root, RUN, SECOND)


def test_evaluations_of_another_checkpoint_of_the_model_stay(root: Path) -> None:
    write_evaluation(root, "llama-eeeeeeeeee", "3")
    removed(root, RUN)
    assert ids(root) == {OTHER, "llama-eeeeeeeeee"}


def test_evaluations_stay_if_they_are_to_be_kept(root: Path) -> None:
    assert removed(root, RUN, keep_evaluations=True) == {("run", RUN)}


def test_a_failed_run_takes_no_evaluation_with_it(root: Path) -> None:
    write_scores(root, SECOND, [1.0], model="org/llama", revision="1", status="failed")
    removed(root, RUN, keep_evaluations=True)
    assert removed(root, SECOND) == {("run", SECOND)}


def test_a_repair_that_another_evaluation_names_stays(root: Path) -> None:
    write_evaluation(root, "llama-eeeeeeeeee", "3", patch=b"repair")
    removed(root, RUN)
    assert len(list((root / "patches").iterdir())) == 1


# Names.


def test_an_evaluation_is_named_like_a_run_where_no_run_has_the_name(root: Path) -> None:
    removed(root, RUN, keep_evaluations=True)
    assert ("evaluation", EVALUATION) in removed(root, "llama")
    assert ids(root) == {OTHER}


def test_a_model_names_all_of_its_runs(root: Path) -> None:
    write_scores(root, SECOND, [1.0, 2.0], model="org/llama", revision="1")
    assert {("run", RUN), ("run", SECOND)} <= removed(root, "org/llama")


def test_a_part_of_several_ids_is_refused_with_the_candidates(root: Path) -> None:
    write_scores(root, "gemma-b1", [1.0], model="org/gemma")
    with pytest.raises(QueryError, match="'gemma-b' is part of 2 runs") as caught:
        removed(root, "gemma-b")
    assert OTHER in str(caught.value.hint)
    assert OTHER in ids(root)


def test_an_unknown_name_is_refused_with_the_nearest(root: Path) -> None:
    with pytest.raises(QueryError, match="Did you mean 'gemma-bbbbbbbbbb'"):
        removed(root, "gemma-bbbbbbbbbc")


def test_an_empty_warehouse_says_why(tmp_path: Path) -> None:
    with pytest.raises(NoRuns, match="is not a warehouse"):
        avss_dist.rm("a", warehouse=tmp_path)


@pytest.mark.parametrize("values", [{}, {"run": ""}])
def test_what_is_to_be_removed_must_be_named(values: dict[str, Any], root: Path) -> None:
    with pytest.raises(ConfigError, match=r"`run` is empty|no `run` is named"):
        avss_dist.rm(**values, warehouse=root)


# Runs that are not whole.


@pytest.mark.parametrize("others", [True, False])
def test_a_damaged_run_is_removed(others: bool, root: Path) -> None:
    if not others:
        removed(root, OTHER)
    (root / f"runs/run_id={RUN}/run.parquet").write_bytes(b"damaged")
    assert ("run", RUN) in removed(root, RUN)
    assert RUN not in ids(root)


def test_an_unfinished_run_is_removed_with_its_description(root: Path) -> None:
    write_process(root, ended_process(), MOMENT)
    (root / f"runs/run_id={RUN}/run.parquet").unlink()
    assert ("run", RUN) in removed(root, "org/llama")
    assert not list((root / "runs").glob(".plan-*"))


def test_a_run_that_has_stored_nothing_yet_is_shown(root: Path) -> None:
    write_process(root, ended_process(), MOMENT)
    for table in ("runs", "shard_stats"):
        shutil.rmtree(root / table / f"run_id={RUN}")
    for table in ("scores", "layer_stats", "experiments"):
        shutil.rmtree(root / table / f"run_id={RUN}")
    assert "│ run, unfinished" in succeed("rm", RUN, "-w", root, "--yes").stdout


def ended_process() -> str:
    """Return the mark of a process of this machine that has ended."""
    code = "from avss_dist.core.files import process_mark; print(process_mark())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def write_process(root: Path, mark: str, started_at: datetime) -> None:
    """Describe a run as one that a process measures."""
    plan = {"model": "org/llama", "started_at": started_at.isoformat(), "process": mark}
    (root / "runs" / f".plan-{RUN}").write_text(json.dumps(plan))


ELSEWHERE = "12345678-1-1"


def test_a_run_that_a_process_of_this_machine_measures_is_refused(root: Path) -> None:
    write_process(root, process_mark(), MOMENT)
    with pytest.raises(ConfigError, match=f"{RUN} is being measured by process {os.getpid()}"):
        removed(root, RUN)
    assert RUN in ids(root)


def test_a_run_that_another_machine_may_be_measuring_is_refused(root: Path) -> None:
    write_process(root, ELSEWHERE, MOMENT)
    with pytest.raises(ConfigError, match="may be being measured"):
        removed(root, RUN)


def test_a_run_that_another_machine_has_just_begun_is_refused(root: Path) -> None:
    age(root, LEFTOVER_SECONDS + 60)
    write_process(root, ELSEWHERE, datetime.now(UTC))
    with pytest.raises(ConfigError, match="may be being measured"):
        removed(root, RUN)


def test_a_run_that_another_machine_left_long_ago_is_removed(root: Path) -> None:
    age(root, LEFTOVER_SECONDS + 60)
    write_process(root, ELSEWHERE, MOMENT)
    assert ("run", RUN) in removed(root, RUN)


def test_an_evaluation_whose_cells_are_still_coming_is_refused_for_a_while(root: Path) -> None:
    write_evaluation(root, "llama-eeeeeeeeee", "1", result=False)
    with pytest.raises(ConfigError, match="llama-eeeeeeeeee may be being measured"):
        removed(root, RUN)
    age(root, QUIET_SECONDS + 60)
    assert ("evaluation", "llama-eeeeeeeeee") in removed(root, RUN)


# What nobody reads.


def test_cells_without_a_result_and_repairs_without_a_cell_are_unused(root: Path) -> None:
    write_evaluation(root, "llama-eeeeeeeeee", "1", patch=b"other", result=False)
    key = Storage(root).write_patch(b"nobody's")
    age(root, LEFTOVER_SECONDS + 60)
    kinds = removed(root, unused=True)
    assert {("cells", "llama-eeeeeeeeee"), ("patch", key)} < kinds
    assert len(kinds) == 3, "and the repair of those cells"
    assert ids(root) == {RUN, OTHER, EVALUATION}
    assert len(list((root / "patches").iterdir())) == 1


def test_what_was_written_a_moment_ago_may_be_in_use(root: Path) -> None:
    write_evaluation(root, "llama-eeeeeeeeee", "1", result=False)
    Storage(root).write_patch(b"nobody's yet")
    assert not removed(root, unused=True)


def test_files_of_no_run_are_unused(root: Path) -> None:
    for table in ("runs", "shard_stats"):
        shutil.rmtree(root / table / f"run_id={RUN}")
    assert ("leftover", RUN) in removed(root, unused=True)
    assert ids(root) == {OTHER, EVALUATION}


def test_shards_that_a_command_continues_from_are_used(root: Path) -> None:
    (root / f"runs/run_id={RUN}/run.parquet").unlink()
    assert not removed(root, unused=True)


# Parts of several runs.


def test_a_part_of_several_runs_is_written_again_without_the_run(root: Path) -> None:
    Warehouse(root).compact()
    assert copied(root, RUN) == ["digests", "runs", "scores"]
    removed(root, RUN, keep_evaluations=True)
    assert copied(root, RUN) == []
    assert copied(root, OTHER) == ["runs", "scores"]


def test_parts_are_deleted_with_their_last_run(root: Path) -> None:
    Warehouse(root).compact()
    removed(root, RUN, OTHER)
    assert not list((root / "compacted").rglob("*.parquet"))


def test_a_part_of_another_version_is_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells which runs it copies."""
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_columns", lambda name: b"other")
        Warehouse(root).compact()
    removed(root, RUN)
    assert copied(root, RUN) == []


def test_copies_in_the_cache_are_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compaction, reader):
        monkeypatch.setattr(module, "MIN_RUNS", 1)
    Warehouse(root).table("scores")
    assert copied(root, RUN) == ["runs", "scores"]
    removed(root, RUN)
    assert copied(root, RUN) == []


# Readers, and a removal that is killed.


def test_experiments_are_those_of_whole_runs(root: Path) -> None:
    assert Warehouse(root).table("experiments").num_rows == 2
    (root / f"runs/run_id={RUN}/run.parquet").unlink()
    assert Warehouse(root).table("experiments").num_rows == 0


WRITTEN = ("runs", "scores", "layer_stats", "shard_stats", "experiments", "evaluations", "cells")


class Killed(BaseException):
    """The end of a process at any point. Nothing handles it."""


def killed_before(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill this process before a change of a file. Folders go file by file, the last name first."""
    changes = count()

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if next(changes) == number:
                raise Killed
            return function(*arguments)

        return counted

    unlink, remove_tree = change(Path.unlink), change(shutil.rmtree)

    def remove_folder(storage: Storage, table: str, run_id: str) -> None:
        folder = Path(storage.base) / table / f"run_id={run_id}"
        for path in sorted(folder.iterdir(), reverse=True):
            unlink(path)
        remove_tree(folder)

    monkeypatch.setattr(Storage, "remove_folder", remove_folder)
    for name in ("write", "delete", "remove_patch"):
        monkeypatch.setattr(Storage, name, change(getattr(Storage, name)))


def copied(root: Path, run_id: str) -> list[str]:
    """Return the names of the tables of which a part in the warehouse or in the cache copies a run."""
    folders = (root / "compacted", root.parent / "cache")
    parts = [path for folder in folders for path in folder.rglob("*.parquet")]
    return sorted(path.parent.name for path in parts if run_id.encode() in path.read_bytes())


def seen(root: Path) -> dict[str, int]:
    """Return the number of rows of a run and its evaluation that readers see, by table."""
    warehouse = Warehouse(root)
    rows = {name: warehouse.table(name, run_ids=[RUN, EVALUATION]).num_rows for name in WRITTEN}
    assert not warehouse.damaged
    return rows


@pytest.mark.nightly
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_removal_that_is_killed_at_any_change_leaves_whole_runs_or_nothing(
    first: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every third change: readers see all tables of the run or none, and the same command removes the rest.

    It is the only proof that no step of a removal leaves half a run.
    """
    of_run = [name for name in WRITTEN if name not in ("evaluations", "cells")]
    age(root, LEFTOVER_SECONDS + 60)
    Warehouse(root).compact()
    whole = seen(root)
    states = set()
    for number in count(first, 3):
        place = shutil.copytree(root, root.with_name(f"killed-{number}"))
        with monkeypatch.context() as patch:
            killed_before(number, patch)
            try:
                removed(place, RUN)
            except Killed:
                now = seen(place)
            else:
                break
        states.add(tuple(now[name] for name in of_run))
        assert now["evaluations"] in (0, whole["evaluations"])
        if RUN in Catalog(Warehouse(place)).runs or RUN in ids(place):
            removed(place, RUN)
        removed(place, unused=True)
        assert ids(place) == {OTHER}
        assert not list((place / "patches").iterdir())
        assert not copied(place, RUN) and not copied(place, EVALUATION)
    assert states == {tuple(whole[name] for name in of_run), (0,) * len(of_run)}
    assert number > 20


# The command.


def answered(answer: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    """Run a command on a terminal on which somebody answers."""
    monkeypatch.setattr("avss_dist.cli.read.can_ask", lambda: True)
    return CliRunner().invoke(app, [str(word) for word in words], input=answer)


def test_without_a_terminal_nothing_is_removed_unasked(root: Path) -> None:
    before = files(root)
    assert "--yes removes without a question" in mistake("rm", OTHER, "-w", root)
    assert files(root) == before


def test_an_unknown_name_is_refused_without_a_terminal(root: Path) -> None:
    done = CliRunner().invoke(app, ["rm", "nothing", "-w", str(root)])
    assert "Unknown run 'nothing'" in done.stderr


def test_a_dry_run_shows_what_would_go(root: Path) -> None:
    before = files(root)
    shown = succeed("rm", RUN, "-w", root, "--dry-run")
    assert RUN in shown.stdout and EVALUATION in shown.stdout
    assert "Without it: 1 run, 1 evaluation, 1 repair: " in shown.stderr
    assert files(root) == before


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "no\n"])
def test_nothing_but_a_yes_removes(answer: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(root)
    done = answered(answer, monkeypatch, "rm", OTHER, "-w", root)
    assert done.exit_code == 0
    assert files(root) == before
    assert "Nothing was removed." in done.stderr


def test_a_yes_removes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = answered("y\n", monkeypatch, "rm", OTHER, "-w", root)
    assert done.exit_code == 0 and "Removed 1 run: 2 files" in done.stderr, done.stderr
    assert OTHER not in ids(root)


def test_a_question_is_not_asked_with_yes(root: Path) -> None:
    assert "[y/N]" not in succeed("rm", OTHER, "-w", root, "--yes").stderr
    assert OTHER not in ids(root)


def test_evaluations_that_stay_are_told(root: Path) -> None:
    write_scores(root, SECOND, [1.0, 2.0], model="org/llama", revision="1")
    told = succeed("rm", RUN, "-w", root, "--dry-run").stderr
    assert "1 evaluation stays, as other runs share it." in told


def test_nothing_unused_is_told(root: Path) -> None:
    assert "nothing is unused" in succeed("rm", "--unused", "-w", root, "--yes").stdout


def test_what_cannot_be_deleted_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    storage = Storage(root)
    monkeypatch.setattr(storage, "filesystem", SimpleNamespace(delete_dir=refuse))
    with pytest.raises(WarehouseError, match=f"Cannot delete .*run_id={RUN}: Permission denied"):
        storage.remove_folder("runs", RUN)


def test_an_interrupted_removal_says_how_it_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(storage: Storage, table: str, run_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "remove_folder", interrupt)
    done = avss("rm", OTHER, "-w", root, "--yes")
    assert done.exit_code == 130
    assert "Stopped, a part is removed; run the same command again to finish." in done.stderr
