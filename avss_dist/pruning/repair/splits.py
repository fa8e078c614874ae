"""Calibration text of a repair, split into tokens to fit to and held-back tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from avss_dist.core.errors import CorpusError
from avss_dist.corpus.shards import Batch, CorpusPlan, Mask

HELD_BACK = 10
"""One row of this many is held back, the last ones of each text."""
SINK_TOKENS = 1
"""Leading tokens of every row that are attention sinks, whose hidden states are unlike all others."""


@dataclass(frozen=True, eq=False)
class FitSplit:
    """A batch of calibration text, split into tokens to fit to and held-back tokens.

    Attributes:
        text: index of the text.
        batch: its tokens.
        fitted, held_back: bool[rows, width], disjoint. A row that has no other token lacks its sink tokens.
        weight: weight of each token, by which a text counts by its own weight whatever its length.
    """

    text: int
    batch: Batch
    fitted: Mask
    held_back: Mask
    weight: float

    @property
    def num_fitted(self) -> int:
        """Number of tokens to fit to, without sink tokens."""
        return int(self.fitted[:, SINK_TOKENS:].sum())

    def uncounted(self) -> FitSplit:
        """Return the same batch with no token that counts, for a rank whose partners have more batches."""
        return replace(self, fitted=np.zeros_like(self.fitted), held_back=np.zeros_like(self.fitted))

    def sink_scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return factors, [rows, width, 1], that give sink tokens the mean length of the other tokens of their rows.

        Args:
            hidden: float32[rows, width, units], hidden states.
        """
        lengths = hidden.norm(dim=-1)
        counted = torch.from_numpy(self.fitted | self.held_back).to(hidden.device)
        counted[:, :SINK_TOKENS] = False
        mean = (lengths * counted).sum(-1) / counted.sum(-1).clamp_min(1)
        # A sink token may have the length 0.
        tiny = torch.finfo(lengths.dtype).tiny
        scale = torch.ones_like(lengths)
        scale[:, :SINK_TOKENS] = mean[:, None] / lengths[:, :SINK_TOKENS].clamp_min(tiny)
        return scale[..., None]


def split_texts(texts: Sequence[CorpusPlan], batch_size: int, weights: Sequence[float] | None = None) -> list[FitSplit]:
    """Return the batches of texts, in order.

    Args:
        weights: relative weight of each text; equal by default.

    Raises:
        CorpusError: a text has only one row, or no token to fit to.
    """
    splits: list[FitSplit] = []
    for number, text in enumerate(texts):
        splits += _split_text(number, text, batch_size)
    counts = count_fitted(splits, len(texts))
    for text, count in zip(texts, counts, strict=True):
        if not count:
            raise CorpusError(
                f"{text.source} has no token to fit to after the first of each row (rows: {text.num_sequences}).",
                "Name a longer text, or raise `max_sequences`.",
            )
    weights = weights or [1.0] * len(texts)
    mean_count = sum(counts) / len(counts)
    token_weights = []
    for count, weight in zip(counts, weights, strict=True):
        relative_weight = weight * len(weights) / sum(weights)
        token_weights.append(mean_count / count * relative_weight)
    return [replace(split, weight=token_weights[split.text]) for split in splits]


def _split_text(number: int, text: CorpusPlan, batch_size: int) -> Iterator[FitSplit]:
    """Yield the batches of a text, whose last rows are held back. Tokens have the weight 1.

    Args:
        number: index of the text.
    """
    num_held_back = math.ceil(text.num_sequences / HELD_BACK)
    first_held_back = text.num_sequences - num_held_back
    row = 0
    for shard in text.shards:
        for batch in shard.batches(batch_size):
            counted = batch.observed.copy()
            # The length of sink tokens is that of other tokens of their rows, without which they do not count.
            counted[:, :SINK_TOKENS] &= counted[:, SINK_TOKENS:].any(1, keepdims=True)
            rows = np.arange(row, row + len(counted))[:, None]
            is_held_back = rows >= first_held_back
            yield FitSplit(number, batch, fitted=counted & ~is_held_back, held_back=counted & is_held_back, weight=1.0)
            row += len(counted)


def count_fitted(splits: Sequence[FitSplit], texts: int) -> list[int]:
    """Return the number of tokens to fit to of each text, without sink tokens."""
    counts = [0] * texts
    for split in splits:
        counts[split.text] += split.num_fitted
    return counts
