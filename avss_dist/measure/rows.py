"""Statistics of single rows of paired text in a layer, computed in float64 on the device of the activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from avss_dist.core.devices import to_device
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.corpus.pairs import Pairing
from avss_dist.measure.kernels.cpu import measure_answers
from avss_dist.measure.kernels.reference import Tensors
from avss_dist.stats.layer_stats import ROW_FIELDS, Float64, RowStats


@dataclass(frozen=True, eq=False)
class CountedTokens:
    """The tokens that count in a batch, on one device. Each tensor is copied there when it is first used.

    Attributes:
        mask: bool[rows, tokens], true for tokens that count, on the host.
        local_rows: rows that this process counts. All tensors but `own_places` are of these rows.
        pairing: description of the rows of paired text.
    """

    mask: torch.Tensor
    device: torch.device
    local_rows: slice
    pairing: Pairing | None = None

    @cached_property
    def strata(self) -> dict[str, torch.Tensor]:
        """Mask of each stratum, on the host."""
        pairing = None
        if self.pairing is not None:
            pairing = self.pairing.part(self.local_rows)
        return masks_by_stratum(self.mask[self.local_rows], pairing)

    @cached_property
    def masks(self) -> dict[str, torch.Tensor]:
        """Mask of each stratum."""
        return {name: to_device(mask.numpy(), self.device) for name, mask in self.strata.items()}

    @cached_property
    def first_tokens(self) -> dict[str, torch.Tensor]:
        """Flat index of each row's first counted token, int64[rows], by stratum."""
        flat = {}
        for name, stratum in self.strata.items():
            mask = stratum.numpy()
            rows = np.flatnonzero(mask.any(axis=1))
            first = mask[rows].argmax(axis=1)
            flat[name] = to_device(rows * mask.shape[1] + first, self.device)
        return flat

    @cached_property
    def own_places(self) -> torch.Tensor:
        """Flat indices of counted tokens of all rows, int64[tokens], without answers that follow another prompt."""
        counted = self.mask.numpy()
        if self.pairing:
            after_own_prompt = [not label.endswith(AFTER_ANOTHER) for label in self.pairing.strata]
            counted = counted & np.array(after_own_prompt)[:, None]
        return to_device(np.flatnonzero(counted), self.device)

    @cached_property
    def places(self) -> torch.Tensor:
        """Flat index of each token, int64[tokens]."""
        return to_device(np.flatnonzero(self.mask[self.local_rows].numpy()), self.device)

    @cached_property
    def rows(self) -> torch.Tensor:
        """Row of each token, int64[tokens]."""
        return to_device(self.mask[self.local_rows].numpy().nonzero()[0], self.device)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """Number of tokens in each row, float64[rows]."""
        return to_device(self.mask[self.local_rows].numpy().sum(axis=1, dtype=np.float64), self.device)

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """Return the counted tokens of x[rows, tokens, units], [tokens, units]."""
        return x.flatten(0, 1).index_select(0, self.places)

    @cached_property
    def membership(self) -> torch.Tensor:
        """Membership of tokens in rows, float64[rows, tokens], 1 or 0."""
        rows = torch.arange(len(self.numbers), device=self.rows.device)
        return (rows[:, None] == self.rows).double()


def masks_by_stratum(mask: torch.Tensor, pairing: Pairing | None) -> dict[str, torch.Tensor]:
    """Return the mask of each stratum that has a token. The stratum of unpaired text has an empty name."""
    if pairing is None:
        if mask.numpy().any():
            return {"": mask}
        return {}
    labels = np.array(pairing.strata)
    masks = {}
    for name in sorted(set(pairing.strata)):
        counted = mask.numpy() & (labels == name)[:, None]
        if counted.any():
            masks[name] = torch.from_numpy(counted)
    return masks


def row_tensors(
    x: torch.Tensor, tokens: CountedTokens, thresholds: Float64, before: torch.Tensor | None = None
) -> Tensors:
    """Return the `RowStats` of each row of a batch, on the device of ``x``.

    Args:
        x: [rows, tokens, units], the activations.
        before: input of a block, if ``x`` is its output.
    """
    values = tokens.select(x)
    inputs = None
    if before is not None:
        inputs = tokens.select(before)
    if x.device.type == "cpu":
        return _by_loops(values, tokens, thresholds, inputs)
    return by_matrices(values, tokens, thresholds, inputs)


