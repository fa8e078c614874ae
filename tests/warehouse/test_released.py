"""A warehouse that version 0.1.0 wrote is read, with the values that version 0.1.0 read from it.

``schema_3/warehouse.tar.xz`` holds two random models: a Llama of four layers, which was scored on plain and on paired
text, ablated with its sublayers, evaluated by a plan, and put through two experiments with a repair that no longer
exists, a search, a residual scale and a sparsity; and a Mixtral of two layers with its experts. ``expected.json`` was
written by the reader of version 0.1.0. It has the values of some columns, and a digest of every column of every table.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import avss, json_rows, succeed
from support.rows import column
from support.warehouses import unpack_released

from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import TABLES
from avss_dist.warehouse.store import Store

FOLDER = Path(__file__).parent / "schema_3"
LATER = {"precision"}  # tables that this version did not have
REMOVED = {"experiments": {"sparsity"}}  # columns that nothing writes any more
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_released(tmp_path_factory.mktemp("released"))


def canonical(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


def read_rows(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a table in the order of the keys in ``expected.json``, with removals by name."""
    warehouse = Warehouse(root)
    removed = REMOVED.get(name, set())
    names = [stored for stored in EXPECTED["digests"][name]["columns"] if stored not in removed]
    has_parts = "drop" in names
    if has_parts:
        names.append("drop_parts")
    rows = warehouse.table(name, columns=names).to_pylist()
    assert not warehouse.damaged
    for row in rows:
        if has_parts:
            row["drop"] = [str(layer) for layer in row["drop"]] + row.pop("drop_parts")
    return sorted(rows, key=place_of)


def place_of(row: dict[str, Any]) -> str:
    """Return what rows are sorted by: the keys that their table has."""
    return canonical([row[key] for key in EXPECTED["order"] if key in row])


def digest_of(values: list[Any]) -> str:
    """Return the digest of a column as ``expected.json`` has it."""
    return hashlib.sha256(canonical(values).encode()).hexdigest()[:16]


def printed_rows(*command: object) -> list[dict[str, Any]]:
    """Return the rows that a command prints with ``--format json``."""
    return json_rows(avss(*command, "--format", "json").stdout)


def test_every_table_was_written() -> None:
    assert EXPECTED["digests"].keys() == TABLES.keys() - LATER
    assert all(column(EXPECTED["digests"].values(), "rows"))


@pytest.mark.parametrize("name", EXPECTED["digests"])
def test_every_column_has_its_values(root: Path, name: str) -> None:
    expected = EXPECTED["digests"][name]
    rows = read_rows(root, name)
    assert len(rows) == expected["rows"]
    for stored in rows[0]:
        assert digest_of(column(rows, stored)) == expected["columns"][stored], stored


def test_sublayers_are_read_by_name(root: Path) -> None:
    query = "SELECT unnest(removals(drop, drop_parts)) AS removed FROM evaluations"
    rows = Warehouse(root).sql(f"{query} WHERE task LIKE 'sublayers:%' AND metric = 'loss' ORDER BY removed")
    attention = [f"attention.{layer}" for layer in range(4)]
    assert rows["removed"].to_pylist() == attention + [f"mlp.{layer}" for layer in range(4)]


def test_statistics_and_partials_are_read(root: Path) -> None:
    reader = Warehouse(root)
    for run in reader.runs().to_pylist():
        assert run["status"] == "done"
        stats = reader.read_layer_stats(run["run_id"])
        assert len(stats) == run["num_layers"] * len(run["sites"])
        assert len(reader.read_partials(run)) == run["num_shards"]


def test_cells_and_patches_are_read(root: Path) -> None:
    store = Store(root)
    cells = store.reader.table("cells", columns=["patch"])
    patches = cells["patch"].drop_null().unique().to_pylist()
    assert len(patches) == 3
    assert set(patches) == store.storage.patch_keys()
    for key in patches:
        assert store.storage.read_patch(key)


RUNS = [row[0] for row in EXPECTED["values"]["runs"]["rows"]]


def test_commands_list_it(root: Path) -> None:
    assert set(column(printed_rows("ls", "-w", root), "run_id")) == set(RUNS)
    plans = avss("ls", "plans", "-w", root).stdout
    assert "attention.3" in plans
    assert "mlp.0" in plans


@pytest.mark.parametrize("run", RUNS)
def test_commands_show_its_scores(root: Path, run: str) -> None:
    scores = printed_rows("show", "-w", root, "--run", run, "--threshold", "0.1")
    expected = [row[4] for row in EXPECTED["values"]["scores"]["rows"] if row[0] == run]
    assert column(scores, "avss_smoothed") == expected


def test_commands_compare_its_runs(root: Path) -> None:
    paired, plain = (run for run in RUNS if run.startswith("tiny"))
    (pair,) = printed_rows("compare", "-w", root, "--run", paired, "--run", plain, "--allow-mismatch")
    assert {pair["a_run_id"], pair["b_run_id"]} == {paired, plain}


@pytest.mark.nightly
def test_a_report_on_it_shows_the_repair_that_no_longer_exists(root: Path, tmp_path: Path) -> None:
    assert "rotated" not in REPAIRS
    succeed("report", "-w", root, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (*RUNS, "rotated"):
        assert text in page
