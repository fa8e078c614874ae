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
from support.command_line import avss
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
    columns = [column for column in EXPECTED["digests"][name]["columns"] if column not in REMOVED.get(name, ())]
    split = ["drop_parts"] if "drop" in columns else []
    rows = warehouse.table(name, columns=[*columns, *split]).to_pylist()
    assert not warehouse.damaged
    for row in rows if split else ():
        row["drop"] = [*map(str, row["drop"]), *row.pop("drop_parts")]
    keys = [key for key in EXPECTED["order"] if key in columns]
    return sorted(rows, key=lambda row: canonical([row[key] for key in keys]))


def json_lines(*command: object) -> list[dict[str, Any]]:
    """Return the objects that a command prints with ``--format json``, one for each line."""
    return list(map(json.loads, avss(*command, "--format", "json").stdout.splitlines()))


def test_every_table_was_written() -> None:
    assert EXPECTED["digests"].keys() == TABLES.keys() - LATER
    assert all(column(EXPECTED["digests"].values(), "rows"))


@pytest.mark.parametrize("name", EXPECTED["digests"])
def test_every_column_has_its_values(root: Path, name: str) -> None:
    expected = EXPECTED["digests"][name]
    rows = read_rows(root, name)
    assert len(rows) == expected["rows"]
    digests = {
        column: hashlib.sha256(canonical([row[column] for row in rows]).encode()).hexdigest()[:16] for column in rows[0]
    }
    assert digests == {column: digest for column, digest in expected["columns"].items() if column in digests}


def test_sublayers_are_read_by_name(root: Path) -> None:
    query = "SELECT removals(drop, drop_parts) AS removed FROM evaluations"
    rows = Warehouse(root).sql(f"{query} WHERE task LIKE 'sublayers:%' AND metric = 'loss'")
    removed = sorted(name for row in rows["removed"].to_pylist() for name in row)
    assert removed == [f"{part}.{layer}" for part in ("attention", "mlp") for layer in range(4)]


def test_statistics_partials_cells_and_patches_are_read(root: Path) -> None:
    store = Store(root)
    for run in store.reader.runs().to_pylist():
        assert run["status"] == "done"
        assert len(store.reader.read_layer_stats(run["run_id"])) == run["num_layers"] * len(run["sites"])
        assert len(store.reader.read_partials(run)) == run["num_shards"]
    cells = store.reader.table("cells", columns=["patch"])["patch"].drop_null().unique().to_pylist()
    assert set(cells) == store.storage.patch_keys() and len(cells) == 3
    assert all(store.storage.read_patch(key) for key in cells)


def test_commands_read_it(root: Path, tmp_path: Path) -> None:
    """The listing, the scores, the comparison and the page, which shows the repair that no longer exists."""
    runs = {row[0]: row for row in EXPECTED["values"]["runs"]["rows"]}
    assert set(column(json_lines("ls", "-w", root), "run_id")) == runs.keys()
    plans = avss("ls", "plans", "-w", root).stdout
    assert "attention.3" in plans and "mlp.0" in plans
    paired, plain = (run for run in runs if run.startswith("tiny"))
    for run in runs:
        scores = json_lines("show", "-w", root, "--run", run, "--threshold", "0.1")
        expected = [row[4] for row in EXPECTED["values"]["scores"]["rows"] if row[0] == run]
        assert column(scores, "avss_smoothed") == expected
    (pair,) = json_lines("compare", "-w", root, "--run", paired, "--run", plain, "--allow-mismatch")
    assert {pair["a_run_id"], pair["b_run_id"]} == {paired, plain}
    assert "rotated" not in REPAIRS
    assert avss("report", "-w", root, "-o", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in (*runs, "rotated"))
