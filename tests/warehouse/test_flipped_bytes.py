"""A byte of a stored file that changes, as on a failing disk, changes no number: its run is left out and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command_line import avss
from support.warehouses import activations, stats_of, write_measured

from avss_dist.report.publish import publish
from avss_dist.warehouse import compaction, reader
from avss_dist.warehouse.reader import Warehouse

TABLES = ("runs", "scores", "layer_stats")
SUM = "SELECT count(*), bit_xor(hash(t)) FROM {} AS t"  # of all cells, in any order of rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with two runs. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "w"
    for seed, name in enumerate(("alpha-1", "beta-2")):
        write_measured(folder, name, stats_of(activations(seed, shards=2)), 8, num_tokens=128)
    return folder


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / "w")


@pytest.fixture
def copied(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A warehouse whose runs are read from parts."""
    monkeypatch.setattr(compaction, "MIN_RUNS", 1)
    monkeypatch.setattr(reader, "MIN_RUNS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def file_of(root: Path, table: str) -> Path:
    return min((root / table / "run_id=beta-2").glob("*.parquet"))


def flips(file: Path, number: int) -> Iterator[int]:
    """Flip bits of one byte after the other, at evenly spaced offsets, and yield the offset."""
    data = file.read_bytes()
    for offset in np.linspace(0, len(data) - 1, number).astype(int).tolist():
        file.write_bytes(data[:offset] + bytes([data[offset] ^ 0x15]) + data[offset + 1 :])
        yield offset
    file.write_bytes(data)


@pytest.mark.parametrize("table", TABLES)
def test_a_flipped_byte_leaves_its_run_out(table: str, root: Path) -> None:
    """Of a table, and of some offsets of a query too."""
    rows, query = Warehouse(root).table(table), SUM.format(table)
    rows = rows.filter(pa.compute.equal(rows["run_id"], "alpha-1"))
    expected = Warehouse(root).sql(f"{query} WHERE run_id = 'alpha-1'")
    for number, offset in enumerate(flips(file_of(root, table), 15)):
        warehouse = Warehouse(root)
        assert warehouse.table(table).equals(rows), offset
        assert number % 4 or Warehouse(root).sql(query).equals(expected), offset
        assert list(warehouse.damaged) == ["beta-2"], offset


@pytest.mark.parametrize("compact", [True, False])
def test_a_flipped_byte_of_a_part_changes_no_row(compact: bool, copied: Path, tmp_path: Path) -> None:
    if compact:
        Warehouse(copied).compact()
    expected = {name: Warehouse(copied).sql(SUM.format(name)) for name in ("runs", "scores")}
    for name, whole in expected.items():
        folder = copied / "compacted" / name if compact else next(tmp_path.glob(f"cache/**/{name}"))
        (part,) = folder.glob("*.parquet")
        for offset in flips(part, 4):
            warehouse = Warehouse(copied)
            assert warehouse.sql(SUM.format(name)).equals(whole), (name, offset)
            assert not warehouse.damaged


@pytest.mark.parametrize("table", TABLES)
def test_compaction_copies_no_damaged_run_and_names_it(table: str, copied: Path) -> None:
    for _ in flips(file_of(copied, table), 3):
        done = avss("compact", "-w", copied)
        assert done.exit_code == 0 and "1 run cannot be read: beta-2 (" in done.stderr
        parts = (copied / "compacted" / (table if table != "layer_stats" else "digests")).glob("*.parquet")
        copies = [json.loads(pq.read_metadata(part).metadata[b"avss_files"]) for part in parts]
        assert [run for runs in copies for run in runs] == ["alpha-1"]
        shutil.rmtree(copied / "compacted")


@pytest.mark.parametrize("table", TABLES)
def test_a_damaged_run_is_not_published(table: str, root: Path, tmp_path: Path) -> None:
    next(flips(file_of(root, table), 2))
    publish(warehouse := Warehouse(root), tmp_path / "site")
    assert list(warehouse.damaged) == ["beta-2"]
    for file in (tmp_path / "site" / "data").glob("*.parquet"):
        assert set(pq.read_table(file)["run_id"].to_pylist()) == {"alpha-1"}, file.name
