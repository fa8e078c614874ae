"""Kernels of plain torch operations, for any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from avss_dist.measure.kernels.base import Accumulator, Tensors, UpdateBuffer, limits_on
from avss_dist.stats.histogram import CUT_SHIFT
from avss_dist.stats.layer_stats import Float64

CHUNK = 1 << 24  # elements that a temporary may hold, or one sequence


class TorchKernels:
    """Deterministic backend of torch operations without host transfers. Temporaries have up to `CHUNK` elements."""

    def __init__(self) -> None:
        self._updates = UpdateBuffer()

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """See `kernels.base.Kernels`."""
        into.reserve(x.numel())
        self._elements(into, x, mask)
        rows = max(1, CHUNK // max(1, x.shape[1] * x.shape[2]))
        for i in range(0, len(x), rows):
            here = slice(i, i + rows)
            self._units(into.tensors, x[here], mask[here])
            if before is not None:
                self._geometry(into.tensors, before[here], x[here], mask[here])

    def add_update(self, into: Accumulator, after: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> None:
        """See `kernels.base.Kernels`."""
        self.add(into, self._updates.subtract(after, before), mask)

    def finish(self) -> None:
        """Do nothing: `add` is complete when it returns."""

    def _elements(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        for rows, tokens in _chunks(x, mask):
            if x.dtype == torch.float32:
                self._float32(into.tensors, into.thresholds, rows, tokens)
            else:
                patterns = rows.view(torch.int16).to(torch.int64) & 0xFFFF
                _count_into(into.tensors["patterns"], patterns, tokens)

    def _float32(self, into: Tensors, thresholds: Float64, x: torch.Tensor, mask: torch.Tensor) -> None:
        sizes = x.view(torch.int32) & 0x7FFFFFFF
        finite = (sizes < 0x7F800000) & mask[:, None]
        _count_into(into["cuts"], (sizes >> CUT_SHIFT).to(torch.int64), finite)
        limits = limits_on(thresholds.tobytes(), x.device)
        into["near_zero"] += torch.stack([((sizes < limit) & finite).sum() for limit in limits])
        count = finite.sum()
        values = torch.where(finite, x, 0).double()
        mean = values.sum() / count.clamp(min=1)
        m2 = torch.where(finite, values - mean, 0).square().sum()
        _merge_moments(into["elements"][0], into["moments"], count, mean, m2)
        into["elements"] += torch.stack([count, ((sizes == 0) & finite).sum(), mask.sum() * x.shape[1] - count])
        low = torch.where(finite, x, torch.inf).amin().double()
        high = torch.where(finite, x, -torch.inf).amax().double()
        into["extremes"].copy_(
            torch.stack([torch.minimum(into["extremes"][0], low), torch.maximum(into["extremes"][1], high)])
        )

    def _units(self, into: Tensors, x: torch.Tensor, mask: torch.Tensor) -> None:
        finite = mask & torch.isfinite(x).all(dim=2)
        values = torch.where(finite[..., None], x, 0).double()
        tokens = finite.sum(dim=1)
        sums = values.sum(dim=1)
        whole = (tokens > 0) & (tokens == mask.sum(dim=1))
        into["sequences"] += whole.sum()
        if x.shape[2] > 1:
            variances = (sums / tokens.clamp(min=1)[:, None]).var(dim=1)
            into["pooled"] += torch.where(whole, variances, 0).sum()
        if "unit_sums" in into:
            into["unit_count"] += tokens.sum()
            into["unit_sums"] += torch.stack([sums.sum(dim=0), values.square_().sum(dim=(0, 1))])

    def _geometry(self, into: Tensors, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> None:
        finite = mask & torch.isfinite(before).all(dim=2) & torch.isfinite(after).all(dim=2)
        old, new = (torch.where(finite[..., None], x, 0).double() for x in (before, after))
        old_sq, new_sq, change_sq = (v.square().sum(dim=2) for v in (old, new, new - old))
        angles = (old_sq > 0) & (new_sq > 0)
        cosine = ((old * new).sum(dim=2) / (old_sq * new_sq).sqrt()).clamp(-1, 1)
        per_token = torch.stack([cosine, torch.acos(cosine) / torch.pi, (change_sq / old_sq).sqrt()])
        into["geometry"] += torch.where(angles, per_token, 0).sum(dim=(1, 2))
        count = finite.sum() * before.shape[2]
        mean = old.sum() / count.clamp(min=1)
        m2 = torch.where(finite[..., None], old - mean, 0).square().sum()
        _merge_moments(into["tokens"][1], into["input_moments"], count, mean, m2)
        into["tokens"] += torch.stack([angles.sum(), count])


def _chunks(x: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows [n, units] with their mask [n], with at most `CHUNK` elements (or one row) each."""
    rows = max(1, CHUNK // x.shape[2])
    yield from zip(x.flatten(0, 1).split(rows), mask.flatten().split(rows), strict=True)


def _count_into(counts: torch.Tensor, bins: torch.Tensor, mask: torch.Tensor) -> None:
    """Add the number of occurrences of each bin under a mask, of the shape of ``bins`` or of its rows."""
    weight = mask.to(counts.dtype).reshape(*mask.shape, *[1] * (bins.dim() - mask.dim())).expand(bins.shape)
    counts.scatter_add_(0, bins.reshape(-1), weight.reshape(-1))


def _merge_moments(seen: torch.Tensor, moments: torch.Tensor, count: torch.Tensor, mean: Any, m2: Any) -> None:
    """Update ``moments`` [mean, m2] of ``seen`` elements by ``count`` more (Chan), without a host transfer."""
    total = (seen + count).clamp(min=1).double()
    delta = mean - moments[0]
    change = torch.stack([delta * (count / total), m2 + delta * delta * (seen * (count / total))])
    moments += torch.where(count > 0, change, 0)
