"""The text that a repair is fitted on, in batches: the tokens to fit to, and those held back to judge the fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from avss_dist.corpus.shards import Batch, CorpusPlan, Mask
from avss_dist.errors import CorpusError

HELD_BACK = 10  # one row of so many, the last ones of each text
SINK = 1  # leading tokens of every row: the first draws attention, and its stream is like no other


@dataclass(frozen=True, eq=False)
class Portion:
    """A batch of a text.

    Attributes:
        text: which text it is of, from 0.
        fitted, held_back: bool[rows, width], tokens that are fitted to, and others that are not; no first ones.
        weight: how often each token counts, so that a text counts by its own weight, however long.
    """

    text: int
    batch: Batch
    fitted: Mask
    held_back: Mask
    weight: float

    def with_sinks(self) -> tuple[Mask, Mask]:
        """The tokens that are fitted to, and those held back, each with the first ones of their rows."""
        first = self.batch.observed.copy()
        first[:, SINK:] = False
        fitted, held_back = (mask | (first & mask.any(1, keepdims=True)) for mask in (self.fitted, self.held_back))
        return fitted, held_back

    def scale(self, streams: torch.Tensor) -> torch.Tensor:
        """[rows, width, 1], by which the first tokens' streams become as long as others of their rows are on average.

        Args:
            streams: float32[rows, width, units].
        """
        lengths = streams.norm(dim=-1)
        others = torch.from_numpy(self.fitted | self.held_back).to(streams.device)
        mean = (lengths * others).sum(-1) / others.sum(-1).clamp_min(1)
        scale = torch.ones_like(lengths)
        scale[:, :SINK] = mean[:, None] / lengths[:, :SINK].clamp_min(torch.finfo(lengths.dtype).tiny)
        return scale[..., None]


def portions(texts: Sequence[CorpusPlan], batch_size: int, weights: Sequence[float] | None = None) -> list[Portion]:
    """The batches of texts, in order.

    Args:
        weights: how much each text counts; alike by default.

    Raises:
        CorpusError: a text has one row only, or no token to fit to.
    """
    read = [one for number, text in enumerate(texts) for one in _portions(number, text, batch_size)]
    counts = count_tokens(read, len(texts))
    for text, count in zip(texts, counts, strict=True):
        if not count:
            raise CorpusError(
                f"{text.source} has no token to fit to after the first of each row (rows: {text.num_sequences}).",
                "Name a longer text, or raise `max_sequences`.",
            )
    mean, weights = sum(counts) / len(counts), weights or [1.0] * len(texts)
    shares = [weight * len(weights) / sum(weights) for weight in weights]
    return [replace(one, weight=mean / counts[one.text] * shares[one.text]) for one in read]


def count_tokens(read: Sequence[Portion], texts: int) -> list[int]:
    """Tokens to fit to, of each text."""
    return [sum(int(one.fitted.sum()) for one in read if one.text == text) for text in range(texts)]


def _portions(number: int, text: CorpusPlan, batch_size: int) -> Iterator[Portion]:
    last = text.num_sequences - -(-text.num_sequences // HELD_BACK)  # the first row that is held back
    row = 0
    for shard in text.shards:
        for batch in shard.batches(batch_size):
            counted = batch.observed.copy()
            counted[:, :SINK] = False
            held = np.arange(row, row + len(counted))[:, None] >= last
            yield Portion(number, batch, counted & ~held, counted & held, 1.0)
            row += len(counted)
