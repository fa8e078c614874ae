"""Next-token predictions of a model in short form: the most probable tokens, and the probability of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

BYTES_OF_TOKEN, BYTES_OF_POSITION = 8, 4  # stored: of a token with its log-probability, and of the other tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class TopPredictions:
    """Predictions at the counted positions of some rows, in order.

    Attributes:
        token_ids: int32[positions, top], the most probable next tokens, the first one first.
        log_probs: float32[positions, top], natural logarithms of their probabilities.
        others: float32[positions], logarithm of the probability of all other tokens together; -inf without others.
        drawn_ids: int32[positions, draws], tokens drawn from the others by their probabilities.
        drawn_log_probs: float32[positions, draws], logarithms of their probabilities among all tokens.
        row: int32[positions], index of the row.
        position: int32[positions], index in its row of the token whose successor is predicted.
    """

    token_ids: Int32
    log_probs: Float32
    others: Float32
    drawn_ids: Int32
    drawn_log_probs: Float32
    row: Int32
    position: Int32

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.others)


def join(parts: Sequence[TopPredictions], rows: Sequence[int]) -> TopPredictions:
    """Return the predictions of consecutive parts of a text as one; rows are counted through.

    Args:
        rows: number of rows of each part.
    """
    first_rows = np.cumsum([0, *rows[:-1]], dtype=np.int32)
    values = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(TopPredictions)}
    values["row"] = np.concatenate([part.row + first for part, first in zip(parts, first_rows, strict=True)])
    return TopPredictions(**values)
