"""Criteria by which layers are chosen, and the values that a criterion gives to layers or to blocks of layers.

Nothing here measures a value, or looks for one in a warehouse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avss_dist.core.intervention import InterventionKey
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD
from avss_dist.core.values import TableRow
from avss_dist.corpus.seen import SeenText
from avss_dist.stats.catalog import RECIPES, SCORES
from avss_dist.stats.layer_stats import Float64

Layers = tuple[int, ...]
"""Indices of layers, ascending."""
Reading = tuple[str, str, float, str]
"""Reading of AVSS: site, recipe, threshold and its kind."""
PUBLISHED: Reading = (SITES[0], RECIPES[0], PUBLISHED_THRESHOLD, "absolute")
Rows = Sequence[TableRow]
LEAVE_ONE_OUT = "loss"
"""Score of a layer that is the rise of the loss without it. It has the name of the metric that it is measured in."""


@dataclass(frozen=True)
class Criterion:
    """A criterion by which layers are chosen.

    Attributes:
        by: the score; see `plans.choice.Choice`.
        reading: reading of AVSS; None for other scores, and for the first stored one.
        seed: seed of a random order; 0 for every other score.
    """

    by: str
    reading: Reading | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ValuesOrigin:
    """Origin of the values of a criterion.

    Attributes:
        run_id, task: the evaluation that measured them; empty for values that no evaluation measured.
        seen: texts that the evaluation has read.
    """

    run_id: str = ""
    task: str = ""
    seen: tuple[SeenText, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerValues(ValuesOrigin):
    """Values of a criterion for single layers.

    Attributes:
        values: by layer; low is unimportant. Layers without a value may be missing, or have NaN.
    """

    values: Mapping[int, float]

    def by_layer(self, num_layers: int) -> Float64:
        """Return the values as float64[layers], NaN for layers without one."""
        return np.array([self.values.get(layer, np.nan) for layer in range(num_layers)], np.float64)

    def key(self, layer: int) -> InterventionKey:
        """Return the key of the intervention that measured the value of a layer."""
        return InterventionKey(removed=(layer,))


@dataclass(frozen=True, kw_only=True)
class BlockValues(ValuesOrigin):
    """Values of a criterion for blocks of consecutive layers.

    Attributes:
        values: by the layers of a block; low is unimportant.
    """

    values: Mapping[Layers, float]


CriterionValues = LayerValues | BlockValues


def reading_of(row: TableRow) -> Reading:
    """Return site, recipe and threshold of a row of ``scores``."""
    return row["site"], row["recipe"], row["threshold"], row["threshold_kind"]


def count_layers(rows: Rows) -> int:
    """Return the number of layers of the model, from its rows of ``scores``."""
    return 1 + max(row["layer"] for row in rows)


def stored_values(rows: Rows, by: str, reading: Reading | None = None) -> LayerValues:
    """Return a score from activations as the rows of ``scores`` of one run hold it.

    Args:
        by: one of ``stats.catalog.FROM_ACTIVATIONS``.
        reading: reading of AVSS; the first stored one by default.
    """
    if reading is None:
        reading = reading_of(rows[0])
    column = SCORES[by].column
    values: dict[int, float] = {}
    for row in rows:
        if reading_of(row) != reading:
            continue
        value = row[column]
        if by == "avss" and row["rank"] is None:
            value = None
        values[row["layer"]] = np.nan if value is None else value
    return LayerValues(values=values)


def values_from_the_end(num_layers: int) -> LayerValues:
    """Return values that fall towards the last layers, which go first. The final layer has the highest, and stays."""
    values = {layer: float(num_layers - layer) for layer in range(num_layers)}
    values[num_layers - 1] = float(num_layers + 1)
    return LayerValues(values=values)


def random_values(num_layers: int, seed: int) -> LayerValues:
    """Return the values of a random order of the layers."""
    order = np.random.default_rng(seed).permutation(num_layers).astype(np.float64)
    return LayerValues(values=dict(enumerate(order.tolist())))
