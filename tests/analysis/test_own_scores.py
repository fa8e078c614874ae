"""Scores that `avss score` did not measure: of a file, a mapping, an installed package's function, or `avss ablate`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.checkpoints import llama
from support.command_line import succeed
from support.pages import write_removals, write_run
from support.rows import column, where
from support.tiers import nightly
from support.warehouses import activations, stats_of, write_measured, write_scores

import avss_dist
from avss_dist.analysis import own_scores
from avss_dist.core.errors import QueryError
from avss_dist.models.change.number_formats import FORMATS
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.reports.chart import layers_chart
from avss_dist.stats.catalog import FROM_ACTIVATIONS, SCORES
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

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


def write_table(file: Path, values: Iterable[float]) -> Path:
    """Write a table of a score of each layer, called ``mine``, and return its path."""
    rows = [f"{layer},{value}\n" for layer, value in enumerate(values)]
    file.write_text("layer,mine\n" + "".join(rows))
    return file


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse of a run of four layers. Not to be changed."""
    folder = tmp_path_factory.mktemp("template") / "w"
    x = activations(0)[:, :4]
    write_measured(folder, "a-1", stats_of(x), 4)
    return folder


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the warehouse, in a working folder with tables of scores."""
    shutil.copytree(template, tmp_path / "w")
    (tmp_path / "scores.csv").write_text(CSV)
    table = pa.table({"layer": [3, 2, 1, 0], "mine": [2, 9, 1, 5]})
    pq.write_table(table, tmp_path / "scores.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "w"


@pytest.fixture
def with_truth(tmp_path: Path) -> Path:
    """A warehouse of a run of six layers, with the loss without each, which rises with depth."""
    warehouse = Warehouse(tmp_path / "w")
    run_id = write_run(warehouse, "alpha", 6, revision="main")
    write_removals(warehouse, run_id, "main", 6)
    return tmp_path / "w"


@pytest.mark.parametrize("by", ["scores.csv:mine", "scores.parquet:mine", {0: 0.5, 1: 0.1, 2: 0.9, 3: 0.2}])
def test_a_plan_drops_the_lowest_layers(root: Path, by: object) -> None:
    """Rows of other runs do not count."""
    plan = avss_dist.plan(warehouse=root, by=by, count=2)
    assert plan.dropped_layers == (1, 3)
    assert "evaluation" not in plan.why


def test_the_command_writes_whose_score_it_is(root: Path) -> None:
    succeed("plan", "-w", root, "--by", "scores.csv:mine", "--share", "0.25", "-o", "plan.yaml")
    plan = Path("plan.yaml").read_text()
    assert "by: scores.csv:mine" in plan
    assert "drop: [1]" in plan


UNUSABLE = {
    "twice": "layer,mine\n0,1\n0,2\n",
    "few": "layer,mine\n0,1\n",
    "gaps": "layer,mine\n0,1\n1,\n2,\n3,4\n",
    "shifted": "layer,mine\n1,1\n2,2\n3,3\n4,4\n",
    "nameless": "layer,mine\n0,1\n,2\n2,2\n3,3\n",
    "letters": "layer,mine\n0,a\n1,b\n2,c\n3,d\n",
    "words": "layer,mine\nh.0,1\nh.1,2\n",
}
"""Tables that hold no score of four layers."""


@pytest.mark.parametrize(
    ("by", "says"),
    [
        ("absent.csv:mine", "absent.csv: no such file"),
        ("scores.csv:mien", "Unknown column of scores.csv 'mien'.*Did you mean 'mine'"),
        ("twice.csv:mine", "twice.csv has more than one row for a layer"),
        ("gaps.csv:mine", "Layers 1, 2 have no score 'gaps.csv:mine'"),
        ("few.csv:mine", r"few.csv:mine has values of 1 layer, not of the 4 of .* \(run a-1\)"),
        ("many.csv:mine", "many.csv:mine has values of 30 layers, not of the 4"),
        ("shifted.csv:mine", "shifted.csv:mine has values of the layers 1 to 4, not of the 4.*count from 0"),
        (dict.fromkeys(range(50), 1.0), "The mapping of `by` has values of 50 layers, not of the 4"),
        ("nameless.csv:mine", "nameless.csv has a row without a layer"),
        ("letters.csv:mine", "The column 'mine' of letters.csv has other values than numbers"),
        ("words.csv:mine", "The column 'layer' of words.csv has other values than indices of layers"),
        ("avs", "Unknown `by` 'avs'.*Did you mean 'avss'"),
    ],
)
def test_a_score_that_cannot_be_used_is_named(root: Path, by: object, says: str) -> None:
    for name, text in UNUSABLE.items():
        Path(f"{name}.csv").write_text(text)
    write_table(Path("many.csv"), range(30))
    with pytest.raises((QueryError, avss_dist.ConfigError), match=f"(?s){says}"):
        avss_dist.plan(warehouse=root, by=by, count=1)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (avss_dist.show, {}),
        *nightly((avss_dist.findings, {"truth": True}), (avss_dist.report, {"output": "page.html"})),
    ],
)
def test_a_score_of_another_model_is_refused_wherever_scores_are_read(
    with_truth: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., object], options: dict[str, Any]
) -> None:
    monkeypatch.chdir(with_truth.parent)
    write_table(Path("other.csv"), [1] * 8)
    with pytest.raises(QueryError, match=r"other.csv:mine has values of 8 layers, not of the 6 of"):
        command(warehouse=with_truth, by=["other.csv:mine"], **options)


@pytest.mark.nightly
def test_a_mapping_of_scores_is_compared_with_the_ground_truth(with_truth: Path) -> None:
    values = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}
    cards = avss_dist.findings(warehouse=with_truth, truth=True, by=[values])
    assert "values" in cards.table()["score"].to_pylist()


def test_a_table_of_another_model_alone_says_nothing_about_a_run(root: Path) -> None:
    """It may be one of several models that are shown or reported together."""
    rows = [f"{layer},1,other\n" for layer in range(8)]
    Path("other.csv").write_text("layer,mine,model\n" + "".join(rows))
    shown = avss_dist.show(warehouse=root, by=["other.csv:mine"]).table()
    assert shown["other.csv:mine"].null_count == 4


def first(_stats: object) -> dict[int, float]:
    return {0: 1.0}


def test_a_function_may_leave_out_layers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics that it is given are those of the run, of which a kind of layer may lack a site."""
    functions = {"first": EntryPoint("first", f"{__name__}:first", "")}
    monkeypatch.setattr(own_scores, "score_functions", lambda: functions)
    warehouse = Warehouse(root)
    score = own_scores.own_score("first", warehouse, warehouse.run("a-1") or {})
    assert score.values == {0: 1.0}


