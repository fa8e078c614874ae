"""Ground truth about a model's layers, measured by the cells of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.reliability import reliability
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION, PARTS, Removals, Sublayer, layer_of
from avss_dist.core.names import LOSS, SUBLAYER_LOSS
from avss_dist.core.registry import DAMAGE_TASK, DRAWS, PARTITIONS, SCORES, metrics_of
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import DEFAULT_WAREHOUSE, Execution, Settings
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.session import (
    EvaluationSession,
    evaluation_options,
    require_intended,
    require_listable,
)
from avss_dist.evaluation.tasks import plan_text
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import text_config
from avss_dist.pruning.ground_truth import mean_ranks
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.tasks.base import Result, Task
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.gradients import Gradients
from avss_dist.tasks.layer_removal import SHAPLEY, SHARED, LeaveOneOut, Shapley

MOST_PASSES = 100_000  # passes of a batch through a model that an ablation makes without `allow_many`

CHUNK = 4  # permutations in a cell
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
        estimates: results of `gradients.Gradients` and `damage.Damage`, by metric.
        damage: mean of its ranks by two of these (`registry.metrics_of`); 1 is the least.
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
    """Measurements of the layers of a model.

    Attributes:
        whole: loss of the whole model; None if no layers were left out.
        layers: measurements of each layer, in order.
        reliability: agreement with the order of layers on other text of the same size (`reliability.reliability`); NaN
            if no layers were left out, or for fewer than four sequences.
    """

    model: str
    corpus: str
    whole: Result | None
    layers: Sequence[LayerAblation]
    reliability: float = float("nan")

    _bars = ("increase", "damage", "shapley", "taylor")

    @property
    def permutations(self) -> tuple[int, int]:
        """Number of truncated permutations of the Shapley values, and number of all."""
        number = max((len(one.shapley.samples) for one in self.layers if one.shapley), default=0)
        shared = [one.shapley_shared.samples for one in self.layers if one.shapley_shared]
        return int(np.any(shared, axis=0).sum()) if shared else 0, number

    def table(self) -> pa.Table:
        """Return a table with a row for each layer; null for values that were not measured."""
        return pa.Table.from_pylist([_row(layer) for layer in self.layers])

    def summary(self) -> str:
        """Return the number of layers, the model and the text, in a line."""
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
        **{name: _value(one.estimates.get(name)) for name in ESTIMATED},
        "predicted_stderr": None if predicted is None else predicted.stderr,
    }


def _value(result: Result | None) -> float | None:
    return None if result is None else result.value


def ablate(
    model: str | Path,
    *,
    corpus: str,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    leave_one_out: bool = True,
    sublayers: bool = False,
    shapley: int = 0,
    truncation: bool = True,
    seed: int = 0,
    gradients: bool = False,
    damage: bool = False,
    draws: int = DRAWS,
    skip_sequences: int = 0,
    allow_many: bool = False,
    reporter: OnEvent | None = None,
    **options: Any,
) -> Ablation:
    """Measure the effect of each layer of a model on its loss, and keep it in a warehouse; nothing is measured twice.

    Args:
        model: hub id, folder, or ``.gguf`` file of a causal language model.
        leave_one_out: the loss without each layer (`layer_removal.LeaveOneOut`).
        sublayers: the loss without the attention and without the MLP of each layer.
        shapley: permutations to sample for layer Shapley values (`layer_removal.Shapley`); 0 for none.
        truncation, seed: of the permutations.
        gradients: a backward pass too (`gradients.Gradients`).
        damage: what leaving layers out does, estimated by a few passes (`damage.Damage`).
        draws: of labels, for that.
        skip_sequences: rows at the start of the corpus that are not read.
        allow_many: go on with more than `MOST_PASSES`.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = evaluation_options(dict(options))
    _require_sensible(execution, leave_one_out or sublayers, shapley, seed, gradients, draws if damage else None)
    require_listable(shapley, "permutations", "Lower `shapley`.")
    corpus = RedactedURI(corpus)
    checkpoint = resolve(str(model), trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(warehouse, settings, execution, reporter) as session:
        placed = session.place(checkpoint, settings)
        text = plan_text(checkpoint, corpus, placed.settings, skip_sequences=skip_sequences)
        removals = leave_one_out + len(PARTS) * sublayers + shapley
        _require_intended(checkpoint, text, placed.settings, removals, allow_many=allow_many)
        seeds = np.random.SeedSequence(seed).generate_state(shapley).tolist()
        tasks = list(_tasks(corpus, text, leave_one_out, gradients, seeds, truncation))
        if sublayers:
            tasks.append(sublayers_task(corpus, text))
        if damage:
            tasks.append(damage_task(corpus, text, draws))
        results = session.measure([(placed.plan(task), [NO_INTERVENTION]) for task in tasks])
    return _ablation(str(model), corpus, [result for found in results.values() for result in found])


def _require_sensible(
    execution: Execution, losses: bool, shapley: int, seed: int, gradients: bool, draws: int | None
) -> None:
    if min(shapley, seed) < 0:
        raise ConfigError(f"`shapley` and `seed` cannot be negative: {min(shapley, seed)}.")
    if gradients or draws is not None:
        require_gradients(execution)
    if draws is not None and draws < 1:
        raise ConfigError(f"`draws` must be at least 1: {draws}.")
    if not (losses or shapley or gradients or draws):
        raise ConfigError(
            "Nothing would be measured.", "Choose `leave_one_out`, `sublayers`, `shapley`, `gradients` or `damage`."
        )


def require_gradients(execution: Execution) -> None:
    """Refuse a partition that has no backward pass.

    Raises:
        ConfigError: the message names those that have one.
    """
    partition = execution.partition
    if partition != "auto" and not PARTITIONS[partition].backward:
        able = [name for name, info in PARTITIONS.items() if info.backward]
        raise ConfigError(f"`partition` {partition} has no gradients.", f"Use {', '.join(able)}.")


def _require_intended(
    checkpoint: Checkpoint, text: CorpusPlan, settings: Settings, removals: int, *, allow_many: bool
) -> None:
    """Refuse more than `MOST_PASSES` forward passes unless ``allow_many`` is set.

    Args:
        removals: number of times that every layer is left out.
    """
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code).get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or 1
    batches = text.num_batches(settings.batch_size)
    require_intended(
        removals * layers * batches,
        MOST_PASSES,
        f"Up to {{}} forward passes would be made (batches: {batches:,}, layers: {layers:,}, times that each is left "
        f"out: {removals:,})",
        "Lower `shapley` or `max_sequences`.",
        allow_many=allow_many,
    )


