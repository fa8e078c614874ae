"""Comparison of the loss of a text under two row starts, to detect the one that the model expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

AS_READ, OTHER_START = "loss_as_read", "loss_other_start"  # metrics of the task `settings.ROW_START`
FAR_WORSE = 1.5  # ratio of two perplexities


@dataclass(frozen=True)
class RowStarts:
    """Mean losses, in nats per token, of the same text under two row starts.

    Attributes:
        as_read: loss with the start that the rows have.
        other: loss with the other start.
    """

    as_read: float
    other: float

    @classmethod
    def of_losses(cls, losses: Mapping[str, float]) -> RowStarts | None:
        """Read the losses from an evaluation's results by metric. Return None if one is missing."""
        if AS_READ not in losses or OTHER_START not in losses:
            return None
        return cls(losses[AS_READ], losses[OTHER_START])

    @property
    def ratio(self) -> float:
        """Perplexity of the text as it was read relative to that with the other start."""
        return float(np.exp(self.as_read - self.other))

    def describe(self, model: str, corpus: str) -> str | None:
        """Return a warning if the model seems to expect the other start, else None."""
        if not self.ratio > FAR_WORSE:
            return None
        return (
            f"{model} has a perplexity of {np.exp(self.as_read):,.1f} on the first rows of {corpus}, and of "
            f"{np.exp(self.other):,.1f} on the same text with another start of each row, which it seems to expect. Set "
            "`row_start` to auto if it is none; else see whether its tokenizer lacks `add_bos_token`."
        )
