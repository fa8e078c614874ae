"""Statistics of single rows of paired text, the input of tests of labels, intervals over pairs and classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, get_type_hints

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowStats:
    """Statistics of one layer and site, an entry for each row, over the tokens of its answer.

    The sums of ``count`` and ``near_zero`` over the rows of a stratum equal those of its LayerStats.
    """

    count: Annotated[Int64, "finite elements of the answer (tokens x units)"]
    near_zero: Annotated[Int64, "elements with abs(x) < threshold, for each threshold of the run, exact"]
    mean: Annotated[Float64, "mean over elements"]
    m2: Annotated[Float64, "sum over elements of (x - mean)^2; m2 / count is the variance"]
    pooled_variance: Annotated[Float64, "unbiased variance, over units, of the mean over tokens"]
    norm: Annotated[Float64, "mean over tokens of |x|"]
    relative_magnitude: Annotated[Float64, "mean over tokens of |output - input| / |input| (block site)"]


ROW_FIELDS = {
    f.name: hint.__metadata__[0]
    for f, hint in zip(fields(RowStats), get_type_hints(RowStats, include_extras=True).values(), strict=True)
}
"""Meaning of each field of RowStats."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AnswerRows:
    """Statistics of the rows of a shard of paired text.

    Attributes:
        row: int64[rows], the position of each row in the corpus.
        pair: int64[rows], the index of the prompt that each answer belongs to.
        strata: stratum of each row.
        prompt_tokens, answer_tokens: int64[rows], the number of tokens of each prompt and answer.
        stats: row statistics by (layer, site).
    """

    row: Int64
    pair: Int64
    strata: tuple[str, ...]
    prompt_tokens: Int64
    answer_tokens: Int64
    stats: Mapping[tuple[int, str], RowStats]

    def equals(self, other: AnswerRows) -> bool:
        """Whether every field is identical to the last bit."""
        same_keys = self.strata == other.strata and self.stats.keys() == other.stats.keys()
        names = ("row", "pair", "prompt_tokens", "answer_tokens")
        return (
            same_keys
            and all(np.array_equal(getattr(self, n), getattr(other, n)) for n in names)
            and all(
                np.array_equal(getattr(a, n), getattr(other.stats[key], n), equal_nan=True)
                for key, a in self.stats.items()
                for n in ROW_FIELDS
            )
        )
