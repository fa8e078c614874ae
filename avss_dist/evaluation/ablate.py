"""Ablation: the effect of each layer of a model on its loss, the ground truth for scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.core.intervention import NO_INTERVENTION, PARTS, Removals, Sublayer, layer_of
from avss_dist.core.names import LOSS, SUBLAYER_LOSS
from avss_dist.core.registry import DAMAGE_TASK, SCORES, metrics_of
from avss_dist.core.results import TabularResult
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.sensitivity import (
    Sensitivity,
    agreement_of,
    increase_over,
    is_of_rounding,
    rounding_tasks,
    sensitivity,
)
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlacedModel,
    require_intended,
    require_listable,
    require_partition,
)
from avss_dist.evaluation.tasks import plan_text
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import text_config
from avss_dist.models.quantization import require_unquantized
from avss_dist.pruning.ground_truth import mean_ranks
from avss_dist.requests import AblateRequest
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.shapley import SHAPLEY, SHARED, Shapley
from avss_dist.tasks.task import Result, Task
from avss_dist.tasks.text_loss import LeaveOneOut

MOST_PASSES = 100_000  # passes of a batch through a model that an ablation makes without `allow_many`
PERMUTATIONS_PER_CELL = 4
ESTIMATED = ("taylor", "gradient_l1", "gradient_l2", "weight_frobenius", *metrics_of("damage"))


@dataclass(frozen=True, kw_only=True)
class LayerAblation:
    """Measurements of a layer.

    Attributes:
        loss: loss without the layer, in nats per token.
        increase: increase of the loss over that of the whole model, paired by sequence.
        sublayers: increase without its ``attention`` alone, and without its ``mlp`` alone.
        shapley: Shapley value of the layer, with a sample for each permutation.
        shapley_shared: 1 for each permutation that was truncated before the layer, else 0; None without truncation.
        estimates: results of `backward.Gradients` and `damage.Damage`, by metric.
        damage: mean of the layer's ranks by the two estimates that `registry.metrics_of` names; 1 is the lowest.
    """

    layer: int
    loss: Result | None
    increase: Result | None
    sublayers: Mapping[str, Result]
    shapley: Result | None
    shapley_shared: Result | None
    estimates: Mapping[str, Result]
    damage: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Ablation(TabularResult):
    """Measurements of the layers of a model.

    Attributes:
        whole: loss of the whole model; None if no layers were left out.
        layers: measurements of each layer, in order.
        reliability: agreement with the order of layers on other text of the same size (`scorecard.reliability`); NaN
            if no layers were left out, or for fewer than four sequences.
        sensitivity: effect of rounded weights; None without number formats.
    """

    model: str
    corpus: str
    whole: Result | None
    layers: Sequence[LayerAblation]
    reliability: float = float("nan")
    sensitivity: Sensitivity | None = None

    _bars = ("increase", "damage", "shapley", "taylor")

    @property
    def permutations(self) -> tuple[int, int]:
        """Number of truncated permutations of the Shapley values, and number of all permutations."""
        number = max((len(layer.shapley.samples) for layer in self.layers if layer.shapley), default=0)
        shared = [layer.shapley_shared.samples for layer in self.layers if layer.shapley_shared]
        return int(np.any(shared, axis=0).sum()) if shared else 0, number

    def table(self) -> pa.Table:
        """Return a table with a row for each layer, with null for values that were not measured."""
        return pa.Table.from_pylist([_row(layer) for layer in self.layers])

    def summary(self) -> str:
        """Return the number of layers, the model and the text, in a line."""
        return f"{len(self.layers)} layers of {self.model} on {self.corpus}"


def _row(layer: LayerAblation) -> dict[str, Any]:
    predicted = layer.estimates.get(metrics_of("predicted")[0])
    shapley, low, high = layer.shapley, None, None
    if shapley is not None and len(shapley.samples) >= MINIMUM_UNITS:  # over permutations
        low, high = map(float, jackknife_interval(np.array(shapley.value), shapley.left_out))
    return {
        "layer": layer.layer,
        "loss": getattr(layer.loss, "value", None),
        "increase": getattr(layer.increase, "value", None),
        "increase_stderr": getattr(layer.increase, "stderr", None),
        **{part: getattr(layer.sublayers.get(part), "value", None) for part in PARTS},
        **{f"{part}_stderr": getattr(layer.sublayers.get(part), "stderr", None) for part in PARTS},
        "shapley": getattr(layer.shapley, "value", None),
        "shapley_low": low,
        "shapley_high": high,
        "shapley_shared": getattr(layer.shapley_shared, "value", None),
        "damage": layer.damage,
        **{name: getattr(layer.estimates.get(name), "value", None) for name in ESTIMATED},
        "predicted_stderr": getattr(predicted, "stderr", None),
    }


def ablate(request: AblateRequest) -> Ablation:
    """Measure the effect of each layer of a model on its loss. Cells that the warehouse has are not measured again.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`). Measured cells remain in the warehouse.
    """
    if request.formats:
        problem = "has a part of each weight in a process, and a rounded weight needs scales of the whole."
        require_partition(request.execution.partition, lambda partition: not partition.splits_matrices, problem)
    require_listable(request.shapley, "permutations", "Lower `shapley`.")
    corpus = RedactedURI(request.corpus)
    checkpoint = resolve(str(request.model), trust_remote_code=request.settings.trust_remote_code)
    if request.formats:
        require_unquantized(checkpoint)
    with EvaluationSession.open(request.warehouse, request.settings, request.execution, request.on_event) as session:
        model = session.place(checkpoint, request.settings)
        text = plan_text(checkpoint, corpus, model.settings)
        _require_intended(request, model, text)
        results = session.measure({model.plan(task): [NO_INTERVENTION] for task in _tasks(request, corpus, text)})
    by_task = [(planned.task, task_results) for planned, task_results in results.items()]
    removals = [result for task, task_results in by_task if not is_of_rounding(task) for result in task_results]
    return _ablation(str(request.model), corpus, removals, sensitivity(request, corpus, by_task))


def _require_intended(request: AblateRequest, model: PlacedModel, text: CorpusPlan) -> None:
    """Refuse more than `MOST_PASSES` forward passes unless ``allow_many`` is set."""
    code = model.settings.trust_remote_code
    config = text_config(model.checkpoint, trust_remote_code=code).get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or 1
    batches = text.num_batches(model.settings.batch_size)
    removals = request.leave_one_out + len(PARTS) * request.sublayers + request.shapley
    removals += len(request.formats) * request.rounded_layers
    require_intended(
        removals * layers * batches,
        MOST_PASSES,
        f"Up to {{}} forward passes would be made (batches: {batches:,}, layers: {layers:,}, times that each is left "
        f"out{' or rounded' * bool(request.formats)}: {removals:,})",
        "Lower `shapley` or `max_sequences`.",
        allow_many=request.allow_many,
    )


def _tasks(request: AblateRequest, corpus: RedactedURI, text: CorpusPlan) -> Iterator[Task]:
    """Yield the task of each requested measurement of a text."""
    if request.gradients:
        yield Task(name=f"{SCORES['taylor'].task}{corpus}", parts=tuple(map(Gradients, text.shards)))
    if request.leave_one_out:
        yield Task(name=f"{SCORES['loss'].task}{corpus}", parts=tuple(map(LeaveOneOut, text.shards)))
    if request.shapley:
        seeds = np.random.SeedSequence(request.seed).generate_state(request.shapley).tolist()
        chunks = [tuple(seeds[i : i + PERMUTATIONS_PER_CELL]) for i in range(0, len(seeds), PERMUTATIONS_PER_CELL)]
        parts = tuple(Shapley(shards=text.shards, seeds=chunk, truncation=request.truncation) for chunk in chunks)
        yield Task(name=f"{SCORES['shapley'].task}{corpus}", parts=parts)
    if request.sublayers:
        yield Task(
            name=f"{SUBLAYER_LOSS}{corpus}", parts=tuple(LeaveOneOut(shard, sublayers=True) for shard in text.shards)
        )
    if request.damage:
        yield Task(name=f"{DAMAGE_TASK}{corpus}", parts=tuple(Damage(shard=shard) for shard in text.shards))
    yield from rounding_tasks(request, corpus, text)


def _ablation(model: str, corpus: str, results: Iterable[Result], rounded: Sensitivity | None) -> Ablation:
    """Return the measurements of every layer, from the results of all tasks."""
    losses: dict[Removals, Result] = {}
    estimates: dict[int, dict[str, Result]] = {}
    for result in results:
        if result.metric == LOSS:
            losses[result.removed] = result
        if result.removed and result.metric == LOSS:
            estimates.setdefault(layer_of(result.removed[0]), {})
        elif result.layer is not None and not result.removed:
            estimates.setdefault(result.layer, {})[result.metric] = result
    whole = losses.get(())
    values = [(name, layer, result.value) for layer, by_name in estimates.items() for name, result in by_name.items()]
    ranks = mean_ranks("damage", values)

    layers = [
        LayerAblation(
            layer=layer,
            loss=losses.get((layer,)),
            increase=increase_over(whole, losses.get((layer,))),
            sublayers={
                part: value for part in PARTS if (value := increase_over(whole, losses.get((Sublayer(layer, part),))))
            },
            shapley=by_name.pop(SHAPLEY, None),
            shapley_shared=by_name.pop(SHARED, None),
            estimates=by_name,
            damage=ranks.get(layer),
        )
        for layer, by_name in sorted(estimates.items())
    ]
    agreement = agreement_of(layer.increase for layer in layers)
    return Ablation(model=model, corpus=corpus, whole=whole, layers=layers, reliability=agreement, sensitivity=rounded)
