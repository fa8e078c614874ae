"""Scores at thresholds that no run counted, and quantiles: against the raw activations, and SQL against Python."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.command_line import avss, succeed
from support.oracle import Float64
from support.rows import column, where
from support.tiers import all_of, nightly
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
    return where(warehouse.runs().to_pylist(), run_id=run_id)


def scored(warehouse: Warehouse, value: float, kind: str = "absolute", **options: Any) -> pa.Table:
    """Return the scores of a run at a threshold."""
    threshold = Threshold(value=float(value), kind=kind)
    return scores_at(warehouse, rows_of(warehouse), threshold, **options)


def scored_rows(warehouse: Warehouse, value: float, kind: str, recipe: str) -> list[dict[str, Any]]:
    """Return a row of scores for each layer of a run, at a threshold."""
    return where(scored(warehouse, value, kind).to_pylist(), recipe=recipe)


def threshold_of(layer: Float64, value: float, kind: str) -> float:
    """Return the absolute threshold of a layer, from its raw activations."""
    if kind == "rms":
        return value * root_mean_square(layer)
    return value


def root_mean_square(layer: Float64) -> float:
    return np.sqrt((layer**2).mean())


@pytest.mark.parametrize("kind", ["absolute", "rms"])
@pytest.mark.parametrize("value", all_of([*GRID, 0.01, 0.1], [1e-5, 0.1]))
def test_a_stored_threshold_gives_the_stored_scores_to_the_bit(warehouse: Warehouse, value: float, kind: str) -> None:
    stored = warehouse.scores(run_id="tiny-1", threshold=value, threshold_kind=kind)
    if stored.num_rows:
        computed = scored(warehouse, value, kind)
        assert computed.schema.equals(SCORES)
        assert computed.select(stored.column_names).equals(stored)


@pytest.mark.parametrize("site", ["update", *nightly("block")])
def test_one_site_keeps_its_rivals(tmp_path: Path, site: str) -> None:
    x = activations()
    write_measured(tmp_path, "tiny-1", stats_of(x, before=0.7 * x), 8)
    warehouse = Warehouse(tmp_path)
    computed = scored(warehouse, 1e-2, sites=[site])
    stored = warehouse.scores(threshold=1e-2, threshold_kind="absolute", site=site)
    assert computed.select(stored.column_names).equals(stored)
    assert not stored["update_variance_ratio"].null_count
    assert not stored["block_influence"].null_count


def test_a_bin_edge_is_exact(warehouse: Warehouse, x: Float64) -> None:
    assert EDGE in HISTOGRAM_EDGES
    rows = scored_rows(warehouse, EDGE, "absolute", "element")
    assert set(column(rows, "exactness")) == {"exact"}
    for i, row in enumerate(rows):
        assert row["near_zero_count"] == (np.abs(x[:, i]) < EDGE).sum()


OFF_THE_GRID = [(0.0301, "absolute"), (0.3, "absolute"), (1.7, "absolute"), (0.05, "rms")]


@pytest.mark.parametrize(("value", "kind"), OFF_THE_GRID)
def test_elsewhere_it_is_within_a_percent(warehouse: Warehouse, x: Float64, value: float, kind: str) -> None:
    rows = scored_rows(warehouse, value, kind, "element")
    assert set(column(rows, "exactness")) == {"interpolated"}
    for i, row in enumerate(rows):
        is_small = np.abs(x[:, i]) < threshold_of(x[:, i], value, kind)
        sparsity = is_small.mean()
        assert row["sparsity"] == pytest.approx(sparsity, rel=0.01)
        assert row["near_zero_low"] <= sparsity * row["count"] <= row["near_zero_high"]
        assert row["near_zero_high"] < 1.01 * row["near_zero_low"]


@pytest.mark.parametrize(("value", "kind"), OFF_THE_GRID)
def test_means_of_units_are_exact_at_any_threshold(warehouse: Warehouse, x: Float64, value: float, kind: str) -> None:
    rows = scored_rows(warehouse, value, kind, "unit")
    assert set(column(rows, "exactness")) == {"exact"}
    for i, row in enumerate(rows):
        means = x[:, i].mean((0, 1, 2))
        is_small = np.abs(means) < threshold_of(x[:, i], value, kind)
        assert row["sparsity"] == pytest.approx(is_small.mean())


def test_intervals_need_the_partials(root: Path, tmp_path: Path) -> None:
    warehouse = Warehouse(shutil.copytree(root, tmp_path / "w"))
    assert not scored(warehouse, 0.3)["avss_low"].null_count
    (tmp_path / "w/shard_stats/run_id=tiny-1/shard-00002.parquet").unlink()
    without = scored(warehouse, 0.3)
    assert without["avss_low"].null_count == without.num_rows
    assert not without["avss_smoothed"].null_count


@pytest.mark.parametrize(
    ("value", "kind"),
    [(EDGE, "absolute"), (0.05, "rms"), *nightly((1e-5, "absolute"), (0.0301, "absolute"), (1e-44, "absolute"))],
)
def test_sql_gives_the_same(warehouse: Warehouse, value: float, kind: str) -> None:
    runs = rows_of(warehouse) + rows_of(warehouse, "tiny-2")
    in_python = scores_at(warehouse, runs, Threshold(value=value, kind=kind)).to_pylist()
    in_sql = warehouse.sql(f"FROM scores_at({value!r}, kind := '{kind}')").to_pylist()
    in_python.sort(key=place_of)
    in_sql.sort(key=place_of)
    assert len(in_python) == 3 * (4 + 8)
    assert len(in_sql) == len(in_python)
    for actual, expected in zip(in_sql, in_python, strict=True):
        for name, value_in_sql in actual.items():
            if isinstance(expected[name], float):
                assert value_in_sql == pytest.approx(expected[name], rel=1e-12), (name, actual, expected)
            else:
                assert value_in_sql == expected[name], (name, actual, expected)


def place_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """Return what a row is the score of."""
    return (row["run_id"], row["site"], row["recipe"], row["layer"])


def test_sparsity_in_sql(warehouse: Warehouse, x: Float64) -> None:
    query = f"FROM sparsity_at({EDGE}) WHERE run_id = 'tiny-1' ORDER BY layer"
    rows = warehouse.sql(query).to_pylist()
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert row["sparsity"] == (np.abs(x[:, i]) < EDGE).mean()
        assert row["exactness"] == "exact"
        assert row["absolute_threshold"] == EDGE


def test_an_unknown_kind_of_threshold_in_sql(warehouse: Warehouse) -> None:
    with pytest.raises(QueryError, match="kind is absolute or rms, not relative"):
        warehouse.sql("FROM sparsity_at(0.1, kind := 'relative')")


def test_edges_of_bins_in_sql(warehouse: Warehouse) -> None:
    query = "SELECT bin_edge(b) AS edge FROM range(2040) AS t(b) ORDER BY b"
    assert warehouse.sql(query)["edge"].to_pylist() == HISTOGRAM_EDGES[:-1].tolist()


@pytest.fixture(scope="module")
def coarse() -> Float64:
    """Sums of bfloat16 numbers, which lie on a grid of 1/32, less so in deeper layers; 3 shards of 4 layers."""
    x = np.random.default_rng(1).normal(size=(8, 4, 2, 32, 48))
    scales = np.array([1.0, 1.0, 0.25, 4.0])
    return np.round(x * 32) / 32 * scales[:, None, None, None]


@pytest.fixture(scope="module")
def narrow(coarse: Float64, tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    root = tmp_path_factory.mktemp("narrow")
    write_measured(root, "tiny-1", stats_of(coarse, by="value"), 4, dtype="bfloat16")
    return Warehouse(root)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0.0301, "absolute"), (0.05, "rms"), *nightly((0.07, "absolute"), (1.7, "absolute"), (0.01, "rms"))],
)
def test_16_bit_activations_are_exact_at_any_threshold(
    narrow: Warehouse, coarse: Float64, value: float, kind: str
) -> None:
    rows = scored_rows(narrow, value, kind, "element")
    rows_in_sql = narrow.sql(f"FROM sparsity_at({value}, kind := '{kind}') ORDER BY layer").to_pylist()
    assert len(rows) == len(rows_in_sql) == 4
    for i in range(4):
        is_small = np.abs(coarse[:, i]) < threshold_of(coarse[:, i], value, kind)
        assert rows[i]["avss_low"] < rows[i]["avss_smoothed"] < rows[i]["avss_high"]
        for row in (rows[i], rows_in_sql[i]):
            assert row["near_zero_count"] == is_small.sum()
            assert row["near_zero_low"] == row["near_zero_count"]
            assert row["near_zero_high"] == row["near_zero_count"]
            assert row["exactness"] == "exact"


def true_quantile(layer: Float64, share: float) -> float:
    """Return the smallest size that this share of the elements of a layer do not exceed."""
    return np.quantile(np.abs(layer), share, method="inverted_cdf")


def test_quantiles_of_16_bit_activations_are_exact(narrow: Warehouse, coarse: Float64) -> None:
    rows = quantiles(narrow, rows_of(narrow), [0.01, 0.1, 0.5, 0.77, 1.0]).to_pylist()
    for row in rows:
        assert row["value"] == true_quantile(coarse[:, row["layer"]], row["share"])
        assert row["low"] == row["value"]
        assert row["high"] == row["value"]
    shown = succeed("show", "--quantiles", "-w", narrow.root).stdout
    assert "Every one is exact: each value was counted." in shown


SHARES = (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)


def test_quantiles_lie_in_the_bin_of_the_true_ones(warehouse: Warehouse, x: Float64) -> None:
    rows = quantiles(warehouse, rows_of(warehouse), SHARES).to_pylist()
    assert len(rows) == 4 * len(SHARES)
    for row in rows:
        layer = x[:, row["layer"]]
        true = true_quantile(layer, row["share"])
        if row["share"] > 0:
            assert row["low"] <= true <= row["high"]
        if row["share"] > 0.1:
            assert row["value"] == pytest.approx(true, rel=0.02, abs=1e-12)
        if row["share"] == 1:
            assert row["value"] == true
        assert row["rms_multiple"] == pytest.approx(row["value"] / root_mean_square(layer))


def test_quantiles_of_zeros() -> None:
    is_large = activations(shards=1)[:, :1] > 0.1
    (shard,) = stats_of(np.where(is_large, 1.0, 0.0))
    stats = shard[0, "block"]
    zeros = stats.zero_count / stats.count
    value, low, high = quantiles_of(stats, [zeros / 2, zeros, (1 + zeros) / 2, 1.0])
    assert value.tolist() == [0, 0, 1, 1]
    assert low.tolist() == [0, 0, 1, 1]
    assert high[2:].tolist() == [1, 1]


def test_quantiles_of_nothing() -> None:
    value, _, _ = quantiles_of(LayerStats.zero(GRID), [0.5])
    assert np.isnan(value).all()


def test_a_share_is_at_most_1(warehouse: Warehouse) -> None:
    with pytest.raises(ValueError, match="a share is between 0 and 1, not 2"):
        quantiles(warehouse, rows_of(warehouse), [2])


# The commands.


def show(root: Path, threshold: float | str, *args: str) -> str:
    """Return what ``avss show`` prints at a threshold."""
    result = succeed("show", "-w", root, "--threshold", threshold, *args)
    assert result.stderr == ""
    return result.stdout


def test_scores_command(root: Path) -> None:
    shown = show(root, "0.05rms", "--run", "tiny-1", "--recipe", "element")
    assert "block / element / |x| < 0.05 x RMS" in shown
    assert "4 of 4 near-zero counts are interpolated from stored counts, and off by" in shown
    assert "Exact: 0.28125 and 0.3125." in show(root, 0.3)
    assert "interpolated" not in show(root, EDGE)


def test_scores_at_a_threshold_as_csv(root: Path) -> None:
    text = show(root, "0.05rms", "--run", "tiny-1", "--format", "csv")
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
    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in result.stderr