@pytest.fixture
def squares(tmp_path: Path) -> str:
    """A score that rises with depth, as the measured loss does, named by its file and its column."""
    file = write_table(tmp_path / "scores.csv", [0, 1, 4, 9, 16, 25])
    return f"{file}:mine"


def test_showing_says_how_well_scores_find_the_measured_loss(with_truth: Path, squares: str) -> None:
    """Shards differ, so the ranking is not sure."""
    shown = succeed("show", "-w", with_truth, "--by", squares).stdout
    agreement = "Spearman 1.00 with the loss without each layer (95% interval 1.00 to 1.00)"
    assert f"{squares}: {agreement}." in " ".join(shown.split())
    assert re.search(r"Smoothed AVSS: Spearman 1.00 with .*; resampling the shards keeps \d+% of its", shown)


@pytest.mark.nightly
def test_reporting_says_how_well_scores_find_the_measured_loss(with_truth: Path, squares: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    succeed("report", "-w", with_truth, "--by", squares, "-o", file)
    page = file.read_text()
    assert page.count("with the loss without each layer (95% interval") == 1
    assert squares in page


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A warehouse of three runs of one training, and a table of scores of two of them, one the reverse of the other."""
    series = {"model": "org/a", "series": "org/a@step*"}
    for step in range(3):
        columns = {**series, "training_step": step, "revision": f"r{step}"}
        write_scores(tmp_path / "w", f"a-{step}", [1.0, 2.0, 3.0, 4.0], **columns)
    lines = ["layer,mine,run_id"]
    for layer in range(4):
        lines.append(f"{layer},{-layer},a-0")
        lines.append(f"{layer},{layer},a-1")
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "w"


def test_runs_are_compared_by_a_score_of_your_own(several: Path) -> None:
    compared = avss_dist.compare(warehouse=several, score="mine.csv:mine")
    assert compared.table()["spearman"].to_pylist() == [-1.0]
    assert compared.left_out == {"a-2": "no such scores"}


def test_a_mapping_ranks_the_layers_of_each_run(several: Path) -> None:
    compared = avss_dist.compare(warehouse=several, score={0: 3.0, 1: 1.0, 2: 2.0, 3: 0.0})
    assert compared.table()["spearman"].to_pylist() == [1.0, 1.0, 1.0]


def test_avss_is_compared_with_a_score_of_your_own(several: Path) -> None:
    compared = avss_dist.compare(warehouse=several, run="a-0", by="score", score="mine.csv:mine")
    pair = compared.table().to_pylist()[-1]
    assert pair["a"] == "avss"
    assert pair["b"] == "mine.csv:mine"
    assert pair["spearman"] == -1.0


def test_the_command_names_the_score_alone_that_ranks_the_layers(several: Path) -> None:
    printed = succeed("compare", "-w", several, "--score", "mine.csv:mine").stdout
    assert "by run mine.csv:mine " in " ".join(printed.split())
    assert "pooled" not in printed


def test_the_ranks_of_a_score_of_your_own_are_followed(several: Path) -> None:
    followed = avss_dist.compare(warehouse=several, along="step", score="mine.csv:mine").table()
    ranks = column(where(followed.to_pylist(), layer=0), "rank")
    assert ranks == [4.0, 1.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": "recipe"}, "`by` recipe compares readings of AVSS"),
        ({"site": "mlp"}, "`site` has no effect"),
        ({"recipe": "unit"}, "`recipe` has no effect"),
        ({"threshold": "0.1rms"}, "`threshold` has no effect"),
        ({"run": "a-2"}, "mine.csv:mine has values of none of these runs"),
    ],
)
def test_a_score_of_your_own_has_no_readings(several: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(avss_dist.AvssError, match=says):
        avss_dist.compare(warehouse=several, score="mine.csv:mine", **options)


@pytest.mark.parametrize("options", [{}, {"along": "step"}], ids=["pairs", "curves"])
def test_a_map_of_a_score_of_your_own_is_drawn(several: Path, tmp_path: Path, options: dict[str, str]) -> None:
    picture = tmp_path / "map.svg"
    avss_dist.compare(warehouse=several, score="mine.csv:mine", output=picture, **options)
    assert picture.read_text().startswith("<svg")


@pytest.mark.nightly
def test_a_score_of_your_own_is_drawn_beside_the_others(several: Path) -> None:
    """Names of files have characters that mean something in the names of fields of a chart."""
    row = {"layer_name": "h", "rank": 1, "avss_low": None, "avss_high": None, "threshold": 1e-5}
    row |= {"threshold_kind": "absolute", "site": "block", "recipe": "pooled", "run_id": "a-0"}
    row |= {SCORES[name].column: 1.0 for name in FROM_ACTIVATIONS}
    rows = [row | {"layer": layer, "depth": layer / 4, "a[0].csv:b.c": -layer} for layer in range(4)]
    run = Warehouse(several).run("a-0") or {}
    chart = layers_chart([run], rows, ["a[0].csv:b.c"]).to_dict()
    (drawn,) = where(chart["concat"], title="a[0].csv:b.c")
    field = drawn["layer"][0]["encoding"]["y"]["field"]
    (values,) = chart["datasets"].values()
    assert column(values, field) == [0, -1, -2, -3]


def test_mappings_have_a_column_each(several: Path) -> None:
    by = [dict.fromkeys(range(4), 1.0), dict.fromkeys(range(4), 2.0)]
    shown = avss_dist.show(run="a-0", warehouse=several, by=by).table()
    assert shown["values 1"].to_pylist() == [1.0] * 4
    assert shown["values 2"].to_pylist() == [2.0] * 4


def test_a_file_without_a_column_is_answered_with_its_columns(several: Path) -> None:
    Path("two.csv").write_text("layer,first,second\n0,1,2\n")
    with pytest.raises(QueryError, match=r"two.csv names no column.\nName one: two.csv:first, two.csv:second\."):
        avss_dist.show(run="a-0", warehouse=several, by=["two.csv"])


def test_a_name_that_is_no_score_of_your_own_is_answered_with_what_is(several: Path) -> None:
    with pytest.raises(avss_dist.ConfigError, match=r"'mine' is not a score of your own.\nWrite FILE.csv:COLUMN"):
        avss_dist.show(run="a-0", warehouse=several, by=["mine"])


@pytest.mark.nightly
def test_a_package_of_its_own_adds_a_score(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed by pip, beside the package."""
    source = tmp_path / "source"
    site = tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PACKAGE)
    (source / "largest.py").write_text(FUNCTION)
    quietly = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", site)
    subprocess.run([sys.executable, "-m", "pip", "install", *quietly, source], check=True)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    words = ("-m", "avss_dist", "plan", "--by", "largest", "--count", "1", "-o", "plan.yaml", "-w", root)
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    stats = avss_dist.Warehouse(root).read_layer_stats("a-1")
    largest = [stats[layer, "block"].max_abs for layer in range(4)]
    plan = (tmp_path / "plan.yaml").read_text()
    assert f"drop: [{np.argmin(largest)}]" in plan