def _tasks(
    corpus: str, text: CorpusPlan, leave_one_out: bool, gradients: bool, seeds: Sequence[int], truncation: bool
) -> Iterator[Task]:
    if gradients:
        yield Task(name=f"{SCORES['taylor'].task}{corpus}", parts=tuple(Gradients(shard) for shard in text.shards))
    if leave_one_out:
        yield Task(name=f"{SCORES['loss'].task}{corpus}", parts=tuple(LeaveOneOut(shard) for shard in text.shards))
    if seeds:
        chunks = [tuple(seeds[start : start + CHUNK]) for start in range(0, len(seeds), CHUNK)]
        parts = tuple(Shapley(shards=text.shards, seeds=chunk, truncation=truncation) for chunk in chunks)
        yield Task(name=f"{SCORES['shapley'].task}{corpus}", parts=parts)


def sublayers_task(corpus: str, text: CorpusPlan) -> Task:
    """Return the task of the loss on a text without each sublayer."""
    return Task(
        name=f"{SUBLAYER_LOSS}{corpus}", parts=tuple(LeaveOneOut(shard, sublayers=True) for shard in text.shards)
    )


def damage_task(corpus: str, text: CorpusPlan, draws: int = DRAWS) -> Task:
    """Return the task that estimates the damage of every layer on a text."""
    parts = tuple(Damage(shard=shard, draws=draws) for shard in text.shards)
    return Task(name=f"{DAMAGE_TASK}{corpus}", parts=parts)


def _ablation(model: str, corpus: str, found: Sequence[Result]) -> Ablation:
    losses = {result.removed: result for result in found if result.metric == LOSS}
    whole = losses.get(())
    of: dict[int, dict[str, Result]] = {layer_of(removed[0]): {} for removed in losses if removed}
    for result in found:
        if result.layer is not None and not result.removed:
            of.setdefault(result.layer, {})[result.metric] = result
    measured = [(name, layer, result.value) for layer, by_metric in of.items() for name, result in by_metric.items()]
    ranks = mean_ranks("damage", measured)
    layers = [
        LayerAblation(
            layer=layer,
            loss=losses.get((layer,)),
            increase=_increase(whole, losses[layer,]) if whole and (layer,) in losses else None,
            sublayers=_of_sublayers(layer, losses),
            shapley=of[layer].pop(SHAPLEY, None),
            shapley_shared=of[layer].pop(SHARED, None),
            estimates=of[layer],
            damage=ranks.get(layer),
        )
        for layer in sorted(of)
    ]
    return Ablation(model=model, corpus=corpus, whole=whole, layers=layers, reliability=_reliability(layers))


def _of_sublayers(layer: int, losses: Mapping[Removals, Result]) -> dict[str, Result]:
    without = {part: losses.get((Sublayer(layer, part),)) for part in PARTS} if () in losses else {}
    return {part: _increase(losses[()], result) for part, result in without.items() if result is not None}


def _reliability(layers: Sequence[LayerAblation]) -> float:
    increases = [layer.increase.samples for layer in layers if layer.increase is not None]
    return reliability(np.stack(increases, axis=1)) if increases else float("nan")


def _increase(whole: Result, without: Result) -> Result:
    samples = without.samples - whole.samples
    return replace(without, samples=samples)
