"""Budgets of sparsity and of bits: against linear programs, every choice that there is, and by hand."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from scipy.optimize import linprog

from avss_dist.plans.budget import (
    MAX_SPARSITY,
    heavy_tail_ratios,
    in_order,
    interpolate_path,
    knapsack,
    least_damage,
    proportional,
    same_format,
    smallest,
    total,
)

Float64 = np.ndarray


def linear_program(damage: Float64, levels: Float64, sizes: Float64, target: float) -> float:
    """The optimum of the continuous problem: each map mixes its levels, 0 among them."""
    grid = np.append(0.0, levels)
    number = len(sizes)
    rows = np.column_stack([np.zeros(number), damage])
    weighted = np.kron(sizes, grid)[None]
    one_each = np.kron(np.eye(number), np.ones(len(grid)))
    equations = np.vstack([weighted, one_each])
    limits = np.append(target * sizes.sum(), np.ones(number))
    optimum = linprog(rows.ravel(), A_eq=equations, b_eq=limits)
    return float(optimum.fun)


def mixed(x: Float64, y: Float64, at: float) -> float:
    """The least damage of one map at a sparsity, mixed of any two of its levels."""
    damages = y[x == at].tolist()
    for i, j in combinations(range(len(x)), 2):
        if x[i] <= at <= x[j]:
            both = [i, j]
            damages.append(float(np.interp(at, x[both], y[both])))
    return min(damages)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.7])
def test_the_knapsack_is_the_optimum_of_the_linear_program(target: float, rising: bool) -> None:
    """Of damages that rise, fall, and bend either way."""
    rng = np.random.default_rng(int(100 * target))
    levels = np.array([0.2, 0.5, 0.6, 0.9])
    grid = np.append(0.0, levels)
    sizes = np.array([1.0, 2.0, 4.0, 3.0, 0.5])
    for _ in range(5):
        damage = rng.random((5, 4))
        if rising:
            damage = np.sort(damage, axis=1)
        else:
            damage -= 0.3
        chosen = knapsack(damage, levels, sizes, target)
        assert weighted_mean(chosen, sizes) == pytest.approx(target, rel=1e-12)
        assert (chosen >= 0).all()
        assert (chosen <= 0.9 + 1e-12).all()
        cost = 0.0
        for row, sparsity in zip(damage, chosen, strict=True):
            cost += mixed(grid, np.append(0.0, row), min(sparsity, 0.9))
        least = linear_program(damage, levels, sizes, target)
        assert cost == pytest.approx(least, abs=1e-9)


def weighted_mean(sparsities: Float64, sizes: Float64) -> float:
    return float(sparsities @ sizes / sizes.sum())


@pytest.mark.parametrize(("target", "expected"), [(0.2, [0.0, 0.25]), (0.3, [0.5, 0.25]), (0.5, [0.5, 0.5])])
def test_steps_cost_what_they_do_for_a_weight(target: float, expected: list[float]) -> None:
    """The larger map has more damage, and less for each weight; of its second step, a part is left."""
    damage = np.array([[1.0, 3.0], [3.0, 12.0]])
    levels = np.array([0.25, 0.5])
    sizes = np.array([1.0, 4.0])
    assert knapsack(damage, levels, sizes, target).tolist() == pytest.approx(expected)


RATIOS = np.array([1.0, 2.0, 4.0, 8.0])
SIZES = np.array([1.0, 2.0, 1.0, 4.0])


@pytest.mark.parametrize(("target", "number_cut"), [(0.65, 1), (0.75, 1), (0.8, 2), (0.9, 2), (0.95, 3)])
def test_what_is_cut_off_goes_to_the_others_in_proportion_again_and_again(target: float, number_cut: int) -> None:
    chosen = proportional(RATIOS, SIZES, target)
    others = chosen[:-number_cut]
    assert weighted_mean(chosen, SIZES) == pytest.approx(target, rel=1e-12)
    assert chosen[-number_cut:].tolist() == [MAX_SPARSITY] * number_cut
    assert (others < MAX_SPARSITY).all()
    assert np.ptp(others / RATIOS[:-number_cut]) == pytest.approx(0, abs=1e-12)


def test_nothing_is_cut_off_of_small_sparsities() -> None:
    expected = 0.1 * 8 / 41 * RATIOS
    assert proportional(RATIOS, SIZES, 0.1).tolist() == pytest.approx(expected.tolist())


def test_the_largest_target_makes_all_maps_as_sparse_as_can_be() -> None:
    assert proportional(RATIOS, SIZES, MAX_SPARSITY).tolist() == pytest.approx([MAX_SPARSITY] * 4)


PATH = np.array([[0.1, 0.0], [0.4, 0.0], [0.4, 0.2], [0.8, 0.2]])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.0, [0.1, 0.0]),
        (0.02, [0.1, 0.0]),
        (0.1 / 3, [0.1, 0.0]),
        (0.1, [0.3, 0.0]),
        (0.4 / 3, [0.4, 0.0]),
        (0.7 / 3, [0.4, 0.15]),
        (0.3, [0.5, 0.2]),
        (0.4, [0.8, 0.2]),
        (0.9, [0.8, 0.2]),
    ],
)
def test_a_path_is_left_where_the_target_is_reached_or_at_its_end(target: float, expected: list[float]) -> None:
    sizes = np.array([1.0, 2.0])
    assert interpolate_path(PATH, sizes, target).tolist() == pytest.approx(expected)


def test_the_heaviest_tail_bears_least_and_equal_ones_the_same() -> None:
    exponents = np.array([3.0, 2.0, 4.0, 2.5])
    assert heavy_tail_ratios(exponents, 0.1).tolist() == pytest.approx([1.0, 0.9, 1.1, 0.95])
    assert heavy_tail_ratios(exponents).tolist() == pytest.approx([1.0, 0.7, 1.3, 0.85])
    assert heavy_tail_ratios(np.full(3, 2.5)).tolist() == [1, 1, 1]


# Number formats


def random_maps(seed: int, maps: int = 6, formats: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Damage that falls with the bits, of maps of different sizes."""
    rng = np.random.default_rng(seed)
    random = rng.exponential(size=(maps, formats))
    damage = -np.sort(-random, axis=1)
    bits_of_a_weight = np.sort(rng.uniform(2, 9, formats))
    weights = rng.integers(1, 5, maps)
    return damage, bits_of_a_weight * weights[:, None]


