"""Statistics of single rows: what an answer of paired text did in a layer, in float64, on the activations' device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from avss_dist.corpus.pairs import Pairing
from avss_dist.measure.kernels.base import Tensors
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rows import ROW_FIELDS, RowStats


@dataclass(frozen=True)
class ObservedTokens:
    """The tokens that count in a batch, on one device.

    Attributes:
        places: int64[tokens], where they are in the batch's rows one after another.
        of_row: float64[rows, tokens], 1 where a token is the row's.
    """

    places: torch.Tensor
    of_row: torch.Tensor

    @staticmethod
    def of(mask: torch.Tensor, device: torch.device) -> ObservedTokens:
        """Those of bool[rows, tokens], which is on the host."""
        rows, _ = mask.nonzero(as_tuple=True)
        of_row = torch.nn.functional.one_hot(rows, len(mask)).T.double()
        return ObservedTokens(mask.flatten().nonzero()[:, 0].to(device), of_row.to(device))

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """float64[tokens, units] of x[rows, tokens, units]."""
        return x.reshape(-1, x.shape[-1])[self.places].double()


def masks_by_stratum(mask: torch.Tensor, pairing: Pairing | None) -> dict[str, torch.Tensor]:
    """The mask of each stratum that has a token that counts; of text that is not paired, the mask, by no name."""
    if pairing is None:
        return {"": mask}
    labels = np.array(pairing.strata)
    masks = {name: mask & torch.from_numpy(labels == name)[:, None] for name in sorted(set(pairing.strata))}
    return {name: one for name, one in masks.items() if one.any()}


def row_tensors(
    x: torch.Tensor, tokens: ObservedTokens, thresholds: Float64, before: torch.Tensor | None = None
) -> Tensors:
    """The fields of `RowStats` of each row of a batch, on the device of ``x``.

    Args:
        x: [rows, tokens, units].
        before: of a block, its input.
    """
    of, values = tokens.of_row, tokens.select(x)
    finite = torch.isfinite(values)
    kept, sizes = torch.where(finite, values, 0), values.abs()
    number = of.sum(dim=1)
    count = of @ finite.sum(dim=1).double()
    mean = (of @ kept.sum(dim=1)) / count.clamp(min=1)
    spread = torch.where(finite, kept - (mean @ of)[:, None], 0).square().sum(dim=1)
    near_zero = torch.stack([(sizes < limit).sum(dim=1) for limit in thresholds.tolist()], dim=1).double()
    whole = of @ (~finite).any(dim=1).double() == 0
    centers = (of @ kept) / number.clamp(min=1)[:, None]
    pooled = centers.var(dim=1) if centers.shape[1] > 1 else torch.zeros_like(number)
    nothing = torch.full_like(number, torch.nan)
    relative = nothing
    if before is not None:
        old = tokens.select(before)
        relative = _mean(of, (values - old).norm(dim=1) / old.norm(dim=1), number)
    return {
        "count": count.long(),
        "near_zero": (of @ near_zero).long(),
        "mean": torch.where(count > 0, mean, torch.nan),
        "m2": of @ spread,
        "pooled_variance": torch.where(whole & (number > 0), pooled, nothing),
        "norm": _mean(of, values.norm(dim=1), number),
        "relative_magnitude": relative,
    }


def _mean(of: torch.Tensor, values: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The mean of values of tokens by row; NaN where one of them is not finite, or there are none."""
    finite = torch.isfinite(values)
    total = of @ torch.where(finite, values, 0)
    return torch.where((of @ (~finite).double() == 0) & (number > 0), total / number.clamp(min=1), torch.nan)


def to_row_stats(batches: Sequence[Tensors], order: np.ndarray) -> RowStats:
    """The rows of all batches, put into an order: ``order[i]`` is the place of row ``i`` of the batches."""
    fields = {}
    for name in ROW_FIELDS:
        values = torch.cat([batch[name] for batch in batches]).cpu().numpy()
        fields[name] = np.empty_like(values)
        fields[name][order] = values
    return RowStats(**fields)
