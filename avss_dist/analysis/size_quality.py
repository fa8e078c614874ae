"""Quality by size: what the evaluated plans of a checkpoint keep of a text, and how many bits their weights have.

A plan drops layers, makes inputs of linear maps zero, or rounds their weights. Its size is what a token meets of the
weights of the linear maps: a dropped layer has none, an input that is zero meets none, and a rounded weight has the
bits of its format. It is a share of the whole model's in 16 bits. Embeddings and norms, which plans leave as they are,
count in the share of the model alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Any

import pyarrow.compute as pc

from avss_dist.analysis.verdict import readable_value
from avss_dist.core.intervention import InterventionKey, count_removed, whole_layers
from avss_dist.core.names import LOSS, PERPLEXITY
from avss_dist.warehouse.reader import Warehouse

BITS = 16  # of a weight of the whole model
SAME_SIZE = 0.01  # relative difference of sizes that count as the same: plans come close to a budget
_Map = tuple[int, str]  # layer, and path below it
_Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SizedPlan:
    """An evaluated plan with its size.

    Attributes:
        kind: changes that it makes: ``layers``, ``sparsity``, ``bits``, or several of them.
        description: the changes, for people.
        size: share of the bits of the whole model's linear maps, or of its layers if the maps are not known.
        share_of_model: share of the bits of all parameters of the whole model; None if it is not known.
        perplexity: perplexity of the text under the plan.
        retention: perplexity of the whole model over that of the plan.
        is_best: whether no other plan of the same text keeps more at the same size or a smaller one.
    """

    kind: str
    description: str
    size: float
    perplexity: float
    retention: float
    share_of_model: float | None = None
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class SizeQuality:
    """Evaluated plans of a checkpoint on one text.

    Attributes:
        task: name of the task.
        plans: from the smallest to the largest.
        has_sizes: whether the sizes of linear maps are known. If not, every layer counts as one of the same size.
    """

    task: str
    plans: tuple[SizedPlan, ...]
    has_sizes: bool


def size_quality(store: Warehouse, run: _Row) -> list[SizeQuality]:
    """Return the evaluated plans of a run's checkpoint for each text with at least two of them.

    Plans that drop sublayers or experts, or that scale layers, are left out: their size is not known here.

    Args:
        run: a row of ``runs``.
    """
    of_checkpoint = pc.field("revision") == run["revision"]
    where = of_checkpoint & pc.starts_with(pc.field("task"), PERPLEXITY) & (pc.field("metric") == LOSS)
    texts: defaultdict[tuple[str, str], dict[InterventionKey, float]] = defaultdict(dict)
    for row in store.table("evaluations", where=where & pc.field("layer").is_null()).to_pylist():
        texts[row["task"], row["settings"]][InterventionKey.of_row(row)] = row["value"]
    if not texts:
        return []
    sizes = _Sizes(store, run, of_checkpoint)
    compared = [
        SizeQuality(task=task, plans=tuple(_marked([*_plans(losses, sizes)])), has_sizes=bool(sizes.weights))
        for (task, _), losses in texts.items()
    ]
    return [result for result in compared if len(result.plans) > 1]


class _Sizes:
    """Sizes of the linear maps of a checkpoint, and those that its plans leave."""

    def __init__(self, store: Warehouse, run: _Row, of_checkpoint: pc.Expression) -> None:
        self.num_layers: int = run["num_layers"]
        self.num_parameters: int | None = run.get("num_parameters")
        self.bits: defaultdict[str, dict[_Map, float]] = defaultdict(dict)  # by key of the rounding
        self.zeros: defaultdict[str, dict[_Map, float]] = defaultdict(dict)  # by key of the sparsity
        self.descriptions: dict[str, str] = {}
        measured = json.loads(run["projections"] or "[]")
        self.weights: dict[_Map, int] = {(layer, path): out * given for layer, path, _, out, given in measured}
        for row in store.table("sparsity", where=of_checkpoint).to_pylist():
            place = row["layer"], row["map"]
            self.weights[place] = row["outputs"] * row["inputs"]
            self.zeros[row["sparsity_plan"]][place] = row["sparsity"]
            self.descriptions[row["sparsity_plan"]] = f"{row['target']:.0%} zeros by {row['method']}"
        for row in store.table("precision", where=of_checkpoint).to_pylist():
            place = row["layer"], row["map"]
            self.weights[place] = row["num_weights"]
            self.bits[row["rounding"]][place] = row["bits_per_weight"]
            self.descriptions[row["rounding"]] = f"by {row['method'] or 'hand'}"
        for key, bits in self.bits.items():
            of_plan = sum(self.weights[place] for place in bits)
            mean = sum(self.weights[place] * bits[place] for place in bits) / of_plan
            self.descriptions[key] = f"{mean:.2f} bits {self.descriptions[key]}"

    def knows(self, key: InterventionKey) -> bool:
        """Whether the size of a model under an intervention is known."""
        return (
            not key.residual_scale
            and len(whole_layers(key.removed)) == len(key.removed)
            and (key.rounding is None or key.rounding in self.bits)
            and (key.sparsity is None or key.sparsity in self.zeros)
        )

    def share(self, key: InterventionKey) -> float:
        """Return the size of a model under an intervention, as a share of the whole model's."""
        bits, zeros = self.bits.get(key.rounding or "", {}), self.zeros.get(key.sparsity or "", {})
        if not self.weights:
            return 1 - len(key.removed) / self.num_layers
        remaining = sum(
            weights * bits.get(place, BITS) * (1 - zeros.get(place, 0.0))
            for place, weights in self.weights.items()
            if place[0] not in key.removed
        )
        return remaining / (BITS * sum(self.weights.values()))

    def share_of_model(self, key: InterventionKey) -> float | None:
        """Return the size of a model under an intervention, as a share of all parameters; None if it is not known."""
        if not self.weights or not self.num_parameters:
            return None
        return 1 - (1 - self.share(key)) * sum(self.weights.values()) / self.num_parameters

    def describe(self, key: InterventionKey) -> str:
        """Return the changes of an intervention, for people."""
        changes = [f"{count_removed(key.removed)} dropped"] if key.removed else []
        changes += ["repaired"] if key.patch else []
        changes += [self.descriptions[name] for name in (key.sparsity, key.rounding) if name]
        return ", ".join(changes)


def _plans(losses: Mapping[InterventionKey, float], sizes: _Sizes) -> Iterator[SizedPlan]:
    """Yield the plans among the losses of a text; none without the loss of the whole model."""
    whole = losses.get(InterventionKey())
    if whole is None:
        return
    for key, loss in losses.items():
        kinds = {"layers": key.removed, "sparsity": key.sparsity, "bits": key.rounding}
        kind = " + ".join(name for name, change in kinds.items() if change)
        if kind and sizes.knows(key):
            yield SizedPlan(
                kind=kind,
                description=sizes.describe(key),
                size=sizes.share(key),
                perplexity=readable_value(LOSS, loss),
                retention=exp(whole - loss),
                share_of_model=sizes.share_of_model(key),
            )


def _marked(plans: Sequence[SizedPlan]) -> Iterator[SizedPlan]:
    """Yield plans from the smallest to the largest, with the best marked."""
    for plan in sorted(plans, key=lambda plan: (plan.size, -plan.retention)):
        others = (other.retention for other in plans if other.size <= plan.size * (1 + SAME_SIZE))
        yield replace(plan, is_best=plan.retention >= max(others))
