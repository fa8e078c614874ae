"""A published warehouse: the same rows in a few files, a catalog that only points to them, a card."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.warehouses import activations, run_row, stats_of, write_measured

from avss_dist.errors import WarehouseError
from avss_dist.warehouse.publish import publish
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store


def test_what_is_published_is_what_the_warehouse_says(tmp_path: Path) -> None:
    root, folder = tmp_path / "warehouse", tmp_path / "published"
    for i, name in enumerate(("b", "a")):
        x = activations(seed=i, shards=2, scales=np.array([1.0, 3.0]))
        write_measured(root, name, stats_of(x), 2)
    Store(root).write_run(run_row("broken", status="failed"))
    warehouse = Warehouse(root)
    rows = publish(warehouse, str(folder))
    assert {*rows} == {"runs", "scores", "layer_stats"} and rows["runs"] == 2
    with duckdb.connect() as connection:
        connection.execute(f"SET file_search_path = '{folder}'")
        connection.execute(f"ATTACH '{folder / 'catalog.duckdb'}' AS catalog (READ_ONLY)")
        connection.execute("USE catalog")
        scores = connection.execute("FROM scores_at(0.003) ORDER BY ALL").to_arrow_table()
        (meaning,) = connection.execute(
            "SELECT comment FROM duckdb_columns() WHERE table_name = 'scores' AND column_name = 'rank'"
        ).fetchone() or ("",)
    assert scores.to_pylist() == warehouse.sql("FROM scores_at(0.003) ORDER BY ALL").to_pylist()
    assert "least important" in meaning
    stored = pq.read_table(folder / "data" / "scores.parquet")
    assert stored["run_id"].to_pylist() == sorted(stored["run_id"].to_pylist())
    order = [(name, "ascending") for name in ("run_id", "layer", "site", "recipe", "threshold", "threshold_kind")]
    assert stored.sort_by(order).equals(warehouse.table("scores").sort_by(order).select(stored.column_names))
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert [config["data_files"] for config in card["configs"]] == [f"data/{name}.parquet" for name in rows]


def test_what_cannot_be_published_to(tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    Store(root).write_run(run_row("broken", status="failed"))
    with pytest.raises(WarehouseError, match="has no finished run"):
        publish(Warehouse(root), str(tmp_path / "published"))
    with pytest.raises(WarehouseError, match="exists already, and is not empty"):
        publish(Warehouse(root), str(tmp_path))
    with pytest.raises(WarehouseError, match="'hf://datasets/org/name' is not a folder"):
        publish(Warehouse(root), "hf://datasets/org/name")
