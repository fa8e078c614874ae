"""Calibration text of a repair, in batches: the tokens to fit to, and the held-back tokens that judge the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from avss_dist.core.errors import CorpusError
from avss_dist.corpus.shards import Batch, CorpusPlan, Mask

HELD_BACK = 10  # one row of this many is held back, the last ones of each text
SINK_TOKENS = 1  # leading tokens of every row: attention sinks, whose hidden states are unlike all others


@dataclass(frozen=True, eq=False)
class FitSplit:
    """A batch of calibration text, split into tokens to fit to and held-back tokens.

    Attributes:
        text: index of the text.
        batch: its tokens.
        fitted, held_back: bool[rows, width], disjoint; without the sink tokens.
        weight: weight of each token, by which a text counts by its own weight whatever its length.
    """

    text: int
    batch: Batch
    fitted: Mask
    held_back: Mask
    weight: float

    def uncounted(self) -> FitSplit:
        """Return the same batch with no token that counts, for a rank whose partners have more batches."""
        none = np.zeros_like(self.fitted)
        return replace(self, fitted=none, held_back=none)

    def with_sinks(self) -> tuple[Mask, Mask]:
        """Return the masks ``fitted`` and ``held_back``, each with the sink tokens of its rows."""
        first = self.batch.observed.copy()
        first[:, SINK_TOKENS:] = False
        fitted, held_back = (mask | (first & mask.any(1, keepdims=True)) for mask in (self.fitted, self.held_back))
        return fitted, held_back

    def sink_scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return factors, [rows, width, 1], that give sink tokens the mean length of the other tokens of their rows.

        Args:
            hidden: float32[rows, width, units], hidden states.
        """
        lengths = hidden.norm(dim=-1)
        others = torch.from_numpy(self.fitted | self.held_back).to(hidden.device)
        mean = (lengths * others).sum(-1) / others.sum(-1).clamp_min(1)
        scale = torch.ones_like(lengths)
        scale[:, :SINK_TOKENS] = mean[:, None] / lengths[:, :SINK_TOKENS].clamp_min(torch.finfo(lengths.dtype).tiny)
        return scale[..., None]


def split_texts(texts: Sequence[CorpusPlan], batch_size: int, weights: Sequence[float] | None = None) -> list[FitSplit]:
    """Return the batches of texts, in order.

    Args:
        weights: relative weight of each text; equal by default.

    Raises:
        CorpusError: a text has only one row, or no token to fit to.
    """
    splits = [split for number, text in enumerate(texts) for split in _split(number, text, batch_size)]
    counts = count_fitted(splits, len(texts))
    for text, count in zip(texts, counts, strict=True):
        if not count:
            raise CorpusError(
                f"{text.source} has no token to fit to after the first of each row (rows: {text.num_sequences}).",
                "Name a longer text, or raise `max_sequences`.",
            )
    mean, weights = sum(counts) / len(counts), weights or [1.0] * len(texts)
    shares = [weight * len(weights) / sum(weights) for weight in weights]
    return [replace(split, weight=mean / counts[split.text] * shares[split.text]) for split in splits]


def count_fitted(splits: Sequence[FitSplit], texts: int) -> list[int]:
    """Return the number of tokens to fit to of each text."""
    return [sum(int(split.fitted.sum()) for split in splits if split.text == text) for text in range(texts)]


def _split(number: int, text: CorpusPlan, batch_size: int) -> Iterator[FitSplit]:
    first_held_back = text.num_sequences - -(-text.num_sequences // HELD_BACK)
    row = 0
    for shard in text.shards:
        for batch in shard.batches(batch_size):
            counted = batch.observed.copy()
            counted[:, :SINK_TOKENS] = False
            held = np.arange(row, row + len(counted))[:, None] >= first_held_back
            yield FitSplit(number, batch, counted & ~held, counted & held, 1.0)
            row += len(counted)