@pytest.mark.parametrize("seed", range(20))
def test_the_damage_is_near_the_least_of_all_choices(seed: int) -> None:
    """Not above the best choice by more than the step that had no room, and below every control."""
    damage, bits = random_maps(seed)
    least_bits = bits.min(axis=1).sum()
    most_bits = bits.max(axis=1).sum()
    budget = 0.5 * (least_bits + most_bits)
    chosen = least_damage(damage, bits, budget)
    assert total(bits, chosen) <= budget
    damages = []
    for formats in product(range(3), repeat=len(damage)):
        choice = np.array(formats)
        if total(bits, choice) <= budget:
            damages.append(total(damage, choice))
    largest_step = np.ptp(damage, axis=1).max()
    assert total(damage, chosen) <= min(damages) + largest_step
    assert total(damage, chosen) < total(damage, smallest(damage, bits))


@pytest.mark.parametrize(
    ("budget", "expected"), [(12.0, [0, 0, 0]), (16.0, [0, 1, 0]), (20.0, [1, 1, 0]), (24.0, [1, 1, 1])]
)
def test_a_budget_that_ends_a_step_is_optimal(budget: float, expected: list[int]) -> None:
    damage = np.array([[4.0, 1.0], [9.0, 0.0], [2.0, 1.9]])
    bits = np.array([[4.0, 8.0]] * 3)
    assert least_damage(damage, bits, budget).tolist() == expected


def test_bits_that_prevent_no_damage_are_not_spent() -> None:
    damage = np.array([[1.0, -0.5, 0.5]])
    bits = np.array([[4.0, 8.0, 16.0]])
    assert least_damage(damage, bits, 16.0).tolist() == [1]


def test_of_equal_sizes_the_least_damage_is_taken() -> None:
    damage = np.array([[3.0, 1.0, 2.0]])
    bits = np.array([[4.5, 4.5, 4.5]])
    assert smallest(damage, bits).tolist() == [1]
    assert least_damage(damage, bits, 100.0).tolist() == [1]
    assert in_order([0], damage, bits, 100.0).tolist() == [1]


def test_the_same_format_is_the_largest_within_the_budget() -> None:
    bits = np.array([[4.0, 5.0, 8.0], [40.0, 50.0, 80.0]])
    assert same_format(bits, 44.0).tolist() == [0, 0]
    assert same_format(bits, 60.0).tolist() == [1, 1]
    assert same_format(bits, 88.0).tolist() == [2, 2]


def test_maps_are_raised_in_order_as_far_as_there_is_room() -> None:
    damage = np.zeros((3, 2))
    bits = np.array([[4.0, 8.0], [4.0, 8.0], [1.0, 2.0]])
    assert in_order([1, 0, 2], damage, bits, 14.0).tolist() == [0, 1, 1]
    assert in_order([2, 0, 1], damage, bits, 14.0).tolist() == [1, 0, 1]
