"""Axes of maps of ranks. `test_changes.py` has the marks, and the report's tests the page."""

from __future__ import annotations

import pytest

from avss_dist.analysis.rank_map import map_axis


def test_an_axis_of_powers_of_two_is_logarithmic() -> None:
    axis = map_axis("step", [1, 2, 4, 8])
    assert axis.is_log
    assert axis.edges == pytest.approx([2**-0.5, 2**0.5, 2**1.5, 2**2.5, 2**3.5])


def test_an_axis_of_equal_steps_is_linear() -> None:
    axis = map_axis("step", [1000, 2000, 3000, 4000])
    assert not axis.is_log
    assert axis.edges == pytest.approx([500, 1500, 2500, 3500, 4500])


def test_the_start_of_a_training_has_half_of_the_next_place_on_a_logarithmic_axis() -> None:
    axis = map_axis("step", [0, 1, 2, 4, 8])
    assert axis.is_log
    assert axis.places == pytest.approx([0.5, 1, 2, 4, 8])


def test_the_start_of_a_training_is_0_on_a_linear_axis() -> None:
    assert map_axis("step", [0, 1000, 2000, 3000]).places == (0, 1000, 2000, 3000)
