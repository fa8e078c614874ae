"""Speed and memory of a smaller model beside its whole one, as they were measured. It does not import torch.

`evaluation.timing` measures them. They are part of no id, and no warehouse keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import pyarrow as pa

from avss_dist.core.results import TabularResult
from avss_dist.core.values import NewRow

FIRST_TOKEN = "first token"
DECODING = "decoding, batch 1"
BATCH = 8
DECODING_BATCH = f"decoding, batch {BATCH}"
WEIGHTS = "weights"
CACHE = "cache per token"
SECONDS = "s"
TOKENS_PER_SECOND = "tokens/s"
BYTES = "bytes"


@dataclass(frozen=True)
class Spread:
    """A number that was measured in several rounds: its median, and the lowest and the highest value."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        """Return the spread of the values of all rounds."""
        return cls(median(values), min(values), max(values))

    def columns(self, name: str) -> NewRow:
        """Return the three values by the names of their columns: NAME, NAME_low and NAME_high."""
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True, kw_only=True)
class SpeedMeasure:
    """A measure of a smaller model beside that of the whole one.

    Attributes:
        name: what was measured.
        unit: seconds, tokens per second or bytes.
        ratio: how many times as fast the smaller model is, or the share of the bytes that it takes; over rounds.
    """

    name: str
    unit: str
    ratio: Spread
    smaller: Spread
    whole: Spread

    @property
    def is_size(self) -> bool:
        """Whether it is a number of bytes, which is the same in all rounds."""
        return self.unit == BYTES

    def describe_ratio(self) -> str:
        """Return the ratio as text: ``1.31 times as fast``, or ``73% of the bytes``."""
        if self.is_size:
            return f"{self.ratio.median:.0%} of the bytes"
        return f"{self.ratio.median:.2f} times as fast"


@dataclass(frozen=True, kw_only=True, repr=False)
class Speed(TabularResult):
    """Speed and memory of a smaller model beside its whole one.

    Attributes:
        smaller, whole: names of the models.
        measures: seconds to the first token, decoded tokens per second, and bytes of weights and of the cache.
        dtype, whole_dtype: dtypes in which the models compute.
        device: name of the device.
        threads: threads of the CPU that computed.
        rounds: number of rounds.
        prompt_tokens: tokens of the prompt before the first token.
        cache_tokens: tokens in the cache whose bytes per token are told.
        notes: sentences on what differs from the usual way of measuring.
    """

    smaller: str
    whole: str
    measures: tuple[SpeedMeasure, ...]
    dtype: str
    whole_dtype: str
    device: str
    threads: int
    rounds: int
    prompt_tokens: int
    cache_tokens: int
    notes: tuple[str, ...] = ()

    _bars = ("ratio",)

    def table(self) -> pa.Table:
        """Return a table with a row for each measure: the ratio, the values of both models, and the conditions."""
        rows: list[NewRow] = []
        for measure in self.measures:
            row: NewRow = {"model": self.smaller, "whole_model": self.whole}
            row |= {"measure": measure.name, "unit": measure.unit}
            row |= measure.ratio.columns("ratio")
            row |= measure.smaller.columns("value")
            row |= measure.whole.columns("whole")
            row |= self._conditions()
            rows.append(row)
        return pa.Table.from_pylist(rows)

    def _conditions(self) -> NewRow:
        """Return the columns that say how all rows were measured."""
        return {
            "dtype": self.dtype,
            "whole_dtype": self.whole_dtype,
            "device": self.device,
            "threads": self.threads,
            "rounds": self.rounds,
            "prompt_tokens": self.prompt_tokens,
            "cache_tokens": self.cache_tokens,
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Return the ratios in a line: ``1.31 times as fast at decoding, batch 1 (1.28 to 1.35), ...``."""
        ratios = []
        for measure in self.measures:
            ratio = measure.ratio
            if measure.is_size:
                ratios.append(f"{measure.describe_ratio()} of {measure.name}")
            else:
                spread = f"({ratio.low:.2f} to {ratio.high:.2f})"
                ratios.append(f"{measure.describe_ratio()} at {measure.name} {spread}")
        return f"{self.smaller} beside {self.whole}: {', '.join(ratios)}"
