"""Files of earlier versions, in which numbers stood for sublayers and experts, are read as those of this version."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.warehouses import identity_of, rewrite_as_schema_3, rewrite_file, run_row

from avss_dist.core.intervention import Expert, Removals, Sublayer, removal_columns
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

REMOVED: tuple[Removals, ...] = ((), (1,), (0, Sublayer(2, "attention"), Sublayer(1, "mlp")), (Expert(3, 12),))
TABLES = ("evaluations", "cells", "experiments")
EXPERIMENT = "5" * 20
CREATED = datetime(2026, 1, 1, tzinfo=UTC)


def write(root: Path, run_id: str) -> None:
    """Write an evaluation, its cells and an experiment without each of `REMOVED`."""
    store = Store(root)
    identity = identity_of(run_row(run_id))
    about = {"task": "perplexity:a.txt", "metric": "loss", "created_at": CREATED}
    evaluations: list[dict[str, Any]] = []
    experiments: list[dict[str, Any]] = []
    for place, removed in enumerate(REMOVED):
        row = {**about, **removal_columns(removed)}
        cell = {**row, "part": 0, "samples": [1.0], "weights": [2.0]}
        store.cells.write(identity, f"{place:020x}", [cell])
        row["value"] = float(place)
        evaluations.append({**row, "settings": "{}"})
        experiments.append({**row, "method": "avss", "share": 0.25, "experiment_id": EXPERIMENT})
    store.write_rows("evaluations", identity, evaluations)
    store.write_rows("experiments", identity, experiments, EXPERIMENT)
    store.write_run(run_row(run_id))


@pytest.fixture
def current(tmp_path: Path) -> Path:
    root = tmp_path / "current"
    write(root, "a")
    write(root, "b")
    return root


@pytest.fixture(params=["old", "mixed"])
def earlier(request: pytest.FixtureRequest, current: Path, tmp_path: Path) -> Path:
    """The same warehouse, with all of its files or those of one run in the old form."""
    root = Path(shutil.copytree(current, tmp_path / "earlier"))
    for table in TABLES:
        rewrite_as_schema_3(root / table / "run_id=a")
        if request.param == "old":
            rewrite_as_schema_3(root / table / "run_id=b")
    return root


def in_order(rows: pa.Table) -> list[dict[str, Any]]:
    return rows.sort_by([("run_id", "ascending")]).to_pylist()


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_the_same(current: Path, earlier: Path, table: str) -> None:
    assert in_order(Warehouse(earlier).table(table)) == in_order(Warehouse(current).table(table))


def test_old_files_are_not_damaged(earlier: Path) -> None:
    warehouse = Warehouse(earlier)
    for table in TABLES:
        warehouse.table(table)
    assert warehouse.damaged == {}


@pytest.mark.parametrize("table", TABLES)
def test_queries_see_the_same(current: Path, earlier: Path, table: str) -> None:
    query = f"SELECT run_id, drop, drop_parts, removals(drop, drop_parts) AS names FROM {table} ORDER BY ALL"
    assert Warehouse(earlier).sql(query).equals(Warehouse(current).sql(query))


def test_conditions_are_of_the_columns_as_they_are_now(earlier: Path) -> None:
    where = pc.list_value_length(pc.field("drop_parts")) == 1
    rows = Warehouse(earlier).table("evaluations", columns=["run_id", "drop_parts"], where=where)
    assert rows["drop_parts"].to_pylist() == [["expert.3.12"]] * 2


def test_cells_of_an_evaluation_are_the_same(current: Path, earlier: Path) -> None:
    assert Store(earlier).cells.read("a").equals(Store(current).cells.read("a"))


def test_compacted_copies_are_in_the_form_of_this_version(current: Path, earlier: Path) -> None:
    expected = in_order(Warehouse(current).table("evaluations"))
    assert Warehouse(earlier).compact()["evaluations"] == 2
    (part,) = (earlier / "compacted" / "evaluations").glob("*.parquet")
    assert "drop_parts" in pq.read_schema(part).names
    assert in_order(Warehouse(earlier).table("evaluations")) == expected


def test_a_damaged_old_file_is_left_out(earlier: Path) -> None:
    (path,) = (earlier / "evaluations" / "run_id=a").glob("*.parquet")
    rows = pq.ParquetFile(path).read()
    numbers = pa.array([[-1], [10_002], [None], None], pa.list_(pa.int32()))
    place = rows.column_names.index("drop")
    rewrite_file(path, rows.set_column(place, "drop", numbers), 3)
    warehouse = Warehouse(earlier)
    assert set(warehouse.table("evaluations")["run_id"].to_pylist()) == {"b"}
    assert warehouse.damaged["a"].table == "evaluations"