def _by_loops(values: torch.Tensor, tokens: CountedTokens, thresholds: Float64, before: torch.Tensor | None) -> Tensors:
    """Return the fields of `row_tensors` by compiled loops, for CPUs.

    Args:
        values, before: [tokens, units], the tokens that count.
    """
    rows = len(tokens.numbers)
    counts = np.zeros((rows, 1 + len(thresholds)), np.int64)
    sums = np.zeros((rows, 4))
    centers = np.zeros((rows, values.shape[1]))
    inputs = values[:0] if before is None else before
    measure_answers(
        values.float().numpy(),
        inputs.float().numpy(),
        tokens.rows.numpy(),
        thresholds,
        counts,
        sums,
        centers,
    )
    count = torch.from_numpy(counts[:, 0])
    by_row = torch.from_numpy(sums)
    if before is None:
        relative = torch.full_like(by_row[:, 3], torch.nan)
    else:
        relative = _finite(by_row[:, 3] / tokens.numbers)
    return {
        "count": count,
        "near_zero": torch.from_numpy(counts[:, 1:]),
        "mean": by_row[:, 0] / count,  # NaN of nothing: 0 / 0
        "m2": by_row[:, 1].clone(),
        "pooled_variance": _pooled(torch.from_numpy(centers), tokens),
        "norm": _finite(by_row[:, 2] / tokens.numbers),
        "relative_magnitude": relative,
    }


def by_matrices(
    values: torch.Tensor, tokens: CountedTokens, thresholds: Float64, before: torch.Tensor | None
) -> Tensors:
    """Return the fields of `row_tensors` by matrix products over all tokens, for devices that compute in parallel.

    Args:
        values, before: [tokens, units], the tokens that count.
    """
    row_sums = tokens.membership
    values = values.double()
    finite = torch.isfinite(values)
    values_or_zero = torch.where(finite, values, 0)
    count = row_sums @ finite.sum(dim=1).double()
    mean = (row_sums @ values_or_zero.sum(dim=1)) / count.clamp(min=1)
    means_of_tokens = (mean @ row_sums)[:, None]
    spread = torch.where(finite, values_or_zero - means_of_tokens, 0).square().sum(dim=1)
    sizes = values.abs()
    near_zero = torch.stack([(sizes < limit).sum(dim=1) for limit in thresholds.tolist()], dim=1).double()
    nonfinite = row_sums @ (~finite).any(dim=1).double()
    centers = torch.where(nonfinite[:, None] > 0, torch.nan, row_sums @ values_or_zero)
    relative = torch.full_like(mean, torch.nan)
    if before is not None:
        old = before.double()
        relative = _mean((values - old).norm(dim=1) / old.norm(dim=1), tokens)
    return {
        "count": count.long(),
        "near_zero": (row_sums @ near_zero).long(),
        "mean": torch.where(count > 0, mean, torch.nan),
        "m2": row_sums @ spread,
        "pooled_variance": _pooled(centers, tokens),
        "norm": _mean(values.norm(dim=1), tokens),
        "relative_magnitude": relative,
    }


def _pooled(centers: torch.Tensor, tokens: CountedTokens) -> torch.Tensor:
    """Return the variance over units of the means over tokens, float64[rows].

    Args:
        centers: float64[rows, units], sums over tokens.
    """
    means = centers / tokens.numbers[:, None]
    if means.shape[1] > 1:
        return _finite(means.var(dim=1))
    return _finite(means[:, 0] * 0)


def _mean(values: torch.Tensor, tokens: CountedTokens) -> torch.Tensor:
    """Return the mean over the tokens of each row, NaN for rows without tokens or with a non-finite value."""
    finite = torch.isfinite(values)
    total = tokens.membership @ torch.where(finite, values, 0)
    return torch.where(tokens.membership @ (~finite).double() == 0, total / tokens.numbers, torch.nan)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(values), values, torch.nan)


PlacedRows = tuple[np.ndarray, RowStats]
"""Positions of rows in the corpus, int64[rows], and the statistics of these rows."""


def in_order(parts: Sequence[PlacedRows]) -> RowStats:
    """Return the statistics of all rows, ordered by position in the corpus."""
    order = np.argsort(np.concatenate([places for places, _ in parts]))
    ordered = {}
    for name in ROW_FIELDS:
        values = np.concatenate([rows[name] for _, rows in parts])
        ordered[name] = values[order]
    return ordered
