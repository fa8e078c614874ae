"""Layer scores along an axis: points, what is left out; and the command with its picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.command_line import avss
from support.warehouses import write_profiles, write_scores

import avss_dist
from avss_dist.analysis.curves import AXES, SCHEMA, RankingCurves, ranking_curves
from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.core.settings import PUBLISHED_THRESHOLD
from avss_dist.read_requests import ALONG
from avss_dist.report.curves import curve_section
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

AT = Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
EARLY, LATE = [1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 7, 6, 5, 4, 3, 2, 1]
SERIES = {"series": "org/a@step*", "model": "org/a"}


def follow(root: Path, along: str, **options: Any) -> RankingCurves:
    warehouse = Warehouse(root)
    return ranking_curves(warehouse, warehouse.runs()["run_id"].to_pylist(), along=along, threshold=AT, **options)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training of 12 checkpoints whose ranking turns round at step 6,000, written in another order."""
    random = np.random.default_rng(0)
    for step in random.permutation(12).tolist():
        scores = (np.array(EARLY if step < 6 else LATE) + random.uniform(-0.9, 0.9, 8)).tolist()
        write_scores(tmp_path, f"a-{step}", scores, **SERIES, training_step=1000 * step, revision=f"r{step}")
    return tmp_path


def test_the_axes_are_those_of_the_request() -> None:
    assert tuple(AXES) == ALONG


def test_a_training_is_followed_in_its_order(training: Path) -> None:
    write_scores(training, "b", EARLY, model="org/b")
    result = follow(training, "step")
    (curve,) = result.curves
    assert [run["training_step"] for run in curve.runs] == [1000 * step for step in range(12)]
    assert curve.points[3] == "3,000" and curve.name == "org/a@step*"
    assert result.left_out == {"b": "its step is not known"}
    expected = [stats.spearmanr(row, curve.values[-1]).statistic for row in curve.values]
    points = {column.heading: column.values for column in curve_section(curve, "curve").tables[0].values}
    assert points["with the last"] == pytest.approx(expected)
    before = [stats.spearmanr(*curve.values[at - 1 : at + 1]).statistic for at in range(1, 12)]
    assert points["with the one before"] == pytest.approx([np.nan, *before], nan_ok=True)
    assert curve.trend == pytest.approx(
        [stats.spearmanr(range(12), ranks).statistic for ranks in curve.ranks.T], nan_ok=True
    )
    table = result.table()
    assert table.schema.equals(SCHEMA) and len(table) == 12 * 8
    first = table.to_pylist()[:8]
    assert {row["run_id"] for row in first} == {"a-0"} and [row["is_lowest"] for row in first].count(True) == 2
    assert [row["rank"] for row in first] == stats.rankdata([row["score"] for row in first]).tolist()


def test_models_of_a_family_are_followed_by_size_at_equal_depth(tmp_path: Path) -> None:
    for name, layers in (("large", 12), ("small", 4), ("middle", 8)):
        scores = ((np.arange(layers) + 0.5) / layers).tolist()
        write_scores(tmp_path, name, scores, model=f"org/{name}", family="f", num_parameters=layers * 10**9)
    write_scores(tmp_path, "other", EARLY, family="g", num_parameters=5)
    result = follow(tmp_path, "size")
    (curve,) = result.curves
    assert [run["run_id"] for run in curve.runs] == ["small", "middle", "large"]
    assert curve.depth == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert curve.values == pytest.approx(np.tile(curve.depth, (3, 1)))
    assert result.left_out["other"].startswith("no other run differs from it in size alone")


def test_other_conditions_make_other_curves_and_the_newest_run_of_a_place_counts(tmp_path: Path) -> None:
    for corpus in ("x.txt", "y.txt"):
        for length in (128, 256):
            columns: dict[str, Any] = {"corpus": corpus, "corpus_fingerprint": corpus, "sequence_length": length}
            columns["model"] = "org/m"
            write_scores(tmp_path, f"{corpus[0]}-{length}", EARLY, **columns)
    write_scores(tmp_path, "x-again", LATE, **{**columns, "corpus": "x.txt", "corpus_fingerprint": "x.txt"})
    by_length = follow(tmp_path, "sequence_length")
    assert [curve.name.rpartition(", ")[2] for curve in by_length.curves] == ["corpus x.txt", "corpus y.txt"]
    assert [run["run_id"] for run in by_length.curves[0].runs] == ["x-128", "x-again"]
    assert set(by_length.left_out) == {"x-256"}


def test_scores_of_other_sites_and_layers_without_a_score(tmp_path: Path) -> None:
    for step, last in ((1, 4.0), (2, float("nan"))):
        profiles = {("block", "pooled", 1e-5): EARLY, ("mlp", "pooled", 1e-5): [3.0, 1.0, 2.0, last]}
        write_profiles(tmp_path, f"a-{step}", profiles, **SERIES, training_step=step, revision=f"r{step}")
    assert len(follow(tmp_path, "step").curves[0].depth) == 8
    (curve,) = follow(tmp_path, "step", site="mlp").curves
    assert curve.layers == [0, 1, 2], "the layer without a score at one point is left out"
    with pytest.raises(QueryError, match="No two runs are along step: it has no such scores"):
        follow(tmp_path, "step", site="attention")


def test_the_command_prints_draws_and_exports(training: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ranks.svg"
    result = avss("compare", "-w", training, "--along", "step", "-o", picture)
    assert result.exit_code == 0, result.stderr
    assert "The lowest 25% are those of the last point from" in result.stdout
    assert "Ranks along training step" not in result.stdout and "training step" in picture.read_text(encoding="utf-8")
    lines = avss("compare", "-w", training, "--along", "step", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert len(rows) == 96 and rows[-1]["point"] == "11,000"
    curves = avss_dist.compare(warehouse=training, along="step")
    assert isinstance(curves, RankingCurves) and curves.table().num_rows == 96


def test_mistakes_are_refused(training: Path) -> None:
    with pytest.raises(ConfigError, match="`along` and `by` exclude each other"):
        avss_dist.compare(warehouse=training, along="step", by="family")
    result = avss("compare", "-w", training, "--along", "steps")
    assert result.exit_code == 2 and "Did you mean 'step'?" in result.stderr
    nothing = avss("compare", "-w", training, "--along", "size")
    assert nothing.exit_code == 2 and "No two runs are along size" in nothing.stderr
    assert "set --allow-mismatch" in nothing.stderr
