"""A published warehouse: the same rows in a few files, a page, a card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.command_line import avss
from support.warehouses import activations, run_row, stats_of, write_measured

from avss_dist.core.errors import WarehouseError
from avss_dist.report.publish import publish
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store


def test_what_is_published_is_what_the_warehouse_says(tmp_path: Path) -> None:
    root, folder = tmp_path / "warehouse", tmp_path / "published"
    for i, name in enumerate(("b", "a")):
        x = activations(seed=i, shards=2, scales=np.array([1.0, 3.0]))
        write_measured(root, name, stats_of(x), 2)
    Store(root).write_run(run_row("broken", status="failed"))
    warehouse = Warehouse(root)
    rows = publish(warehouse, folder)
    assert {*rows} == {"runs", "scores", "layer_stats"} and rows["runs"] == 2
    stored = pq.read_table(folder / "data" / "scores.parquet")
    assert stored["run_id"].to_pylist() == sorted(stored["run_id"].to_pylist())
    order = [(name, "ascending") for name in ("run_id", "layer", "site", "recipe", "threshold", "threshold_kind")]
    assert stored.sort_by(order).equals(warehouse.table("scores").sort_by(order).select(stored.column_names))
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert [config["data_files"] for config in card["configs"]] == [f"data/{name}.parquet" for name in rows]
    assert (folder / "index.html").read_text().startswith("<!doctype html>")


@pytest.mark.nightly
def test_what_cannot_be_published_to(tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    Store(root).write_run(run_row("broken", status="failed"))
    with pytest.raises(WarehouseError, match="has no finished run"):
        publish(Warehouse(root), tmp_path / "published")
    with pytest.raises(WarehouseError, match="cannot be written: Directory not empty"):
        publish(measured(root), tmp_path)
    refused = avss("publish", "hf://datasets/lab/scores", "-w", root)
    assert refused.exit_code == 2 and "expected a folder of this machine" in refused.stderr


def measured(root: Path) -> Warehouse:
    write_measured(root, "a", stats_of(activations(seed=0, shards=1, scales=np.array([1.0]))), 1)
    return Warehouse(root)
