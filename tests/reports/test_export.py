"""Scores as data and as pictures, and published: the same rows in a few files, a page, a card."""

from __future__ import annotations

import csv
import errno
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.command_line import avss, json_rows, succeed
from support.rows import column
from support.warehouses import activations, run_row, stats_of, write_every_table, write_measured, write_scores

from avss_dist.core.errors import QueryError, WarehouseError
from avss_dist.reports.publish import NOT_PUBLISHED, publish
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import TABLES
from avss_dist.warehouse.store import Store

HOSTILE = r"org/a_b&c%$#{}~^\ <b>|`x`*"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warehouse")
    x = activations()
    write_measured(root, "tiny-1", stats_of(x, before=0.7 * x), 8, model=HOSTILE)
    write_measured(root, "tiny-2", stats_of(activations(1)), 8, model="/home/me/models/tiny")
    return root


def exported(root: Path, kind: str, *args: object) -> str:
    result = succeed("show", "-w", root, "--format", kind, *args)
    assert result.stderr == ""
    return str(result.stdout)


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


CHOSEN = ("--run", "tiny-*", "--recipe", "element", "--threshold", "1e-2")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_file_has_what_is_printed(root: Path, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "table"
    assert exported(root, kind, *CHOSEN, "-o", file).split() == [str(file)]
    assert file.read_text(encoding="utf-8") == exported(root, kind, *CHOSEN)


@pytest.mark.parametrize(("kind", "read"), [("csv", csv_rows), ("json", json_rows)])
def test_data_is_the_scores_as_they_are(root: Path, kind: str, read: Callable[[str], list[dict[str, Any]]]) -> None:
    reading = {"site": "block", "recipe": "element", "threshold": 0.01, "threshold_kind": "absolute"}
    expected = Warehouse(root).scores(**reading).sort_by([("run_id", "ascending"), ("layer", "ascending")])
    assert len(expected) == 16
    rows = read(exported(root, kind, *CHOSEN))
    for row, stored in zip(rows, expected.to_pylist(), strict=True):
        assert row["run_id"] == stored["run_id"]
        assert int(row["layer"]) == stored["layer"]
        assert float(row["avss_smoothed"]) == stored["avss_smoothed"]
        assert row["exactness"] == "exact"
        assert float(row["near_zero_low"]) == stored["near_zero_count"]
        assert float(row["near_zero_high"]) == stored["near_zero_count"]


def test_names_are_no_formulas_in_a_spreadsheet(tmp_path: Path) -> None:
    """Neither as they are nor indented."""
    write_scores(tmp_path, "a", [1.0, 2.0, 3.0, 4.0], model="=HYPERLINK(0)", family="@x", revision="-1+1")
    write_scores(tmp_path, "b", [1.0, 2.0, 3.0, 4.0], model=" =1+1", family="\n=1+1", revision="\x1b=1")
    first, *_ = csv_rows(exported(tmp_path, "csv", "--run", "a"))
    assert first["model"] == "'=HYPERLINK(0)"
    assert first["family"] == "'@x"
    assert first["revision"] == "'-1+1"
    text = exported(tmp_path, "csv", "--run", "b")
    indented, *_ = csv_rows(text)
    assert indented["model"] == "' =1+1"
    assert indented["family"] == "'\n=1+1"
    assert "\ufffd=1" in text
    as_json, *_ = json_rows(exported(tmp_path, "json", "--run", "b"))
    assert as_json["model"] == " =1+1"


@pytest.mark.nightly
def test_an_old_file_outlives_a_write_that_fails(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, a page or a picture is not lost to half of another."""
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: full(path, text.encode()))
    for name, args in (("old.html", ["report", "-w", root]), ("old.svg", ["show", "-w", root])):
        file = tmp_path / name
        with file.open("w") as stream:
            stream.write("old")
        result = avss(*args, "-o", file, "--run", "tiny-1")
        assert result.exit_code == 1
        assert "cannot be written: No space left on device" in result.stderr
        assert file.read_text() == "old"
        assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_layers_have_whole_numbers_in_a_picture(tmp_path: Path, layers: int) -> None:
    write_scores(tmp_path / "w", "few", [float(i + 1) for i in range(layers)])
    succeed("show", "-w", tmp_path / "w", "-o", tmp_path / "chart.svg")
    picture = (tmp_path / "chart.svg").read_text()
    _, _, axis = picture.partition("X-axis titled 'layer (from 0)'")
    axis, _, _ = axis.partition("</g></g>")
    axis, _, _ = axis.partition("role-axis-title")
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", axis)
    assert labels
    assert set(labels) <= set("012345"[:layers])


def test_a_chart_of_very_many_runs_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10,000 runs, the library that draws takes all memory and ends the process."""
    monkeypatch.setattr("avss_dist.reports.chart.MAX_RUNS", 1)
    result = avss("show", "-w", root, "--run", "*", "-o", root / "chart.svg")
    assert result.exit_code == 2
    assert "are too many for one chart: the maximum is 1" in result.stderr
    assert "Name fewer with --run" in result.stderr
    assert not (root / "chart.svg").exists()


@pytest.mark.nightly
def test_what_is_shown_and_drawn_is_named_as_smoothed(root: Path, tmp_path: Path) -> None:
    """The column `avss` is the score as published; tables and pictures have `avss_smoothed`."""
    shown = avss("show", "-w", root, "--run", "tiny-1").stdout.lower()
    words = shown.replace("smoothed avss", "")
    assert words != shown
    assert "avss" not in words.replace("avss_dist", "").replace("avss ls", "")
    succeed("show", "-w", root, "--run", "tiny-1", "-o", tmp_path / "layers.svg")
    text = (tmp_path / "layers.svg").read_text().lower()
    assert "smoothed avss (log)" in text
    assert ">avss" not in text


def test_what_is_published_is_what_the_warehouse_says(tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    folder = tmp_path / "published"
    for i, name in enumerate(("b", "a")):
        x = activations(seed=i, shards=2, scales=np.array([1.0, 3.0]))
        write_measured(root, name, stats_of(x), 2)
    Store(root).write_run(run_row("broken", status="failed"))
    warehouse = Warehouse(root)
    rows = publish(warehouse, folder)
    assert rows.keys() == {"runs", "scores", "layer_stats"}
    assert rows["runs"] == 2
    published = pq.read_table(folder / "data" / "scores.parquet")
    run_ids = published["run_id"].to_pylist()
    assert run_ids == sorted(run_ids)
    order = [(name, "ascending") for name in ("run_id", "layer", "site", "recipe", "threshold", "threshold_kind")]
    stored = warehouse.table("scores").select(published.column_names)
    assert published.sort_by(order).equals(stored.sort_by(order))
    _, metadata, _ = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(metadata)
    assert column(card["configs"], "data_files") == [f"data/{name}.parquet" for name in rows]
    assert (folder / "index.html").read_text().startswith("<!doctype html>")


@pytest.mark.nightly
def test_every_table_is_published_whole(tmp_path: Path) -> None:
    """Tables of runs and of evaluations, whose ids are not those of runs. What others were made of stays."""
    write_every_table(tmp_path / "w")
    warehouse = Warehouse(tmp_path / "w")
    expected = {name: warehouse.table(name).num_rows for name in TABLES if name not in NOT_PUBLISHED}
    assert publish(warehouse, tmp_path / "published") == expected
    files = (tmp_path / "published" / "data").glob("*.parquet")
    assert {file.stem: pq.read_metadata(file).num_rows for file in files} == expected


@pytest.mark.nightly
def test_an_evaluation_that_is_damaged_in_one_table_is_published_in_none(tmp_path: Path) -> None:
    write_every_table(tmp_path / "w")
    (file,) = (tmp_path / "w" / "precision" / "run_id=e").iterdir()
    file.write_bytes(b"")
    publish(Warehouse(tmp_path / "w"), tmp_path / "published")
    for name in ("evaluations", "precision"):
        rows = pq.read_table(tmp_path / "published" / "data" / f"{name}.parquet")
        assert set(rows["run_id"].to_pylist()) == {"f"}, name


def test_a_warehouse_of_failed_runs_is_not_published(tmp_path: Path) -> None:
    for name in ("broken", "gone"):
        Store(tmp_path).write_run(run_row(name, status="failed"))
    with pytest.raises(QueryError, match="has no finished run: all of its 2 runs failed"):
        publish(Warehouse(tmp_path), tmp_path / "published")


@pytest.mark.nightly
def test_what_cannot_be_published_to(tmp_path: Path) -> None:
    root = tmp_path / "warehouse"
    write_measured(root, "a", stats_of(activations(shards=1, scales=np.array([1.0]))), 1)
    with pytest.raises(WarehouseError, match="cannot be written: Directory not empty"):
        publish(Warehouse(root), tmp_path)
    refused = avss("publish", "hf://datasets/lab/scores", "-w", root)
    assert refused.exit_code == 2
    assert "expected a folder of this machine" in refused.stderr
