"""Single rows against numpy: what is not finite, rows without tokens, one unit, and rows out of order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.observing import observe

from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.corpus.pairs import Pairing
from avss_dist.measure.observer import Pass
from avss_dist.measure.rows import ObservedTokens, by_matrices, in_order, masks_by_stratum, row_tensors
from avss_dist.stats.layer_stats import ROW_FIELDS, RowStats

GRID = np.array([0.25, 1.0])
Measure = Callable[[torch.Tensor, ObservedTokens, torch.Tensor | None], dict[str, Any]]


def compiled(x: torch.Tensor, tokens: ObservedTokens, before: torch.Tensor | None) -> dict[str, Any]:
    return dict(row_tensors(x, tokens, GRID, before))


def matrices(x: torch.Tensor, tokens: ObservedTokens, before: torch.Tensor | None) -> dict[str, Any]:
    return dict(by_matrices(tokens.select(x), tokens, GRID, None if before is None else tokens.select(before)))


def expected(x: np.ndarray, before: np.ndarray | None) -> dict[str, Any]:
    """Of the tokens of one row, [tokens, units]."""
    finite = x[np.isfinite(x)]
    centers, norms = x.mean(axis=0) if len(x) else np.array([np.nan]), np.linalg.norm(x, axis=1)
    pooled = centers.var(ddof=1) if x.shape[1] > 1 and len(x) else 0 * centers[0]
    known = {"norm": norms, "relative_magnitude": np.full(1, np.nan)}
    if before is not None:
        known["relative_magnitude"] = np.linalg.norm(x - before, axis=1) / np.linalg.norm(before, axis=1)
    return {
        "count": finite.size,
        "near_zero": [(np.abs(finite) < limit).sum() for limit in GRID],
        "mean": finite.mean() if finite.size else np.nan,
        "m2": ((finite - finite.mean()) ** 2).sum() if finite.size else 0.0,
        "pooled_variance": pooled if np.isfinite(pooled) else np.nan,
        **{name: v.mean() if len(v) and np.isfinite(v).all() else np.nan for name, v in known.items()},
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("units", [1, 2, 5])
@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("measure", [compiled, matrices])
def test_rows_are_those_of_numpy(measure: Measure, geometry: bool, units: int) -> None:
    """Row 1 has an infinity, row 2 a NaN, row 3 an input of zero, row 4 no token, row 5 nothing finite, row 6 one."""
    rng = np.random.default_rng(units)
    x, before = rng.normal(size=(2, 7, 6, units)).astype(np.float32)
    x[0, 1:4, 0] = 0.25, -1.0, 100.0
    x[1, 2, 0], x[2, 3, -1], before[3, 1], x[5] = np.inf, np.nan, 0, np.nan
    mask = rng.random((7, 6)) < 0.6
    mask[:4, 1:4], mask[4], mask[5], mask[6] = True, False, True, np.arange(6) == 2
    tokens = ObservedTokens.of_mask(torch.from_numpy(mask), torch.device("cpu"))
    found = measure(torch.from_numpy(x), tokens, torch.from_numpy(before) if geometry else None)
    assert set(found) == set(ROW_FIELDS)
    for i, own in enumerate(mask):
        old = before[i, own].astype(np.float64) if geometry else None
        for name, value in expected(x[i, own].astype(np.float64), old).items():
            np.testing.assert_allclose(found[name][i].numpy(), value, rtol=1e-10, atol=1e-12, err_msg=f"{name} of {i}")


def test_masks_are_apart_by_stratum_and_only_those_with_a_token() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    (whole,) = masks_by_stratum(mask, None).values()
    assert list(masks_by_stratum(mask, None)) == [""] and torch.equal(whole, mask)
    assert masks_by_stratum(torch.zeros((2, 3), dtype=torch.bool), None) == {}
    zeros = np.zeros(4, np.int64)
    pairing = Pairing(rows=zeros, pairs=zeros, strata=("b", "a", "c", "b"), starts=zeros)
    masks = masks_by_stratum(mask, pairing)
    assert list(masks) == ["a", "b"]
    assert masks["a"].nonzero().tolist() == [[1, 0], [1, 1]] and masks["b"].nonzero().tolist() == [[0, 0], [3, 1]]


def test_answers_after_another_prompt_are_not_own() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    zeros = np.zeros(3, np.int64)
    pairing = Pairing(rows=zeros, pairs=zeros, strata=("good", f"good{AFTER_ANOTHER}", "bad"), starts=zeros)

    def own(mask: torch.Tensor | None, pairing: Pairing | None) -> torch.Tensor | None:
        with observe([], (), ()) as observer:
            return Pass(observer, mask, slice(None), {}, pairing).own_answers

    assert own(mask, pairing).tolist() == [[True, False], [False, False], [False, True]]
    assert own(mask, None) is mask and own(None, pairing) is None


def test_rows_come_in_the_order_of_their_places() -> None:
    def batch(first: int, number: int) -> dict[str, torch.Tensor]:
        return {name: torch.arange(first, first + number) + 100 * i for i, name in enumerate(ROW_FIELDS)}

    parts = []
    for places in ([7, 5, 1], [0, 9]):
        fields = {k: np.array([p + int(v[0]) for p in places]) for k, v in batch(0, 1).items()}
        parts.append((np.array(places), RowStats(**fields)))
    merged = in_order(parts)
    for i, name in enumerate(ROW_FIELDS):
        assert getattr(merged, name).tolist() == [100 * i + place for place in (0, 1, 5, 7, 9)]
