"""Scores of layers at the points of an axis, such as the checkpoints of a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avss_dist.analysis.changes import SeriesChanges
from avss_dist.core.text import describe_count
from avss_dist.core.values import NewRow, TableRow
from avss_dist.read_requests import AXES
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import average_ranks, count_lowest, rank_lowest, spearman_rows

MIN_TREND = 4  # points from which the correlation of a rank with the axis is told

SCHEMA = pa.schema(
    [
        ("along", pa.string()),
        ("curve", pa.string()),
        ("point", pa.string()),
        ("value", pa.float64()),
        ("run_id", pa.string()),
        ("layer", pa.int64()),
        ("depth", pa.float64()),
        ("score", pa.float64()),
        ("rank", pa.float64()),
        ("is_lowest", pa.bool_()),
        ("change", pa.float64()),
        ("change_p", pa.float64()),
        ("is_changed", pa.bool_()),
        ("rank_moved", pa.bool_()),
        ("spearman", pa.float64()),
        ("spearman_low", pa.float64()),
        ("spearman_high", pa.float64()),
        ("lowest_as_last", pa.float64()),
        ("no_claim", pa.string()),
        ("seed", pa.int64()),
        ("seed_group", pa.string()),
        ("mean_rank", pa.float64()),
        ("rank_spread", pa.float64()),
        ("share_lowest", pa.float64()),
        ("differing_seeds", pa.int64()),
        ("seeds_no_claim", pa.string()),
    ]
)
"""Columns of a layer at a point of a curve.

``value`` is the place on the axis. ``rank`` is 1 for the lowest score, and the mean rank of tied ones.
``is_lowest`` layers are among the lowest 25%.

The others are of trainings, where changes can be tested, and else null: see `SeriesChanges`. ``change`` and the three
columns after it compare the layer with the point before, ``spearman`` and its interval the point with the one before.
``lowest_as_last`` is of the point. ``no_claim`` says why nothing is claimed about changes.

From ``seed`` on, they are of trainings that differ in the seed alone, at points that all of them have: mean and
standard deviation of the rank over seeds, the share of seeds in which the layer is among the lowest 25%, and the number
of other seeds from which its score differs beyond the choice of text. ``seeds_no_claim`` says why that is not known.
"""


AXIS_TITLES = {
    "step": "training step",
    "tokens": "tokens trained on",
    "size": "parameters",
    "sequence_length": "tokens in a row",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Scores of layers at the points of an axis, under conditions that are the same but for the axis.

    Models of different depth are compared at the relative depths of the one with the fewest layers.

    Attributes:
        along: name of the axis, of `AXES`.
        name: what the runs have in common, such as the name of a training.
        runs: row of ``runs`` of each point, in the order of the axis.
        layers: numbers of the layers, of the model with the fewest.
        depth: their relative depth, float64[layers].
        values: the score, float64[points, layers].
        changes: changes of a training that are beyond the choice of text; None if nothing is claimed about them.
        no_claim: the reason why nothing is claimed; empty if it is, or if nobody asked for it.
    """

    along: str
    name: str
    runs: Sequence[TableRow]
    layers: Sequence[int]
    depth: Float64
    values: Float64
    changes: SeriesChanges | None = None
    no_claim: str = ""

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs that are known, in ascending order."""
        return sorted({run["seed"] for run in self.runs if run["seed"] is not None})

    @property
    def seed(self) -> int | None:
        """The seed of its training; None if it is not known, or if its runs have several."""
        seeds = self.seeds
        if len(seeds) == 1:
            return seeds[0]
        return None

    @property
    def places(self) -> list[int]:
        """Place of each point on the axis."""
        return [run[AXES[self.along]] for run in self.runs]

    @property
    def points(self) -> list[str]:
        """Name of each point, such as ``1,000``."""
        return [describe_count(run[AXES[self.along]]) for run in self.runs]

    @cached_property
    def ranks(self) -> Float64:
        """Ranks of the layers at each point, float64[points, layers]: 1 for the lowest, tied ones get their mean."""
        return average_ranks(self.values)

    @property
    def is_lowest(self) -> NDArray[np.bool_]:
        """Whether each layer is among the lowest 25% at each point, bool[points, layers]."""
        is_lowest: NDArray[np.bool_] = rank_lowest(self.values) <= count_lowest(len(self.depth))
        return is_lowest

    @property
    def has_trend(self) -> bool:
        """Whether there are enough points for a `trend`."""
        return len(self.runs) >= MIN_TREND

    @property
    def trend(self) -> Float64:
        """Spearman's rho of the rank of each layer with the axis, float64[layers].

        NaN for fewer than `MIN_TREND` points.
        """
        if not self.has_trend:
            return np.full(len(self.depth), np.nan)
        ranks_of_layers = self.ranks.T
        order = np.arange(float(len(self.runs)))
        return spearman_rows(ranks_of_layers, np.broadcast_to(order, ranks_of_layers.shape))

    def rows(self) -> Iterator[NewRow]:
        """Yield a row of `SCHEMA` for each point and layer."""
        depth = self.depth.tolist()
        values = self.values.tolist()
        ranks = self.ranks.tolist()
        is_lowest = self.is_lowest.tolist()
        for place, (run, point) in enumerate(zip(self.runs, self.points, strict=True)):
            value_on_axis = float(run[AXES[self.along]])
            of_changes = _change_columns(self.changes, place)
            for column, layer in enumerate(self.layers):
                yield {
                    "along": self.along,
                    "curve": self.name,
                    "point": point,
                    "value": value_on_axis,
                    "run_id": run["run_id"],
                    "layer": layer,
                    "depth": depth[column],
                    "score": values[place][column],
                    "rank": ranks[place][column],
                    "is_lowest": is_lowest[place][column],
                    "no_claim": self.no_claim or None,
                    "seed": self.seed,
                    **of_changes.get(layer, {}),
                }


def _change_columns(changes: SeriesChanges | None, place: int) -> dict[int, NewRow]:
    """Return the columns of `SCHEMA` about changes of each layer at a point. Empty if nothing is claimed."""
    if changes is None:
        return {}
    columns: dict[int, NewRow] = {}
    for column, layer in enumerate(changes.layers):
        columns[layer] = {"lowest_as_last": changes.lowest_as_last[place].item()}
        if place == 0:
            continue
        before = place - 1
        rho, low, high = changes.agreement[:, before].tolist()
        columns[layer] |= {
            "change": changes.change[before, column].item(),
            "change_p": changes.p[before, column].item(),
            "is_changed": bool(changes.is_changed[before, column]),
            "rank_moved": bool(changes.rank_moved[before, column]),
            "spearman": rho,
            "spearman_low": low,
            "spearman_high": high,
        }
    return columns
