"""Scores at thresholds that no run counted, and quantiles: against the raw activations, and SQL against Python."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import avss
from support.oracle import Float64
from support.warehouses import GRID, activations, stats_of, write_measured

from avss_dist.analysis.thresholds import SCORES, quantiles, quantiles_of, scores_at
from avss_dist.core.errors import QueryError
from avss_dist.stats.layer_stats import HISTOGRAM_EDGES, LayerStats
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

EDGE = 0.6875
SCALES = np.array([0.5, 3.0, 1.0, 2.0])


@pytest.fixture(scope="module")
def x() -> Float64:
    """8 shards, 4 layers, 4 x 64 x 96 elements."""
    rng = np.random.default_rng(0)
    values = SCALES[:, None, None, None] * (0.2 * rng.normal(size=96) + rng.normal(size=(8, 4, 4, 64, 96)))
    return values.astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def root(x: Float64, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warehouse")
    write_measured(root, "tiny-1", stats_of(x), 4)
    write_measured(root, "tiny-2", stats_of(activations(1)), 8)
    return root


@pytest.fixture
def warehouse(root: Path) -> Warehouse:
    return Warehouse(root)


def rows_of(warehouse: Warehouse, run_id: str = "tiny-1") -> list[dict[str, Any]]:
    return [row for row in warehouse.runs().to_pylist() if row["run_id"] == run_id]


def column(rows: list[dict[str, Any]], name: str, recipe: str) -> list[Any]:
    return [row[name] for row in rows if row["recipe"] == recipe]


def test_a_stored_threshold_gives_the_stored_scores_to_the_bit(warehouse: Warehouse) -> None:
    for value in (*GRID, 0.01, 0.1):
        for kind in ("absolute", "rms"):
            stored = warehouse.scores(run_id="tiny-1", threshold=value, threshold_kind=kind)
            if stored.num_rows:
                found = scores_at(warehouse, rows_of(warehouse), Threshold(value=float(value), kind=kind))
                assert found.schema.equals(SCORES)
                assert found.select(stored.column_names).equals(stored)


def test_one_site_keeps_its_rivals(tmp_path: Path) -> None:
    x = activations()
    write_measured(tmp_path, "tiny-1", stats_of(x, before=0.7 * x), 8)
    warehouse = Warehouse(tmp_path)
    for site in ("block", "update"):
        found = scores_at(warehouse, rows_of(warehouse), Threshold(value=1e-2, kind="absolute"), sites=[site])
        stored = warehouse.scores(threshold=1e-2, threshold_kind="absolute", site=site)
        assert found.select(stored.column_names).equals(stored)
        assert not stored["update_variance_ratio"].null_count
        assert not stored["block_influence"].null_count


def test_a_bin_edge_is_exact(warehouse: Warehouse, x: Float64) -> None:
    assert EDGE in HISTOGRAM_EDGES
    rows = scores_at(warehouse, rows_of(warehouse), Threshold(value=EDGE, kind="absolute")).to_pylist()
    assert set(column(rows, "exactness", "element")) == {"exact"}
    assert column(rows, "near_zero_count", "element") == [(np.abs(x[:, i]) < EDGE).sum() for i in range(4)]


@pytest.mark.parametrize(("value", "kind"), [(0.0301, "absolute"), (0.3, "absolute"), (1.7, "absolute"), (0.05, "rms")])
def test_elsewhere_it_is_within_a_percent(warehouse: Warehouse, x: Float64, value: float, kind: str) -> None:
    rows = scores_at(warehouse, rows_of(warehouse), Threshold(value=value, kind=kind)).to_pylist()
    layers = [x[:, i] for i in range(4)]
    at = [value * (np.sqrt((layer**2).mean()) if kind == "rms" else 1) for layer in layers]
    direct = [(np.abs(layer) < t).mean() for layer, t in zip(layers, at, strict=True)]
    assert column(rows, "sparsity", "element") == pytest.approx(direct, rel=0.01)
    assert set(column(rows, "exactness", "element")) == {"interpolated"}
    for row, true in zip((row for row in rows if row["recipe"] == "element"), direct, strict=True):
        assert row["near_zero_low"] <= true * row["count"] <= row["near_zero_high"] < 1.01 * row["near_zero_low"]
    assert set(column(rows, "exactness", "unit")) == {"exact"}
    units = [(np.abs(layer.mean((0, 1, 2))) < t).mean() for layer, t in zip(layers, at, strict=True)]
    assert column(rows, "sparsity", "unit") == pytest.approx(units)


def test_intervals_need_the_partials(root: Path, tmp_path: Path) -> None:
    warehouse = Warehouse(shutil.copytree(root, tmp_path / "w"))
    at = Threshold(value=0.3, kind="absolute")
    assert not scores_at(warehouse, rows_of(warehouse), at)["avss_low"].null_count
    (tmp_path / "w/shard_stats/run_id=tiny-1/shard-00002.parquet").unlink()
    without = scores_at(warehouse, rows_of(warehouse), at)
    assert without["avss_low"].null_count == without.num_rows
    assert not without["avss_smoothed"].null_count


@pytest.mark.parametrize(
    ("value", "kind"),
    [(1e-5, "absolute"), (EDGE, "absolute"), (0.0301, "absolute"), (0.05, "rms"), (1e-44, "absolute")],
)
def test_sql_gives_the_same(warehouse: Warehouse, value: float, kind: str) -> None:
    runs = rows_of(warehouse) + rows_of(warehouse, "tiny-2")
    want = scores_at(warehouse, runs, Threshold(value=value, kind=kind)).to_pylist()
    found = warehouse.sql(f"FROM scores_at({value!r}, kind := '{kind}')").to_pylist()
    key = ("run_id", "site", "recipe", "layer")
    for rows in (want, found):
        rows.sort(key=lambda row: tuple(row[name] for name in key))
    assert len(found) == len(want) == 3 * (4 + 8)
    for a, b in zip(found, want, strict=True):
        for name, got in a.items():
            expected = pytest.approx(b[name], rel=1e-12) if isinstance(b[name], float) else b[name]
            assert got == expected, (name, a, b)


def test_sparsity_in_sql(warehouse: Warehouse, x: Float64) -> None:
    query = f"FROM sparsity_at({EDGE}) WHERE run_id = 'tiny-1' ORDER BY layer"
    rows = warehouse.sql(query).to_pylist()
    assert [row["sparsity"] for row in rows] == [(np.abs(x[:, i]) < EDGE).mean() for i in range(4)]
    assert {(row["exactness"], row["absolute_threshold"]) for row in rows} == {("exact", EDGE)}
    with pytest.raises(QueryError, match="kind is absolute or rms, not relative"):
        warehouse.sql("FROM sparsity_at(0.1, kind := 'relative')")
    edges = warehouse.sql("SELECT bin_edge(b) AS edge FROM range(2040) AS t(b) ORDER BY b")["edge"].to_pylist()
    assert edges == HISTOGRAM_EDGES[:-1].tolist()


@pytest.fixture(scope="module")
def coarse() -> Float64:
    """Sums of bfloat16 numbers, which lie on a grid of 1/32, less so in deeper layers; 3 shards of 4 layers."""
    x = np.random.default_rng(1).normal(size=(8, 4, 2, 32, 48))
    return np.round(x * 32) / 32 * np.array([1.0, 1.0, 0.25, 4.0])[:, None, None, None]


@pytest.fixture(scope="module")
def narrow(coarse: Float64, tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    root = tmp_path_factory.mktemp("narrow")
    write_measured(root, "tiny-1", stats_of(coarse, by="value"), 4, dtype="bfloat16")
    return Warehouse(root)


@pytest.mark.parametrize(
    ("value", "kind"), [(0.0301, "absolute"), (0.07, "absolute"), (1.7, "absolute"), (0.05, "rms"), (0.01, "rms")]
)
def test_16_bit_activations_are_exact_at_any_threshold(
    narrow: Warehouse, coarse: Float64, value: float, kind: str
) -> None:
    layers = [np.abs(coarse[:, i]).ravel() for i in range(4)]
    at = [value * (np.sqrt((layer**2).mean()) if kind == "rms" else 1) for layer in layers]
    exact = [(layer < t).sum() for layer, t in zip(layers, at, strict=True)]
    rows = scores_at(narrow, rows_of(narrow), Threshold(value=value, kind=kind)).to_pylist()
    for name in ("near_zero_count", "near_zero_low", "near_zero_high"):
        assert column(rows, name, "element") == exact
    assert {row["exactness"] for row in rows} == {"exact"}
    found = narrow.sql(f"FROM sparsity_at({value}, kind := '{kind}') ORDER BY layer").to_pylist()
    for name in ("near_zero_count", "near_zero_low", "near_zero_high"):
        assert [row[name] for row in found] == exact
    assert {row["exactness"] for row in found} == {"exact"}
    low, high = (np.array(column(rows, f"avss_{name}", "element")) for name in ("low", "high"))
    scores = np.array(column(rows, "avss_smoothed", "element"))
    assert ((low < scores) & (scores < high)).all()


def test_quantiles_of_16_bit_activations_are_exact(narrow: Warehouse, coarse: Float64) -> None:
    for row in quantiles(narrow, rows_of(narrow), [0.01, 0.1, 0.5, 0.77, 1.0]).to_pylist():
        true = np.quantile(np.abs(coarse[:, row["layer"]]), row["share"], method="inverted_cdf")
        assert row["value"] == row["low"] == row["high"] == true
    assert "Every one is exact: each value was counted." in avss("show", "--quantiles", "-w", narrow.root).stdout


SHARES = (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)


def test_quantiles_lie_in_the_bin_of_the_true_ones(warehouse: Warehouse, x: Float64) -> None:
    rows = quantiles(warehouse, rows_of(warehouse), SHARES).to_pylist()
    assert len(rows) == 4 * len(SHARES)
    for row in rows:
        layer = np.abs(x[:, row["layer"]]).ravel()
        true = np.quantile(layer, row["share"], method="inverted_cdf") if row["share"] else 0.0
        assert row["low"] <= true <= row["high"] or row["share"] == 0
        assert row["value"] == pytest.approx(true, rel=0.02, abs=1e-12) or row["share"] in (0.0, 0.1)
        assert row["rms_multiple"] == pytest.approx(row["value"] / np.sqrt((layer**2).mean()))
    assert [row["value"] for row in rows if row["share"] == 1] == [np.abs(x[:, i]).max() for i in range(4)]


def test_quantiles_of_zeros_and_of_nothing(warehouse: Warehouse) -> None:
    (stats,) = (s[0, "block"] for s in stats_of(np.where(activations(shards=1)[:, :1] > 0.1, 1.0, 0.0)))
    zeros = stats.zero_count / stats.count
    value, low, high = quantiles_of(stats, [zeros / 2, zeros, (1 + zeros) / 2, 1.0])
    assert value[:2].tolist() == [0, 0]
    assert low.tolist() == [0, 0, 1, 1]
    assert value[2:].tolist() == high[2:].tolist() == [1, 1]
    assert np.isnan(quantiles_of(LayerStats.zero(GRID), [0.5])[0]).all()
    with pytest.raises(ValueError, match="a share is between 0 and 1, not 2"):
        quantiles(warehouse, rows_of(warehouse), [2])


# The commands.


def test_scores_command(root: Path) -> None:
    result = avss("show", "-w", root, "--run", "tiny-1", "--threshold", "0.05rms", "--recipe", "element")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "block / element / |x| < 0.05 x RMS" in result.stdout
    assert "4 of 4 near-zero counts are interpolated from stored counts, and off by" in result.stdout
    assert "Exact: 0.28125 and 0.3125." in avss("show", "-w", root, "--threshold", 0.3).stdout
    assert "interpolated" not in avss("show", "-w", root, "--threshold", EDGE).stdout
    text = avss("show", "-w", root, "--run", "tiny-1", "--threshold", "0.05rms", "--format", "csv").stdout
    assert len(list(csv.DictReader(io.StringIO(text)))) == 4


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["show", "--threshold", "-1"], "'-1' is not a threshold."),
        (["show", "--sparsity", "1.5"], "--sparsity must be at most 1, not 1.5."),
        (["show", "--quantiles", "--site", "mlp"], "No statistics of site 'mlp'."),
    ],
)
def test_mistakes(root: Path, args: list[str], text: str) -> None:
    result = avss(*args, "-w", root)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr
