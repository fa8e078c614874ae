"""Least squares from sums: the laws of merging, and numpy as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avss_dist.core.errors import AvssError
from avss_dist.pruning.repair.fits import RIDGES, NormalEquations, fit_ridge

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
equations_of = NormalEquations.from_tokens


def data(tokens: int, inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(tokens, inputs)))
    y = torch.from_numpy(rng.normal(size=(tokens, outputs)))
    return x, y


def inputs_of(tokens: int, inputs: int, seed: int) -> torch.Tensor:
    """Random inputs of so many tokens."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(tokens, inputs)))


def assert_same(actual: NormalEquations, expected: NormalEquations) -> None:
    assert actual.count == expected.count
    for name in ("gram", "cross", "target"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def solve_exactly(tokens: torch.Tensor) -> torch.Tensor:
    """Return the weights that map tokens to themselves, without a ridge."""
    return equations_of(tokens, tokens).solve("full", 0.0)


@given(SIZES, st.integers(0, 40), st.integers(0, 40))
def test_sums_of_parts_are_those_of_the_whole(sizes: tuple[int, int, int, int], first: int, second: int) -> None:
    """Addition is associative and commutative, nothing is its zero, and how tokens are cut does not matter."""
    x, y = data(*sizes)
    low, high = sorted((first, second))
    a = equations_of(x[:low], y[:low])
    b = equations_of(x[low:high], y[low:high])
    c = equations_of(x[high:], y[high:])
    whole = equations_of(x, y)
    zero = NormalEquations.empty(x.shape[1], y.shape[1])
    assert_same((a + b) + c, whole)
    assert_same(a + (b + c), whole)
    assert_same(c + b + a, whole)
    assert_same(whole + zero, whole)


def test_batches_in_float32_are_added_up_in_float64() -> None:
    x, y = data(4096, 8, 3, 0)
    x = x.float()
    y = y.float()
    exact = equations_of(x.double(), y.double())
    added = NormalEquations.empty(8, 3)
    for inputs, targets in zip(x.split(64), y.split(64), strict=True):
        added = added + equations_of(inputs, targets)
    for sums in (added.gram, added.cross, added.target):
        assert sums.dtype == torch.float64
    torch.testing.assert_close(added.gram, exact.gram, rtol=1e-6, atol=1e-4)
    weights = exact.solve("full", 0.001)
    torch.testing.assert_close(added.solve("full", 0.001), weights, rtol=1e-5, atol=1e-7)


@given(SIZES, st.integers(1, 4))
def test_a_weight_counts_tokens_so_often(sizes: tuple[int, int, int, int], weight: int) -> None:
    x, y = data(*sizes)
    weighted = equations_of(x, y, weight)
    repeated = equations_of(x.repeat(weight, 1), y.repeat(weight, 1))
    assert torch.allclose(weighted.gram, repeated.gram)
    assert torch.allclose(weighted.cross, repeated.cross)
    assert torch.allclose(weighted.target, repeated.target)
    assert weighted.count == len(x)


@given(SIZES, st.sampled_from(RIDGES))
def test_numpy_finds_the_same(sizes: tuple[int, int, int, int], ridge: float) -> None:
    """A ridge is as many more rows, of its square root, whose targets are zero."""
    x, y = data(*sizes)
    inputs = x.shape[1]
    outputs = y.shape[1]
    sums = equations_of(x, y)
    size = float(sums.gram.diagonal().mean())
    more = np.sqrt(ridge * size) * np.eye(inputs)
    rows = np.vstack([x.numpy(), more])
    targets = np.vstack([y.numpy(), np.zeros((inputs, outputs))])
    expected, *_ = np.linalg.lstsq(rows, targets)
    weights = sums.solve("full", ridge)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6, atol=1e-8)
    missing = y - x @ weights
    np.testing.assert_allclose(sums.error(weights), float(missing.square().sum()), rtol=1e-6, atol=1e-9)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_the_diagonal_form(tokens: int, width: int, seed: int) -> None:
    """Each channel by itself, as numpy fits it."""
    x, y = data(tokens, width, width, seed)
    weights = equations_of(x, y).solve("channel", 0.0)
    each = []
    for inputs, outputs in zip(x.numpy().T, y.numpy().T, strict=True):
        solution, *_ = np.linalg.lstsq(inputs[:, None], outputs)
        each.append(solution.item())
    np.testing.assert_allclose(weights.numpy(), np.diag(each), atol=1e-9)


