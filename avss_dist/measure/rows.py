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
        return masks_by_stratum(self.mask[self.local_rows], self.pairing and self.pairing.part(self.local_rows))

    @cached_property
    def masks(self) -> dict[str, torch.Tensor]:
        """Mask of each stratum."""
        return {name: to_device(mask.numpy(), self.device) for name, mask in self.strata.items()}

    @cached_property
    def first_tokens(self) -> dict[str, torch.Tensor]:
        """Flat index of each row's first counted token, int64[rows], by stratum."""
        flat = {}
        for name, mask in self.strata.items():
            rows = np.flatnonzero(mask.numpy().any(axis=1))
            flat[name] = to_device(rows * mask.shape[1] + mask.numpy()[rows].argmax(axis=1), self.device)
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
        return (torch.arange(len(self.numbers), device=self.rows.device)[:, None] == self.rows).double()


def masks_by_stratum(mask: torch.Tensor, pairing: Pairing | None) -> dict[str, torch.Tensor]:
    """Return the mask of each stratum that has a token. The stratum of unpaired text has an empty name."""
    labels = np.array(pairing.strata if pairing else [""] * len(mask))
    masks = {name: mask.numpy() & (labels == name)[:, None] for name in sorted(set(labels.tolist()))}
    return {name: torch.from_numpy(mask) for name, mask in masks.items() if mask.any()}


def row_tensors(
    x: torch.Tensor, tokens: CountedTokens, thresholds: Float64, before: torch.Tensor | None = None
) -> Tensors:
    """Return the `RowStats` of each row of a batch, on the device of ``x``.

    Args:
        x: [rows, tokens, units], the activations.
        before: input of a block, if ``x`` is its output.
    """
    measure = _compiled if x.device.type == "cpu" else by_matrices
    return measure(tokens.select(x), tokens, thresholds, None if before is None else tokens.select(before))


def _compiled(values: torch.Tensor, tokens: CountedTokens, thresholds: Float64, before: torch.Tensor | None) -> Tensors:
    """Return the fields of `row_tensors` by compiled loops, for CPUs.

    Args:
        values, before: [tokens, units], the tokens that count.
    """
    rows = len(tokens.numbers)
    counts, sums = np.zeros((rows, 1 + len(thresholds)), np.int64), np.zeros((rows, 4))
    centers = np.zeros((rows, values.shape[1]))
    inputs = values[:0] if before is None else before
    measure_answers(
        *(tensor.float().numpy() for tensor in (values, inputs)), tokens.rows.numpy(), thresholds, counts, sums, centers
    )
    count, total, norms, updates = torch.from_numpy(counts[:, 0]), *torch.from_numpy(sums[:, [0, 2, 3]]).T
    return {
        "count": count,
        "near_zero": torch.from_numpy(counts[:, 1:]),
        "mean": total / count,  # NaN of nothing: 0 / 0
        "m2": torch.from_numpy(sums[:, 1].copy()),
        "pooled_variance": _pooled(torch.from_numpy(centers), tokens),
        "norm": _finite(norms / tokens.numbers),
        "relative_magnitude": torch.full_like(norms, torch.nan)
        if before is None
        else _finite(updates / tokens.numbers),
    }


def by_matrices(
    values: torch.Tensor, tokens: CountedTokens, thresholds: Float64, before: torch.Tensor | None
) -> Tensors:
    """Return the fields of `row_tensors` by matrix products over all tokens, for devices that compute in parallel.

    Args:
        values, before: [tokens, units], the tokens that count.
    """
    row_sums, values = tokens.membership, values.double()
    finite, sizes = torch.isfinite(values), values.abs()
    values_or_zero = torch.where(finite, values, 0)
    count = row_sums @ finite.sum(dim=1).double()
    mean = (row_sums @ values_or_zero.sum(dim=1)) / count.clamp(min=1)
    spread = torch.where(finite, values_or_zero - (mean @ row_sums)[:, None], 0).square().sum(dim=1)
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
    return _finite(means.var(dim=1) if means.shape[1] > 1 else means[:, 0] * 0)


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
    return {name: np.concatenate([rows[name] for _, rows in parts])[order] for name in ROW_FIELDS}
