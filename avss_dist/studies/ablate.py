"""Ablation: the effect of each layer of a model, and of rounded weights, on its loss, the ground truth for scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.ground_truth import mean_ranks
from avss_dist.analysis.scorecard import reliability
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    PARTS,
    Sublayer,
    layer_of,
    parse_rounded,
)
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.seen import ABLATION, PRECISION, seen_text
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.distillation.curve import Preparing, ignore
from avss_dist.evaluation.limits import require_intended, require_listable, require_partition
from avss_dist.evaluation.memory import estimate_memory
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.models.checkpoint.quantization import require_unquantized
from avss_dist.plans.catalog import ROUNDING_ESTIMATES
from avss_dist.requests import AblateRequest
from avss_dist.stats.catalog import DAMAGE_TASK, SCORES, metrics_of
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.metrics import BITS_PER_WEIGHT, LOSS, NUM_WEIGHTS
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.shapley import SHAPLEY, SHARED, Shapley
from avss_dist.tasks.task import Measure, Result, Task
from avss_dist.tasks.text_loss import LeaveOneOut
from avss_dist.warehouse.names import ROUNDED_LOSS, ROUNDING_TASK, SUBLAYER_LOSS

MOST_PASSES = 100_000  # passes of a batch through a model that an ablation makes without `allow_many`
PERMUTATIONS_PER_CELL = 4
ESTIMATED = ("taylor", "gradient_l1", "gradient_l2", "weight_frobenius", *metrics_of("damage"))


@dataclass(frozen=True, kw_only=True, repr=False)
class Sensitivity(TabularResult):
    """Effect of rounded weights on the loss of a model.

    Attributes:
        rows: rows of the table: layers, each followed by its linear maps, of each format.
        reliability: agreement of the measured order of layers with that on other text of the same size, by format
            (`scorecard.reliability`); NaN if it was not measured.
    """

    rows: Sequence[Mapping[str, Any]]
    reliability: Mapping[str, float]

    _bars = ("increase", "predicted")

    def table(self) -> pa.Table:
        """Return a table with a row for each format, layer and map. ``map`` is null for whole layers.

        Its columns are the loss, its increase over that of the whole model, paired by sequence, and the results of
        `map_damage.RoundingDamage`, with standard errors that are null for a single sample.
        """
        return pa.Table.from_pylist(list(self.rows))


@dataclass(frozen=True, kw_only=True, repr=False)
class Ablation(TabularResult):
    """Measurements of the layers of a model.

    Attributes:
        whole: loss of the whole model; None if no layers were left out.
        layers: what was measured of each layer, in order, by name: the ``loss`` without the layer, in nats per token;
            its ``increase`` over that of the whole model, paired by sequence, and that without its ``attention`` alone
            and its ``mlp`` alone; the Shapley value, ``shapley``, with a sample for each permutation;
            ``shapley_shared``, 1 for each permutation that was truncated before the layer, else 0; results of
            `backward.Gradients` and `damage.Damage`, by metric.
        reliability: agreement with the order of layers on other text of the same size (`scorecard.reliability`); NaN
            if no layers were left out, or for fewer than four sequences.
        sensitivity: effect of rounded weights; None without number formats.
    """

    model: str
    corpus: str
    whole: Result | None
    layers: Mapping[int, Mapping[str, Result]]
    reliability: float = float("nan")
    sensitivity: Sensitivity | None = None

    _bars = ("increase", "damage", "shapley", "taylor")

    @property
    def permutations(self) -> tuple[int, int]:
        """Number of truncated permutations of the Shapley values, and number of all permutations."""
        numbers = [len(results[SHAPLEY].samples) for results in self.layers.values() if SHAPLEY in results]
        shared = [results[SHARED].samples for results in self.layers.values() if SHARED in results]
        truncated = int(np.any(shared, axis=0).sum()) if shared else 0
        return truncated, max(numbers, default=0)

    def table(self) -> pa.Table:
        """Return a table with a row for each layer, with null for values that were not measured.

        ``damage`` is the mean of the layer's ranks by the two estimates that `stats.catalog.metrics_of` names; 1 is the
        lowest.
        """
        values = []
        for layer, results in self.layers.items():
            values += [(name, layer, result.value) for name, result in results.items()]
        ranks = mean_ranks("damage", values)
        return pa.Table.from_pylist([_row(layer, results, ranks.get(layer)) for layer, results in self.layers.items()])

    def summary(self) -> str:
        """Return the number of layers, the model and the text, in a line."""
        return f"{len(self.layers)} layers of {self.model} on {self.corpus}"


def _row(layer: int, results: Mapping[str, Result], damage: float | None) -> dict[str, Any]:
    values = {name: result.value for name, result in results.items()}
    errors = {name: result.stderr for name, result in results.items()}
    row = {
        "layer": layer,
        "loss": values.get(LOSS),
        "increase": values.get("increase"),
        "increase_stderr": errors.get("increase"),
    }
    for part in PARTS:
        row[part] = values.get(part)
    for part in PARTS:
        row[f"{part}_stderr"] = errors.get(part)
    row["shapley"] = values.get(SHAPLEY)
    row["shapley_low"], row["shapley_high"] = _interval(results.get(SHAPLEY))
    row["shapley_shared"] = values.get(SHARED)
    row["damage"] = damage
    for name in ESTIMATED:
        row[name] = values.get(name)
    row["predicted_stderr"] = errors.get(metrics_of("predicted")[0])
    return row


def _interval(shapley: Result | None) -> tuple[float | None, float | None]:
    """Return the ends of the 95% interval of a Shapley value over its permutations. None for too few of them."""
    if shapley is None or len(shapley.samples) < MINIMUM_UNITS:
        return None, None
    low, high = jackknife_interval(np.array(shapley.value), shapley.left_out)
    return float(low), float(high)


def ablate(request: AblateRequest) -> Ablation:
    """Measure the effect of each layer of a model on its loss. Cells that the warehouse has are not measured again.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`). Measured cells remain in the warehouse.
    """
    if request.formats:
        require_partition(
            request.execution.partition,
            lambda partition: not partition.splits_matrices,
            "has a part of each weight in a process, and a rounded weight needs scales of the whole.",
        )
    require_listable(request.shapley, "permutations", "Lower `shapley`.")
    corpus = RedactedURI(request.corpus)
    on_event = request.on_event or ignore
    on_event(Preparing("reading the checkpoint"))
    checkpoint = resolve(str(request.model), trust_remote_code=request.settings.trust_remote_code)
    if request.formats:
        require_unquantized(checkpoint)
    with EvaluationSession.open(request.warehouse, request.settings, request.execution, request.on_event) as session:
        model = session.place(checkpoint, request.settings)
        on_event(Preparing("reading the text"))
        text = plan_text(checkpoint, corpus, model.settings)
        _require_intended(request, model, text)
        planned = [model.plan(task) for task in _tasks(request, corpus, text, model.settings)]
        missing = _missing(session, planned)
        needed = estimate_memory(model, missing, session.executor.devices)
        if needed:
            on_event(needed)
        results = session.measure({task: [NO_INTERVENTION] for task in planned})
    removed: list[Result] = []
    rounded: list[Result] = []
    for task, measured in results.items():
        if task.task.name.startswith((ROUNDING_TASK, ROUNDED_LOSS)):
            rounded += measured
        else:
            removed += measured
    return _ablation(str(request.model), corpus, removed, _sensitivity(request.formats, rounded))


def _missing(session: EvaluationSession, planned: Iterable[PlannedTask]) -> list[Measure]:
    """Return the measures of tasks that the warehouse has no results of."""
    missing = []
    for task in planned:
        missing += [cell.measure for cell in task.cells() if not session.is_known(cell)]
    return missing


def _require_intended(request: AblateRequest, model: PlacedModel, text: CorpusPlan) -> None:
    """Refuse more than `MOST_PASSES` forward passes unless ``allow_many`` is set."""
    layers = getattr(text_config(model.checkpoint).get_text_config(), "num_hidden_layers", None) or 1
    batches = text.num_batches(model.settings.batch_size)
    rounded = len(request.formats) * request.rounded_layers
    removals = request.leave_one_out + len(PARTS) * request.sublayers + request.shapley + rounded
    require_intended(
        removals * layers * batches,
        MOST_PASSES,
        f"Up to {{}} forward passes would be made (batches: {batches:,}, layers: {layers:,}, times that each is left "
        f"out{' or rounded' * bool(request.formats)}: {removals:,})",
        "Lower `shapley` or `max_sequences`.",
        allow_many=request.allow_many,
    )


def _tasks(request: AblateRequest, corpus: RedactedURI, text: CorpusPlan, settings: Settings) -> Iterator[Task]:
    """Yield the task of each requested measurement of a text that was read with these settings."""
    seen = seen_text(text, settings, ABLATION)

    def task(prefix: str, measure: Callable[[Shard], Measure]) -> Task:
        return Task(name=f"{prefix}{corpus}", parts=tuple(map(measure, text.shards)), read=(seen,))

    if request.gradients:
        yield task(SCORES["taylor"].task, Gradients)
    if request.leave_one_out:
        yield task(SCORES["loss"].task, LeaveOneOut)
    if request.sublayers:
        yield task(SUBLAYER_LOSS, partial(LeaveOneOut, sublayers=True))
    if request.damage:
        yield task(DAMAGE_TASK, Damage)
    shards = fingerprint(shards=[shard.content_hash for shard in text.shards])

    def rounding_task(prefix: str, measure: Callable[[Shard], Measure]) -> Task:
        return replace(task(prefix, measure), options={"text": shards}, read=(replace(seen, use=PRECISION),))

    if request.formats:
        yield rounding_task(ROUNDING_TASK, partial(RoundingDamage, formats=request.formats))
    if request.rounded_layers:
        for name in request.formats:
            yield rounding_task(f"{ROUNDED_LOSS}{name}:", partial(RoundedLosses, format=name))
    if request.shapley:
        seeds = np.random.SeedSequence(request.seed).generate_state(request.shapley).tolist()
        chunks = [tuple(seeds[i : i + PERMUTATIONS_PER_CELL]) for i in range(0, len(seeds), PERMUTATIONS_PER_CELL)]
        yield Task(
            name=f"{SCORES['shapley'].task}{corpus}",
            parts=tuple(Shapley(shards=text.shards, seeds=chunk, truncation=request.truncation) for chunk in chunks),
            read=(seen,),
        )


def _by_place(
    results: Iterable[Result], place_of: Callable[[Result], Any]
) -> tuple[Result | None, dict[Any, dict[str, Result]]]:
    """Return the loss of the whole model, and the results of each place by metric, with the increase of each loss.

    The increase is that over the loss of the whole model, paired by sample.

    Args:
        place_of: returns the layer, sublayer or linear map that a result describes, or None for the whole model.
    """
    by_place: defaultdict[Any, dict[str, Result]] = defaultdict(dict)
    for result in results:
        by_place[place_of(result)][result.metric] = result
    whole = by_place.pop(None, {}).get(LOSS)
    for measured in by_place.values():
        loss = measured.get(LOSS)
        if whole and loss:
            measured["increase"] = replace(loss, samples=loss.samples - whole.samples)
    return whole, by_place


def _ablation(model: str, corpus: str, results: Iterable[Result], rounded: Sensitivity | None) -> Ablation:
    """Return the measurements of every layer, from the results of all tasks."""
    single = (result for result in results if result.metric == LOSS or not result.removed)  # not of blocks of layers
    whole, by_place = _by_place(single, lambda result: result.removed[0] if result.removed else result.layer)
    layers: defaultdict[int, dict[str, Result]] = defaultdict(dict)
    for place, measured in by_place.items():
        layers[layer_of(place)] |= {place.part: measured["increase"]} if isinstance(place, Sublayer) else measured
    return Ablation(
        model=model,
        corpus=corpus,
        whole=whole,
        layers=dict(sorted(layers.items())),
        reliability=_agreement_of(layers[layer] for layer in sorted(layers)),
        sensitivity=rounded,
    )


def _sensitivity(formats: Sequence[str], results: Iterable[Result]) -> Sensitivity | None:
    """Return the effect of rounded weights from the results of the tasks of rounding, or None without formats."""
    if not formats:
        return None
    _, by_place = _by_place(results, lambda result: parse_rounded(result.intervention.rounding or ""))
    rows = []
    places = sorted(by_place, key=lambda at: (formats.index(at.format), at.layer, at.path or ""))
    for place in places:
        measured = by_place[place]
        row: dict[str, Any] = {"format": place.format, "layer": place.layer, "map": place.path}
        row |= {name: getattr(measured.get(name), "value", None) for name in (NUM_WEIGHTS, BITS_PER_WEIGHT, LOSS)}
        for name in ("increase", *ROUNDING_ESTIMATES):
            effect = measured.get(name)
            stderr = None if effect is None or np.isnan(effect.stderr) else effect.stderr
            row |= {name: getattr(effect, "value", None), f"{name}_stderr": stderr}
        rows.append(row)
    return Sensitivity(
        rows=rows,
        reliability={
            name: _agreement_of(by_place[place] for place in places if (place.format, place.path) == (name, None))
            for name in formats
        },
    )


def _agreement_of(places: Iterable[Mapping[str, Result]]) -> float:
    """Return the agreement of layers' increases with those on other text of the same size. NaN without any."""
    increases = [results["increase"].samples for results in places if "increase" in results]
    return reliability(np.stack(increases, axis=1)) if increases else float("nan")
