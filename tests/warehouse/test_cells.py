"""Cells of evaluations: listed and read once by each store, and none of another process is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avss_dist.warehouse.schema import SCHEMAS, RunIdentity
from avss_dist.warehouse.storage import Storage
from avss_dist.warehouse.store import Store

RUN = RunIdentity(run_id="mine-1", model="mine", revision=None, family="llama")
OTHER = RunIdentity(run_id="other-2", model="other", revision=None, family="llama")
IDS = [f"{number:020x}" for number in range(4)]


def row(**changes: Any) -> dict[str, Any]:
    cell = {"task": "perplexity:a.txt", "metric": "loss", "drop": [1], "part": 0, "samples": [2.0], "weights": [3.0]}
    return cell | changes


class CountingStorage(Storage):
    """Storage that notes which folders it lists and which files it reads."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.listed: list[str | None] = []
        self.opened: list[str] = []

    def files(self, table: str, run_id: str | None = None) -> dict[str, tuple[str, str]]:
        self.listed.append(run_id)
        return super().files(table, run_id)

    def read(self, path: str) -> Any:
        self.opened.append(Path(path).stem)
        return super().read(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "w")
    store.storage = CountingStorage(tmp_path / "w")
    return store


def noted(store: Store) -> CountingStorage:
    assert isinstance(store.storage, CountingStorage)
    return store.storage


def test_an_evaluation_is_listed_once_and_its_own_cells_are_not_read(store: Store) -> None:
    store.write_cell(OTHER, IDS[3], [row()])
    assert store.cell_ids(RUN.run_id) == set()
    for cell_id in IDS[:2]:
        store.write_cell(RUN, cell_id, [row()])
        assert cell_id in store.cell_ids(RUN.run_id)
    assert noted(store).listed == [RUN.run_id]
    assert store.cells(RUN.run_id).num_rows == 2
    assert noted(store).opened == []


def test_kept_rows_are_the_rows_of_the_files(store: Store, tmp_path: Path) -> None:
    """Null and NaN among them, in the order of cell ids, whatever the order of writing."""
    for cell_id, seconds in ((IDS[2], float("nan")), (IDS[0], None)):
        store.write_cell(RUN, cell_id, [row(seconds=seconds, samples=[1.0, 2.5], weights=[0.0, 1.0]), row()])
    read = Store(tmp_path / "w").cells(RUN.run_id)
    kept = store.cells(RUN.run_id)
    assert kept.schema.equals(read.schema) and read.schema.equals(SCHEMAS["cells"])
    assert repr(kept.to_pylist()) == repr(read.to_pylist())
    assert read["seconds"].null_count == 4
    table = Store(tmp_path / "w").table("cells")
    assert repr(table.to_pylist()) == repr(read.to_pylist())


def test_cells_of_another_process_are_found_when_results_are_read(store: Store, tmp_path: Path) -> None:
    assert store.cell_ids(RUN.run_id) == set()
    another = Store(tmp_path / "w")
    another.write_cell(RUN, IDS[1], [row(part=1)])
    assert store.cell_ids(RUN.run_id) == set()  # it would be measured again
    store.write_cell(RUN, IDS[0], [row()])
    assert store.cells(RUN.run_id)["part"].to_pylist() == [0, 1]
    assert store.cell_ids(RUN.run_id) == {*IDS[:2]}
    assert noted(store).opened == [IDS[1]]
    store.cells(RUN.run_id)
    assert noted(store).opened == [IDS[1]]


def test_a_cell_measured_again_replaces_what_was_read(store: Store, tmp_path: Path) -> None:
    Store(tmp_path / "w").write_cell(RUN, IDS[0], [row()])
    assert store.cells(RUN.run_id)["samples"].to_pylist() == [[2.0]]
    store.write_cell(RUN, IDS[0], [row(samples=[5.0])])
    assert store.cells(RUN.run_id)["samples"].to_pylist() == [[5.0]]


def test_a_damaged_cell_is_left_out_and_noted(store: Store, tmp_path: Path) -> None:
    """A part of a file, and samples that are no numbers."""
    for cell_id in IDS[:2]:
        Store(tmp_path / "w").write_cell(RUN, cell_id, [row()])
    path = Path(store.storage.path("cells", RUN.run_id, IDS[0]))
    path.write_bytes(path.read_bytes()[:100])
    assert store.cells(RUN.run_id).num_rows == 1
    assert IDS[0] in store.damaged[RUN.run_id]
    store.write_cell(OTHER, IDS[0], [row()])
    store.write_cell(OTHER, IDS[1], [row(samples=[float("nan")])])
    assert store.cells(OTHER.run_id).num_rows == 1
    assert "samples" in store.damaged[OTHER.run_id]
    store.write_cell(OTHER, IDS[0], [row(samples=[float("nan")])])
    assert store.cells(OTHER.run_id).num_rows == 0
