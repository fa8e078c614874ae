"""A published warehouse: the same rows in a few files, a catalog that only points to them, a card."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.hub import serving_hub
from support.warehouses import activations, run_row, stats_of, write_measured

from avss_dist.core.errors import ConfigError, RunFailed, WarehouseError
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.evaluation.continuations import Continuation, write_continuations
from avss_dist.warehouse.publish import PAGE, QUERIES, SCORES, publish
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


@pytest.mark.nightly
def test_texts_are_not_published(tmp_path: Path) -> None:
    warehouse = measured(tmp_path / "warehouse")
    (run_id,) = warehouse.runs()["run_id"].to_pylist()
    text = Continuation(variant="whole model", prompt="a secret", text="is told", key=NO_INTERVENTION.key)
    write_continuations(Store(warehouse.root), run_id, [text])
    assert Warehouse(warehouse.root).table("continuations").num_rows == 1
    assert "continuations" not in publish(Warehouse(warehouse.root), str(tmp_path / "published"))
    assert not list((tmp_path / "published").rglob("continuations*"))


@pytest.mark.nightly
def test_what_cannot_be_published_to(tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    Store(root).write_run(run_row("broken", status="failed"))
    with pytest.raises(WarehouseError, match="has no finished run"):
        publish(Warehouse(root), str(tmp_path / "published"))
    with pytest.raises(WarehouseError, match="exists already, and is not empty"):
        publish(measured(root), str(tmp_path))


def measured(root: Path) -> Warehouse:
    write_measured(root, "a", stats_of(activations(seed=0, shards=1, scales=np.array([1.0]))), 1)
    return Warehouse(root)


@pytest.mark.nightly
def test_a_data_set_of_the_hub_gets_the_same_files_in_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warehouse, folder = measured(tmp_path / "warehouse"), tmp_path / "published"
    with serving_hub(monkeypatch) as hub:
        rows = publish(warehouse, "hf://datasets/lab/scores")
        assert publish(warehouse, str(folder)) == rows
        there = hub.files["datasets/lab/scores"]
        of_folder = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert {*there} == {*of_folder} and [one["visibility"] for one in hub.created] == ["private"]
        assert all(
            there[name] == data for name, data in of_folder.items() if name not in ("catalog.duckdb", "README.md")
        )
        there["data/of-old.parquet"] = there["notes.md"] = b"old"
        publish(warehouse, "hf://datasets/lab/scores")
        assert {*there} == {*of_folder, "notes.md"}, "tables that are no more go; what people wrote stays"
        hub.refuses = True
        with pytest.raises(RunFailed, match=r"lab/scores could not be uploaded.*403.*\n.*publish to a folder"):
            publish(warehouse, "hf://datasets/lab/scores")


def write_site(folder: Path) -> None:
    (folder / PAGE).write_text("<!doctype html>")
    (folder / SCORES).write_bytes(b"PAR1")


@pytest.mark.nightly
def test_the_page_goes_to_a_space_that_the_card_links_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warehouse = measured(tmp_path / "warehouse")
    with serving_hub(monkeypatch) as hub:
        publish(warehouse, "hf://datasets/lab/scores", write_page=write_site, space="lab/layers")
        assert {"type": "space", "sdk": "static", "visibility": "private"}.items() <= hub.created[0].items()
        assert {*hub.files["spaces/lab/layers"]} == {PAGE, SCORES, "README.md"}
        about = yaml.safe_load(hub.files["spaces/lab/layers"]["README.md"].decode().split("---\n")[1])
        assert about["sdk"] == "static"
        assert PAGE in hub.files["datasets/lab/scores"]
        card = hub.files["datasets/lab/scores"]["README.md"].decode()
        assert "https://huggingface.co/spaces/lab/layers" in card
        links = re.findall(r"\((https://huggingface.co/datasets/lab/scores/viewer/scores/train\?[^)]*)\)", card)
        queries = [parse_qs(urlsplit(link).query)["sql"][0] for link in links]
        assert queries == list(QUERIES.values())
    with pytest.raises(ConfigError, match="is not the name of a space"):
        publish(warehouse, str(tmp_path / "x"), space="lab")


@pytest.mark.nightly
@pytest.mark.parametrize("question", QUERIES)
def test_ready_queries_have_rows(question: str, tmp_path: Path) -> None:
    publish(measured(tmp_path / "warehouse"), str(tmp_path / "published"))
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW train AS FROM '{tmp_path / 'published/data/scores.parquet'}'")
        assert connection.execute(QUERIES[question]).fetchall()
    assert QUERIES[question] in (tmp_path / "published/README.md").read_text()


@pytest.mark.nightly
def test_what_the_hub_would_not_take_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse = measured(tmp_path / "warehouse")
    monkeypatch.setattr("avss_dist.warehouse.publish._write_table", None)
    for target, says in {
        "hf://datasets/lab": "'lab' is not the name of a dataset",
        "hf://datasets/lab/sco res": "'lab/sco res' is not the name of a dataset",
        "hf://buckets/lab/scores": "'hf://buckets/lab/scores' is not a data set of the hub",
    }.items():
        with pytest.raises((ConfigError, WarehouseError), match=says):
            publish(warehouse, target)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"lab/scores cannot be uploaded .* without a token.*\n.*hf auth login"):
        publish(warehouse, "hf://datasets/lab/scores")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        publish(warehouse, "hf://datasets/lab/scores")
