"""Scores that people bring: a column of a file, a mapping, a function of an installed package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command_line import avss
from support.pages import write_removals, write_run
from support.warehouses import activations, stats_of, write_measured

import avss_dist
from avss_dist.core.errors import QueryError
from avss_dist.warehouse.reader import Warehouse

CSV = "layer,mine,run_id\n0,0.5,a-1\n1,0.1,a-1\n2,0.9,a-1\n3,0.2,a-1\n1,7,b-2\n"
PACKAGE = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "largest"
version = "1"

[project.entry-points."avss_dist.scores"]
largest = "largest:score"
"""
FUNCTION = """
def score(stats):
    \"\"\"Return the largest activation of each layer, of its output.\"\"\"
    return {layer: measured.max_abs for (layer, site), measured in stats.items() if site == "block"}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_measured(tmp_path / "w", "a-1", stats_of(activations(0)[:, :4]), 4)
    (tmp_path / "scores.csv").write_text(CSV)
    pq.write_table(pa.table({"layer": [3, 2, 1, 0], "mine": [2, 9, 1, 5]}), tmp_path / "scores.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "w"


@pytest.mark.parametrize("by", ["scores.csv:mine", "scores.parquet:mine", {0: 0.5, 1: 0.1, 2: 0.9, 3: 0.2}])
def test_a_plan_drops_the_lowest_layers(root: Path, by: object) -> None:
    """Rows of other runs do not count."""
    plan = avss_dist.plan(warehouse=root, by=by, count=2)
    assert plan.dropped_layers == (1, 3) and "evaluation" not in plan.why


def test_the_command_writes_whose_score_it_is(root: Path) -> None:
    done = avss("plan", "-w", root, "--by", "scores.csv:mine", "--share", "0.25", "-o", "plan.yaml")
    assert done.exit_code == 0, done.stderr
    assert "by: scores.csv:mine" in Path("plan.yaml").read_text() and "drop: [1]" in Path("plan.yaml").read_text()


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ("absent.csv:mine", "absent.csv cannot be read"),
        ("scores.csv:mien", "Unknown column of scores.csv 'mien'.*Did you mean 'mine'"),
        ("twice.csv:mine", "twice.csv has more than one row for a layer"),
        ("few.csv:mine", "Layers 1, 2, 3 have no score 'few.csv:mine'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(root: Path, by: str, says: str) -> None:
    Path("twice.csv").write_text("layer,mine\n0,1\n0,2\n")
    Path("few.csv").write_text("layer,mine\n0,1\n")
    with pytest.raises((QueryError, avss_dist.ConfigError), match=f"(?s){says}"):
        avss_dist.plan(warehouse=root, by=by, count=1)


def test_showing_and_reporting_say_how_well_scores_find_the_measured_loss(tmp_path: Path) -> None:
    """The measured loss rises with depth, and so does the own score. Shards differ, so the ranking is not sure."""
    run_id = write_run(Warehouse(tmp_path), "alpha", 6, revision="main")
    write_removals(Warehouse(tmp_path), run_id, "main", 6)
    file = tmp_path / "scores.csv"
    file.write_text("layer,mine\n" + "".join(f"{layer},{layer * layer}\n" for layer in range(6)))
    shown = avss("show", "-w", tmp_path, "--by", f"{file}:mine").stdout
    found = "Spearman {} with the loss without each layer (95% interval {})"
    assert f"{file}:mine: {found.format('1.00', '1.00 to 1.00')}." in " ".join(shown.split())
    assert re.search(r"Smoothed AVSS: Spearman 1.00 with .*; resampling the shards keeps \d+% of its", shown)
    assert avss("report", "-w", tmp_path, "--by", f"{file}:mine", "-o", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("with the loss without each layer (95% interval") == 1 and f"{file}:mine" in page


def test_an_unknown_score_is_refused_with_the_nearest(root: Path) -> None:
    with pytest.raises(avss_dist.ConfigError, match=r"Unknown `by` 'avs'.\nDid you mean 'avss'"):
        avss_dist.plan(warehouse=root, by="avs", count=1)


@pytest.mark.nightly
def test_a_package_of_its_own_adds_a_score(root: Path, tmp_path: Path) -> None:
    """It is installed by pip, beside the package."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PACKAGE)
    (source / "largest.py").write_text(FUNCTION)
    quietly = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", site)
    subprocess.run([sys.executable, "-m", "pip", "install", *quietly, source], check=True)
    path = os.pathsep.join((str(site), *filter(None, [os.environ.get("PYTHONPATH")])))
    words = [
        sys.executable,
        *["-m", "avss_dist", "plan", "--by", "largest", "--count", "1", "-o", "plan.yaml", "-w"],
        root,
    ]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, check=True)
    stats = avss_dist.Warehouse(root).read_layer_stats("a-1")
    largest = {layer: measured.max_abs for (layer, site), measured in stats.items() if site == "block"}
    assert f"drop: [{min(largest, key=largest.__getitem__)}]" in (tmp_path / "plan.yaml").read_text()
