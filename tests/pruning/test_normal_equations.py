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


def data(tokens: int, inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(tokens, inputs)))
    y = torch.from_numpy(rng.normal(size=(tokens, outputs)))
    return x, y


def close(a: NormalEquations, b: NormalEquations) -> bool:
    pairs = zip((a.gram, a.cross, a.target), (b.gram, b.cross, b.target), strict=True)
    return a.count == b.count and all(torch.allclose(x, y, rtol=1e-9, atol=1e-9) for x, y in pairs)


@given(SIZES, st.integers(0, 40), st.integers(0, 40))
def test_sums_of_parts_are_those_of_the_whole(sizes: tuple[int, int, int, int], first: int, second: int) -> None:
    """Addition is associative and commutative, nothing is its zero, and how tokens are cut does not matter."""
    x, y = data(*sizes)
    low, high = sorted((first, second))
    a = NormalEquations.from_tokens(x[:low], y[:low])
    b = NormalEquations.from_tokens(x[low:high], y[low:high])
    c = NormalEquations.from_tokens(x[high:], y[high:])
    whole = NormalEquations.from_tokens(x, y)
    assert close((a + b) + c, whole)
    assert close(a + (b + c), whole)
    assert close(c + b + a, whole)
    assert close(whole + NormalEquations.empty(x.shape[1], y.shape[1]), whole)


def test_batches_in_float32_are_added_up_in_float64() -> None:
    x, y = data(4096, 8, 3, 0)
    x = x.float()
    y = y.float()
    exact = NormalEquations.from_tokens(x.double(), y.double())
    added = NormalEquations.empty(8, 3)
    for inputs, targets in zip(x.split(64), y.split(64), strict=True):
        added = added + NormalEquations.from_tokens(inputs, targets)
    assert {added.gram.dtype, added.cross.dtype, added.target.dtype} == {torch.float64}
    torch.testing.assert_close(added.gram, exact.gram, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(added.solve("full", 0.001), exact.solve("full", 0.001), rtol=1e-5, atol=1e-7)


@given(SIZES, st.integers(1, 4))
def test_a_weight_counts_tokens_so_often(sizes: tuple[int, int, int, int], weight: int) -> None:
    x, y = data(*sizes)
    weighted = NormalEquations.from_tokens(x, y, weight)
    repeated = NormalEquations.from_tokens(x.repeat(weight, 1), y.repeat(weight, 1))
    assert torch.allclose(weighted.gram, repeated.gram)
    assert torch.allclose(weighted.cross, repeated.cross)
    assert torch.allclose(weighted.target, repeated.target)
    assert weighted.count == len(x)


@given(SIZES, st.sampled_from(RIDGES))
def test_numpy_finds_the_same(sizes: tuple[int, int, int, int], ridge: float) -> None:
    """A ridge is as many more rows, of its square root, whose targets are zero."""
    x, y = data(*sizes)
    sums = NormalEquations.from_tokens(x, y)
    more = np.sqrt(ridge * float(sums.gram.diagonal().mean())) * np.eye(x.shape[1])
    rows = np.vstack([x.numpy(), more])
    targets = np.vstack([y.numpy(), np.zeros((x.shape[1], y.shape[1]))])
    weights = sums.solve("full", ridge)
    np.testing.assert_allclose(weights.numpy(), np.linalg.lstsq(rows, targets)[0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(sums.error(weights), float((y - x @ weights).square().sum()), rtol=1e-6, atol=1e-9)


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_the_diagonal_form(tokens: int, width: int, seed: int) -> None:
    """Each channel by itself, as numpy fits it."""
    x, y = data(tokens, width, width, seed)
    sums = NormalEquations.from_tokens(x, y)
    each = []
    for channel in range(width):
        solution, *_ = np.linalg.lstsq(x[:, channel : channel + 1].numpy(), y[:, channel].numpy())
        each.append(solution.item())
    np.testing.assert_allclose(sums.solve("channel", 0.0).numpy(), np.diag(each), atol=1e-9)


def test_the_ridge_is_the_one_that_unseen_tokens_like() -> None:
    """Of noise, the most; of an exact map, the least; and nothing at all where nothing helps."""
    x, noise = data(30, 20, 3, 0)
    unseen = NormalEquations.from_tokens(*data(500, 20, 3, 1))
    noisy = fit_ridge(NormalEquations.from_tokens(x, noise), unseen, "full")
    assert noisy.ridge in (None, RIDGES[-1])
    exact = data(20, 3, 1, 2)[0].double()
    unseen_x = data(50, 20, 3, 3)[0]
    seen = NormalEquations.from_tokens(x, x @ exact)
    clean = fit_ridge(seen, NormalEquations.from_tokens(unseen_x, unseen_x @ exact), "full")
    assert clean.ridge == RIDGES[0]
    assert clean.after < 1e-3 * clean.before
    opposite = fit_ridge(seen, NormalEquations.from_tokens(unseen_x, -(unseen_x @ exact)), "full")
    assert opposite.ridge is None
    assert not opposite.weights.any()
    assert opposite.after == opposite.before


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0, 8.0])
def test_weaker_ridges_are_tried_as_long_as_they_help(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of all is found, and only the one behind it is tried in vain."""
    true = data(20, 5, 1, 0)[0]

    def equations(tokens: int, seed: int) -> NormalEquations:
        x = data(tokens, 20, 5, seed)[0]
        return NormalEquations.from_tokens(x, x @ true + noise * data(tokens, 5, 5, 10 + seed)[0])

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
    assert chosen.before == unseen.error(torch.zeros(20, 5, dtype=torch.float64))
    place = RIDGES.index(chosen.ridge)
    assert tried == sorted(RIDGES[max(0, place - 1) :], reverse=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("form", ["channel", "full"])
def test_equations_without_a_solution(value: float, form: str) -> None:
    x = torch.full((8, 3), value)
    with pytest.raises(AvssError, match="NaN or infinite" if value else "inputs of the fit are zero"):
        NormalEquations.from_tokens(x, torch.ones(8, 3)).solve(form, 0.01)


def test_singular_equations() -> None:
    with pytest.raises(AvssError, match="singular"):
        NormalEquations.from_tokens(torch.ones(8, 3), torch.ones(8, 3)).solve("full", 0.0)
    x = data(40, 1, 1, 0)[0] @ data(1, 30, 1, 1)[0]  # of rank 1, but for rounding
    with pytest.raises(AvssError, match="singular"):
        NormalEquations.from_tokens(x, x).solve("full", 0.0)
    assert torch.isfinite(NormalEquations.from_tokens(x, x).solve("full", RIDGES[0])).all()
    dead = data(100, 6, 1, 3)[0] * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    weights = NormalEquations.from_tokens(dead, dead).solve("full", 0.0)
    torch.testing.assert_close(weights, torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]).double()))
    scales = torch.logspace(-9, 3, 20, dtype=torch.float64)  # of large and small units, no less apart for it
    x = data(100, 20, 1, 2)[0] * scales
    solved = NormalEquations.from_tokens(x, x).solve("full", 0.0)
    torch.testing.assert_close(solved, torch.eye(20).double(), rtol=0, atol=1e-3)
