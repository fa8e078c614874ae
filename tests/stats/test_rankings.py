"""Rankings: ties, orders, correlations, profiles of other depths; every reader of a warehouse says the same of ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies
from scipy import stats
from support.command_line import avss
from support.rows import column, where
from support.warehouses import PUBLISHED, write_profiles, write_scores

from avss_dist.analysis.comparison import compare
from avss_dist.analysis.findings import findings
from avss_dist.stats.rankings import (
    align,
    average_ranks,
    depth_correlation,
    spearman,
    spearman_interval,
)
from avss_dist.warehouse.reader import Warehouse

TIED = [1.0] * 7 + [2.0]  # in layer order their ranks are 1 to 8, as depth's


def layers(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return relative depths and scores of layers."""
    depth = (np.arange(len(values)) + 0.5) / len(values)
    return depth, np.array(values)


@given(strategies.lists(strategies.integers(0, 5).map(float), min_size=1, max_size=30))
def test_average_ranks_are_those_of_scipy(values: list[float]) -> None:
    np.testing.assert_array_equal(average_ranks(np.array(values)), stats.rankdata(values))


def test_a_correlation_needs_three_layers_that_differ() -> None:
    missing = np.array([1.0, np.nan, 3.0, 2.0])
    rising = np.arange(4.0)
    same = np.ones(4)
    assert spearman(missing, rising) == pytest.approx(0.5)
    assert np.isnan(spearman(missing[:3], rising[:3]))
    assert np.isnan(spearman(same, rising))
    assert np.isnan(spearman(rising, same))


def test_a_correlation_is_of_ranks() -> None:
    unit = np.array([0.0, 1.0, 0.5])
    other = np.array([10.0, 30.0, 20.0])
    assert spearman(unit, other) == pytest.approx(1)
    assert spearman(other, unit) == pytest.approx(1)


def test_the_correlation_with_depth() -> None:
    assert depth_correlation([1, 2, 3, 4]) == pytest.approx(1)
    assert depth_correlation([4, 3, None, 2, 1]) == pytest.approx(-1)
    assert depth_correlation([2, 4, 1, 3]) == pytest.approx(0)
    of_ties = stats.spearmanr(TIED, np.arange(8.0))
    assert depth_correlation(TIED) == pytest.approx(of_ties.statistic)
    assert np.isnan(depth_correlation([1, 2]))


@pytest.mark.parametrize(("rho", "number"), [(0.5, 28), (-0.9, 4), (0.0, 10), (0.7, 5)])
def test_the_interval_of_a_correlation_is_normal_in_fishers_z(rho: float, number: int) -> None:
    error = math.sqrt((1 + rho * rho / 2) / (number - 3))
    reach = stats.norm.ppf(0.975) * error
    low, high = spearman_interval(rho, number)
    assert low == pytest.approx(math.tanh(math.atanh(rho) - reach), rel=1e-6)
    assert high == pytest.approx(math.tanh(math.atanh(rho) + reach), rel=1e-6)


@pytest.mark.parametrize("number", [3, 0])
def test_the_correlation_of_few_layers_has_no_interval(number: int) -> None:
    assert np.isnan(spearman_interval(0.5, number)).all()


def test_the_interval_of_a_whole_correlation_is_a_point() -> None:
    assert spearman_interval(1.0, 8) == (1, 1)
    assert spearman_interval(-1.0, 8) == (-1, -1)


def test_compare_and_findings_and_show_agree_about_ties(tmp_path: Path) -> None:
    """Ranked in the order of layers, these scores would track depth; their correlation with it is 0.577."""
    write_scores(tmp_path, "tied", TIED)
    write_scores(tmp_path, "rising", np.arange(8.0) + 1)
    apart = {("block", "pooled", 1e-5): TIED, ("block", "element", 1e-5): [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]}
    write_profiles(tmp_path, "apart", apart)
    store = Warehouse(tmp_path)
    compared = compare(store, ["tied", "rising"], threshold=PUBLISHED).table()
    assert compared["spearman"].to_pylist() == pytest.approx([0.577], abs=1e-3)
    found_rows = findings(store).to_pylist()
    tracking_depth = set(column(where(found_rows, kind="tracks_depth"), "run_id"))
    assert tracking_depth - {"apart"} == {"rising"}
    assert "tracks depth" in avss("show", "-w", tmp_path, "--run", "rising").stdout
    assert "tracks depth" not in avss("show", "-w", tmp_path, "--run", "tied").stdout
    compared = compare(store, ["apart"], by="recipe", threshold=PUBLISHED).table()
    (disagreement,) = where(found_rows, kind="recipes_disagree")
    assert disagreement["value"] == pytest.approx(-0.577, abs=1e-3)
    assert compared["spearman"].to_pylist() == pytest.approx([disagreement["value"]])


def test_models_of_other_depth_meet_at_relative_depths() -> None:
    depth, values = layers(np.arange(40.0) ** 2)
    shallow = layers([5.0, 1.0, 3.0, 2.0])
    x, y, interpolated = align((depth, values), shallow)
    assert interpolated
    assert y.tolist() == [5, 1, 3, 2]
    assert x == pytest.approx(np.interp([0.125, 0.375, 0.625, 0.875], depth, values))
    y, x, interpolated = align(shallow, (depth, values))
    assert interpolated
    assert len(x) == 4
    assert len(y) == 4


def test_models_of_the_same_depth_are_not_interpolated() -> None:
    shallow = layers([5.0, 1.0, 3.0, 2.0])
    _, _, interpolated = align(shallow, shallow)
    assert interpolated is False


def test_models_of_as_many_layers_at_other_depths_are_interpolated() -> None:
    shallow = layers([5.0, 1.0, 3.0, 2.0])
    shifted = (np.array([0.0, 0.25, 0.5, 1.0]), np.array([0.0, 1.0, 2.0, 4.0]))
    x, y, interpolated = align(shallow, shifted)
    assert interpolated
    assert x.tolist() == [5, 1, 3, 2]
    assert y == pytest.approx([0.5, 1.5, 2.5, 3.5])