NOW = datetime(2026, 1, 1, tzinfo=UTC)
COMMON = {"settings": '{"dtype": "float32"}', "created_at": NOW, "stderr": 0.0, "num_samples": 8}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A warehouse of a model of four layers: the loss without each, then predictions for rounded weights."""
    folder = save_checkpoint(llama(num_hidden_layers=4), tmp_path_factory.mktemp("models") / "tiny")
    root = tmp_path_factory.mktemp("measured") / "w"
    store = Store(root)
    about = {"model": str(folder), "revision": resolve(str(folder)).revision, "family": "llama"}
    store.write_rows("evaluations", RunIdentity(run_id="tiny-1", **about), loss_rows())
    store.write_rows("evaluations", RunIdentity(run_id="tiny-2", **about), rounding_rows())
    for run_id in ("tiny-1", "tiny-2"):
        (root / "cells" / f"run_id={run_id}").mkdir(parents=True)
    return root


def loss_rows() -> list[dict[str, Any]]:
    """Return the loss of the whole model and without each layer, which falls with depth."""
    loss = {"task": "ablation:t.txt", "metric": "loss", "drop_parts": [], **COMMON}
    rows = [{**loss, "drop": [], "value": 2.0}]
    for layer in range(4):
        rows.append({**loss, "drop": [layer], "value": 2.5 - layer / 10})
    return rows


def rounding_rows() -> list[dict[str, Any]]:
    """Return what one matrix of each layer loses in two formats, measured an hour later."""
    common = {"task": "rounding:t.txt", "drop": [], "drop_parts": [], **COMMON}
    common["created_at"] = NOW + timedelta(hours=1)
    rows = []
    for layer in range(4):
        for name, damage in (("int8", 0.01), ("bf16", 0.0)):
            place = {**common, "rounding": f"{name}@{layer}.mlp.up_proj"}
            rows.append({**place, "metric": "second_order", "value": damage})
            rows.append({**place, "metric": "bits_per_weight", "value": FORMATS[name].bits(16, 32)})
            rows.append({**place, "metric": "num_weights", "value": 512.0})
    return rows


def test_layers_are_chosen_by_what_was_measured(measured: Path) -> None:
    plan = avss_dist.plan(warehouse=measured)
    assert plan.drop == (3,)
    assert plan.num_layers == 4
    assert plan.layers == "layers"
    assert plan.run_id is None
    assert plan.why["evaluation"] == "tiny-1"


def test_several_layers_are_chosen_by_what_was_measured(measured: Path) -> None:
    plan = avss_dist.plan(warehouse=measured, run="tiny", by="loss", count=2)
    assert plan.drop == (2, 3)


def test_formats_are_chosen_by_what_was_predicted(measured: Path) -> None:
    plan = avss_dist.quantize(warehouse=measured, bits=12.5)
    assert plan.num_layers == 4
    assert plan.run_id is None
    assert plan.evaluation == "tiny-2"
    formats = [entry.format for entry in plan.rounded]
    assert formats.count("bf16") == 2


def test_a_score_of_activations_is_still_needed_for_itself(measured: Path) -> None:
    with pytest.raises(QueryError, match="was not scored"):
        avss_dist.plan(warehouse=measured, by="block_influence")
    with pytest.raises(QueryError, match="has no finished run"):
        avss_dist.compare(warehouse=measured)


def test_a_file_may_be_named_by_a_uri(tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"layer": [0], "mine": [1.0]}), file)
    assert own_scores._read_table(file.as_uri()).num_rows == 1
