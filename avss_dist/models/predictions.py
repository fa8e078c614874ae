"""Predictions of a language model that count, and a batch to probe a model with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from avss_dist.core.devices import to_device
from avss_dist.corpus.shards import Batch

PROBE_TOKENS = 16


def predicted(batch: Batch) -> NDArray[np.bool_]:
    """Return a mask of the counted predictions, bool[rows, tokens - 1].

    The first token of a row is not predicted.
    """
    return batch.observed[:, 1:] & batch.attention_mask[:, :-1]


@dataclass(frozen=True)
class CountedPredictions:
    """Counted predictions of a batch.

    Attributes:
        mask: bool[rows, tokens - 1], true for predictions that count.
        positions: int64[n], index of each prediction into the flattened tokens of all rows.
        labels: int64[n], the next token of each.
    """

    mask: NDArray[np.bool_]
    positions: torch.Tensor
    labels: torch.Tensor


def counted_predictions(batch: Batch, device: torch.device) -> CountedPredictions:
    """Return the counted predictions of a batch, with tensors on a device."""
    mask = predicted(batch)
    rows, before = mask.nonzero()
    labels = batch.input_ids[rows, before + 1]
    positions = rows * batch.input_ids.shape[1] + before
    return CountedPredictions(mask, to_device(positions, device), to_device(labels, device, torch.int64))


def probe_batch() -> Batch:
    """Return a row of a few different tokens, all of which count."""
    ids = np.arange(PROBE_TOKENS, dtype=np.int32)[None]
    real = np.ones((1, PROBE_TOKENS), np.bool_)
    return Batch(input_ids=ids, attention_mask=real, observed=real)
