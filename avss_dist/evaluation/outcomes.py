"""What evaluating and ablating give: objects that are tables, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from avss_dist.intervention import PARTS
from avss_dist.registry import metrics_of
from avss_dist.results import TabularResult
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.tasks.base import Result

if TYPE_CHECKING:
    from avss_dist.evaluation.evaluate import Evaluation

ESTIMATES = ("taylor", "gradient_l1", "gradient_l2", "weight_frobenius", *metrics_of("damage"))
COLUMNS = (
    "subject",
    "dropped",
    "task",
    "metric",
    "value",
    "stderr",
    "whole",
    "retention",
    "retention_low",
    "retention_high",
)


class Evaluations(list["Evaluation"], TabularResult):
    """What several subjects can do, in their order and that of the tasks.

    Attributes:
        findings: how near sparsity plans come to what they say, and what a guess keeps.
    """

    _bars = ("retention",)
    __repr__ = TabularResult.__repr__

    def __init__(self, found: Iterable[Evaluation], *, findings: Iterable[str] = ()) -> None:
        super().__init__(found)
        self.findings = tuple(findings)

    def table(self) -> pa.Table:
        """A row for each subject, task and metric."""
        rows = []
        for one in self:
            kept, metrics = one.retained, one.metrics()
            interval = (kept.value, kept.low, kept.high) if kept else (None, None, None)
            for (metric, value, stderr), whole in zip_longest(metrics, one.whole_metrics()):
                dropped = list(map(str, one.subject.intervention.removed))
                values = (one.subject.label, dropped, one.task, metric, value, stderr, whole, *interval)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return pa.Table.from_pylist(rows)


@dataclass(frozen=True, kw_only=True)
class LayerAblation:
    """What was measured of a layer.

    Attributes:
        loss: without it, in nats per token.
        increase: of the loss over that of the whole model, paired: sequence by sequence.
        sublayers: the same increase without its ``attention`` alone, and without its ``mlp`` alone.
        shapley: its Shapley value, a sample for each permutation.
        shapley_shared: 1 for each permutation that was truncated before the layer, else 0; None without truncation.
        estimates: what `gradients.Gradients` and `damage.Damage` give, by metric.
        damage: the mean of its ranks by two of these (`registry.metrics_of`), 1 the least.
    """

    layer: int
    loss: Result | None
    increase: Result | None
    sublayers: Mapping[str, Result]
    shapley: Result | None
    shapley_shared: Result | None
    estimates: Mapping[str, Result]
    damage: float | None = None

    def shapley_interval(self) -> tuple[float, float] | None:
        """Return the ends of the interval of ``shapley`` over permutations; None for fewer than ``MINIMUM_UNITS``."""
        if self.shapley is None or len(self.shapley.samples) < MINIMUM_UNITS:
            return None
        low, high = jackknife_interval(np.array(self.shapley.value), self.shapley.left_out)
        return float(low), float(high)


@dataclass(frozen=True, kw_only=True, repr=False)
class Ablation(TabularResult):
    """What was measured of a model.

    Attributes:
        whole: the loss of the whole model; None where layers were not left out.
        layers: in order.
        reliability: how far other text of the same size would order the layers alike (`reliability.reliability`); NaN
            where layers were not left out, or of fewer than four sequences.
    """

    model: str
    corpus: str
    whole: Result | None
    layers: Sequence[LayerAblation]
    reliability: float = float("nan")

    _bars = ("increase", "damage", "shapley", "taylor")

    @property
    def permutations(self) -> tuple[int, int]:
        """Permutations of the Shapley values: how many were truncated, and how many there are."""
        number = max((len(one.shapley.samples) for one in self.layers if one.shapley), default=0)
        shared = [one.shapley_shared.samples for one in self.layers if one.shapley_shared]
        return int(np.any(shared, axis=0).sum()) if shared else 0, number

    def table(self) -> pa.Table:
        """A row for each layer; null is what was not measured."""
        return pa.Table.from_pylist([_row(layer) for layer in self.layers])

    def summary(self) -> str:
        """The model, the text, and how many layers."""
        return f"{len(self.layers)} layers of {self.model} on {self.corpus}"


def _row(one: LayerAblation) -> dict[str, Any]:
    predicted = one.estimates.get(metrics_of("predicted")[0])
    low, high = one.shapley_interval() or (None, None)
    return {
        "layer": one.layer,
        "loss": _value(one.loss),
        "increase": _value(one.increase),
        "increase_stderr": None if one.increase is None else one.increase.stderr,
        **{kind: _value(one.sublayers.get(kind)) for kind in PARTS},
        **{f"{kind}_stderr": of.stderr if (of := one.sublayers.get(kind)) else None for kind in PARTS},
        "shapley": _value(one.shapley),
        "shapley_low": low,
        "shapley_high": high,
        "shapley_shared": _value(one.shapley_shared),
        "damage": one.damage,
        **{name: _value(one.estimates.get(name)) for name in ESTIMATES},
        "predicted_stderr": None if predicted is None else predicted.stderr,
    }


def _value(result: Result | None) -> float | None:
    return None if result is None else result.value
