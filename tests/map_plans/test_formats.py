"""Formats under a budget, against every choice that there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from avss_dist.map_plans.budget import in_order, least_damage, same_format, smallest, total


def random_maps(seed: int, maps: int = 6, formats: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Damage that falls with the bits, of maps of different sizes."""
    rng = np.random.default_rng(seed)
    damage = -np.sort(-rng.exponential(size=(maps, formats)), axis=1)
    bits = np.sort(rng.uniform(2, 9, formats)) * rng.integers(1, 5, maps)[:, None]
    return damage, bits


@pytest.mark.parametrize("seed", range(20))
def test_the_damage_is_near_the_least_of_all_choices(seed: int) -> None:
    """Not above the best choice by more than the step that had no room, and below every control."""
    damage, bits = random_maps(seed)
    budget = 0.5 * (bits.min(axis=1).sum() + bits.max(axis=1).sum())
    chosen = least_damage(damage, bits, budget)
    assert total(bits, chosen) <= budget
    choices = [np.array(choice) for choice in product(range(3), repeat=len(damage))]
    best = min(total(damage, choice) for choice in choices if total(bits, choice) <= budget)
    assert total(damage, chosen) <= best + (damage.max(axis=1) - damage.min(axis=1)).max()
    assert total(damage, chosen) < total(damage, smallest(damage, bits))


def test_a_budget_that_ends_a_step_is_optimal() -> None:
    damage = np.array([[4.0, 1.0], [9.0, 0.0], [2.0, 1.9]])
    bits = np.array([[4.0, 8.0], [4.0, 8.0], [4.0, 8.0]])
    assert least_damage(damage, bits, 12.0).tolist() == [0, 0, 0]
    assert least_damage(damage, bits, 16.0).tolist() == [0, 1, 0]
    assert least_damage(damage, bits, 20.0).tolist() == [1, 1, 0]
    assert least_damage(damage, bits, 24.0).tolist() == [1, 1, 1]


def test_bits_that_prevent_no_damage_are_not_spent() -> None:
    damage = np.array([[1.0, -0.5, 0.5]])
    bits = np.array([[4.0, 8.0, 16.0]])
    assert least_damage(damage, bits, 16.0).tolist() == [1]


def test_of_equal_sizes_the_least_damage_is_taken() -> None:
    damage, bits = np.array([[3.0, 1.0, 2.0]]), np.array([[4.5, 4.5, 4.5]])
    assert smallest(damage, bits).tolist() == [1]
    assert least_damage(damage, bits, 100.0).tolist() == [1]
    assert in_order([0], damage, bits, 100.0).tolist() == [1]


def test_the_same_format_is_the_largest_within_the_budget() -> None:
    bits = np.array([[4.0, 5.0, 8.0], [40.0, 50.0, 80.0]])
    assert same_format(bits, 60.0).tolist() == [1, 1]
    assert same_format(bits, 44.0).tolist() == [0, 0]
    assert same_format(bits, 88.0).tolist() == [2, 2]


def test_maps_are_raised_in_order_as_far_as_there_is_room() -> None:
    damage, bits = np.zeros((3, 2)), np.array([[4.0, 8.0], [4.0, 8.0], [1.0, 2.0]])
    assert in_order([1, 0, 2], damage, bits, 14.0).tolist() == [0, 1, 1]
    assert in_order([2, 0, 1], damage, bits, 14.0).tolist() == [1, 0, 1]