def test_the_ridge_is_the_one_that_unseen_tokens_like() -> None:
    """Of noise, the most; of an exact map, the least; and nothing at all where nothing helps."""
    x, noise = data(30, 20, 3, 0)
    unseen = equations_of(*data(500, 20, 3, 1))
    noisy = fit_ridge(equations_of(x, noise), unseen, "full")
    assert noisy.ridge in (None, RIDGES[-1])
    exact = inputs_of(20, 3, seed=2)
    unseen_x = inputs_of(50, 20, seed=3)
    mapped = unseen_x @ exact
    seen = equations_of(x, x @ exact)
    clean = fit_ridge(seen, equations_of(unseen_x, mapped), "full")
    assert clean.ridge == RIDGES[0]
    assert clean.after < 1e-3 * clean.before
    opposite = fit_ridge(seen, equations_of(unseen_x, -mapped), "full")
    assert opposite.ridge is None
    assert not opposite.weights.any()
    assert opposite.after == opposite.before


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0, 8.0])
def test_weaker_ridges_are_tried_as_long_as_they_help(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of all is found, and only the one behind it is tried in vain."""
    true = inputs_of(20, 5, seed=0)

    def equations(tokens: int, seed: int) -> NormalEquations:
        x = inputs_of(tokens, 20, seed=seed)
        disturbance = noise * inputs_of(tokens, 5, seed=10 + seed)
        return equations_of(x, x @ true + disturbance)

    seen = equations(60, 1)
    unseen = equations(400, 2)
    errors = {ridge: unseen.error(seen.solve("full", ridge)) for ridge in RIDGES}
    solve = NormalEquations.solve
    tried = list[float]()

    def counted(self: NormalEquations, form: str, ridge: float) -> torch.Tensor:
        tried.append(ridge)
        return solve(self, form, ridge)

    monkeypatch.setattr(NormalEquations, "solve", counted)
    chosen = fit_ridge(seen, unseen, "full")
    assert chosen.ridge == min(errors, key=lambda ridge: errors[ridge])
    assert chosen.after == errors[chosen.ridge]
    no_weights = torch.zeros(20, 5, dtype=torch.float64)
    assert chosen.before == unseen.error(no_weights)
    weakest = max(0, RIDGES.index(chosen.ridge) - 1)
    assert tried == sorted(RIDGES[weakest:], reverse=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("form", ["channel", "full"])
def test_equations_without_a_solution(value: float, form: str) -> None:
    inputs = torch.full((8, 3), value)
    targets = torch.ones(8, 3)
    message = "NaN or infinite" if value else "inputs of the fit are zero"
    with pytest.raises(AvssError, match=message):
        equations_of(inputs, targets).solve(form, 0.01)


def test_singular_equations() -> None:
    with pytest.raises(AvssError, match="singular"):
        solve_exactly(torch.ones(8, 3))
    column = inputs_of(40, 1, seed=0)
    row = inputs_of(1, 30, seed=1)
    product = column @ row  # of rank 1, but for rounding
    with pytest.raises(AvssError, match="singular"):
        solve_exactly(product)
    with_ridge = equations_of(product, product).solve("full", RIDGES[0])
    assert torch.isfinite(with_ridge).all()


def test_units_that_are_always_zero_get_no_weights() -> None:
    alive = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).double()
    tokens = inputs_of(100, 6, seed=3) * alive
    torch.testing.assert_close(solve_exactly(tokens), torch.diag(alive))


def test_large_and_small_units_are_no_less_apart_for_it() -> None:
    scales = torch.logspace(-9, 3, 20, dtype=torch.float64)
    tokens = inputs_of(100, 20, seed=2) * scales
    torch.testing.assert_close(solve_exactly(tokens), torch.eye(20).double(), rtol=0, atol=1e-3)
