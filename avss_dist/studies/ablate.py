"""Ablation: the effect of each layer of a model, and of rounded weights, on its loss, the ground truth for scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa

from avss_dist.analysis.ground_truth import mean_ranks
from avss_dist.analysis.scorecard import reliability
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    PARTS,
    Removal,
    RoundedPlace,
    Sublayer,
    layer_of,
    parse_rounded,
)
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewRow, TableRow
from avss_dist.corpus.seen import ABLATION, PRECISION, seen_text
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.distillation.curve import Preparing
from avss_dist.evaluation.forecast import Forecast, forecast_memory, forecast_step, forecasting
from avss_dist.evaluation.limits import require_intended, require_listable, require_partition
from avss_dist.evaluation.memory import estimate_memory
from avss_dist.evaluation.pace import past_speed
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.models.checkpoint.quantization import require_unquantized
from avss_dist.plans.catalog import ROUNDING_ESTIMATES
from avss_dist.plans.criteria import LEAVE_ONE_OUT
from avss_dist.requests import AblateRequest
from avss_dist.stats.catalog import DAMAGE_TASK, SCORES, metrics_of
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.metrics import BITS_PER_WEIGHT, LOSS, NUM_WEIGHTS
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.results import Result
from avss_dist.tasks.shapley import SHAPLEY, SHARED, Shapley
from avss_dist.tasks.task import Measure, Task
from avss_dist.tasks.text_loss import LeaveOneOut
from avss_dist.warehouse.names import ROUNDED_LOSS, ROUNDING_TASK, SUBLAYER_LOSS

MOST_PASSES = 100_000
"""Passes of a batch through a model that an ablation makes without ``allow_many``."""
PERMUTATIONS_PER_CELL = 4
Place = TypeVar("Place")
"""A removed layer or sublayer, or a rounded layer or linear map, that results describe."""
ESTIMATED = ("taylor", "gradient_l1", "gradient_l2", "weight_frobenius", *metrics_of("damage"))


@dataclass(frozen=True, kw_only=True, repr=False)
class Sensitivity(TabularResult):
    """Effect of rounded weights on the loss of a model.

    Attributes:
        rows: rows of the table: layers, each followed by its linear maps, of each format.
        reliability: agreement of the measured order of layers with that on other text of the same size, by format
            (`scorecard.reliability`); NaN if it was not measured.
    """

    rows: Sequence[TableRow]
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
        truncated = 0
        if shared:
            truncated = int(np.any(shared, axis=0).sum())
        return truncated, max(numbers, default=0)

    def table(self) -> pa.Table:
        """Return a table with a row for each layer, with null for values that were not measured.

        ``damage`` is the mean of the layer's ranks by the two estimates that `stats.catalog.metrics_of` names; 1 is the
        lowest.
        """
        values = []
        for layer, results in self.layers.items():
            for name, result in results.items():
                values.append((name, layer, result.value))
        ranks = mean_ranks("damage", values)
        rows = [_row(layer, results, ranks.get(layer)) for layer, results in self.layers.items()]
        return pa.Table.from_pylist(rows)

    def summary(self) -> str:
        """Return the number of layers, the model and the text, in a line."""
        return f"{len(self.layers)} layers of {self.model} on {self.corpus}"


def _row(layer: int, results: Mapping[str, Result], damage: float | None) -> NewRow:
    """Return the row of a layer. Values that were not measured are null.

    Args:
        damage: mean rank of the layer by the estimates of the damage.
    """
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
    checkpoint = _ablated(request)
    with EvaluationSession.open(request.warehouse, request.settings, request.execution, request.on_event) as session:
        planned = plan_ablation(request, session, checkpoint)
        needed = estimate_memory(planned[0], _missing(session, planned), session.executor.devices)
        if needed:
            session.on_event(needed)
        results = session.measure({task: [NO_INTERVENTION] for task in planned})
    removed: list[Result] = []
    rounded: list[Result] = []
    for task, measured in results.items():
        if task.task.name.startswith((ROUNDING_TASK, ROUNDED_LOSS)):
            rounded += measured
        else:
            removed += measured
    corpus = RedactedURI(request.corpus)
    return _ablation(str(request.model), corpus, removed, _sensitivity(request.formats, rounded))


def forecast_ablation(request: AblateRequest) -> Forecast:
    """Return what `ablate` would do. Nothing is measured or written.

    Raises:
        AvssError: a mistake, as in `ablate`.
    """
    checkpoint = _ablated(request)
    with forecasting(request.warehouse, request.settings, request.execution, request.on_event) as session:
        planned = plan_ablation(request, session, checkpoint)
        speed = past_speed(session, planned[0])
        steps = []
        cells = []
        for task in planned:
            of_task = task.cells()
            steps.append(forecast_step(session, task.task.name, of_task, task, speed))
            cells += of_task
        memory = forecast_memory(session, planned[0], cells)
    return Forecast(steps=steps, memory=memory)


def _ablated(request: AblateRequest) -> Checkpoint:
    """Return the checkpoint of a request. Refuse what is known before its text is read."""
    if request.formats:
        require_partition(
            request.execution.partition,
            lambda partition: not partition.splits_matrices,
            "has a part of each weight in a process, and a rounded weight needs scales of the whole.",
        )
    require_listable(request.shapley, "permutations", "Lower `shapley`.")
    if request.on_event:
        request.on_event(Preparing("reading the checkpoint"))
    checkpoint = resolve(str(request.model), trust_remote_code=request.settings.trust_remote_code)
    if request.formats:
        require_unquantized(checkpoint)
    return checkpoint


def plan_ablation(request: AblateRequest, session: EvaluationSession, checkpoint: Checkpoint) -> list[PlannedTask]:
    """Return the task of each requested measurement, one at least."""
    model = session.place(checkpoint, request.settings)
    session.on_event(Preparing("reading the text"))
    corpus = RedactedURI(request.corpus)
    text = plan_text(checkpoint, corpus, model.settings)
    _require_intended(request, model, text)
    return [model.plan(task) for task in _tasks(request, corpus, text, model.settings)]


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
    times = request.shapley  # that each layer is left out, or rounded
    if request.leave_one_out:
        times += 1
    if request.sublayers:
        times += len(PARTS)
    if request.rounded_layers:
        times += len(request.formats)
    changes = "left out"
    if request.formats:
        changes += " or rounded"
    message = (
        f"Up to {{}} forward passes would be made (batches: {batches:,}, layers: {layers:,}, times that each is "
        f"{changes}: {times:,})"
    )
    require_intended(
        times * layers * batches,
        MOST_PASSES,
        message,
        "Lower `shapley` or `max_sequences`.",
        allow_many=request.allow_many,
    )


def _tasks(request: AblateRequest, corpus: RedactedURI, text: CorpusPlan, settings: Settings) -> Iterator[Task]:
    """Yield the task of each requested measurement of a text that was read with these settings."""
    seen = seen_text(text, settings, ABLATION)

    def task(prefix: str, measure: Callable[[Shard], Measure]) -> Task:
        parts = tuple(measure(shard) for shard in text.shards)
        return Task(name=f"{prefix}{corpus}", parts=parts, read=(seen,))

    if request.gradients:
        yield task(SCORES["taylor"].task, Gradients)
    if request.leave_one_out:
        yield task(SCORES[LEAVE_ONE_OUT].task, LeaveOneOut)
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
        yield Task(name=f"{SCORES['shapley'].task}{corpus}", parts=_permutations(request, text), read=(seen,))


def _permutations(request: AblateRequest, text: CorpusPlan) -> tuple[Shapley, ...]:
    """Return the parts of the task of Shapley values, each of a few permutations of the layers."""
    seeds = np.random.SeedSequence(request.seed).generate_state(request.shapley).tolist()
    parts = []
    for start in range(0, len(seeds), PERMUTATIONS_PER_CELL):
        seeds_of_part = tuple(seeds[start : start + PERMUTATIONS_PER_CELL])
        parts.append(Shapley(shards=text.shards, seeds=seeds_of_part, truncation=request.truncation))
    return tuple(parts)


def _by_place(results: Sequence[Result], place_of: Callable[[Result], Place | None]) -> dict[Place, dict[str, Result]]:
    """Return the results of each place by metric, with the increase of each loss.

    The increase is that over the loss of the whole model, paired by sample.

    Args:
        place_of: returns the layer, sublayer or linear map that a result describes, or None for the whole model.
    """
    whole: Result | None = None
    by_place: dict[Place, dict[str, Result]] = {}
    for result in results:
        place = place_of(result)
        if place is not None:
            by_place.setdefault(place, {})[result.metric] = result
        elif result.metric == LOSS:
            whole = result
    for measured in by_place.values():
        loss = measured.get(LOSS)
        if whole is not None and loss is not None:
            measured["increase"] = replace(loss, samples=loss.samples - whole.samples)
    return by_place


def _ablation(model: str, corpus: str, results: Sequence[Result], rounded: Sensitivity | None) -> Ablation:
    """Return the measurements of every layer, from the results of all tasks."""
    # The damage of blocks of layers is among the results, but no measurement of a layer.
    single = [result for result in results if result.metric == LOSS or not result.removed]
    by_place: dict[Removal, dict[str, Result]] = _by_place(single, _removed_place)
    whole = None
    for result in single:
        if result.metric == LOSS and _removed_place(result) is None:
            whole = result
    layers: defaultdict[int, dict[str, Result]] = defaultdict(dict)
    for place, measured in by_place.items():
        of_layer = layers[layer_of(place)]
        if isinstance(place, Sublayer):
            of_layer[place.part] = measured["increase"]
        else:
            of_layer.update(measured)
    in_order = dict(sorted(layers.items()))
    return Ablation(
        model=model,
        corpus=corpus,
        whole=whole,
        layers=in_order,
        reliability=_agreement_of(in_order.values()),
        sensitivity=rounded,
    )


def _removed_place(result: Result) -> Removal | None:
    """Return the layer or sublayer that a result describes, or None for the whole model."""
    if result.removed:
        return result.removed[0]
    return result.layer


def _sensitivity(formats: Sequence[str], results: Sequence[Result]) -> Sensitivity | None:
    """Return the effect of rounded weights from the results of the tasks of rounding, or None without formats."""
    if not formats:
        return None
    by_place = _by_place(results, lambda result: parse_rounded(result.intervention.rounding or ""))
    places = sorted(by_place, key=lambda place: (formats.index(place.format), place.layer, place.path or ""))
    reliabilities = {}
    for name in formats:
        layers = [by_place[place] for place in places if place.format == name and place.path is None]
        reliabilities[name] = _agreement_of(layers)
    return Sensitivity(rows=[_sensitivity_row(place, by_place[place]) for place in places], reliability=reliabilities)


def _sensitivity_row(place: RoundedPlace, measured: Mapping[str, Result]) -> NewRow:
    """Return the row of a layer or linear map in a format. Values that were not measured are null."""
    row: NewRow = {"format": place.format, "layer": place.layer, "map": place.path}
    for name in (NUM_WEIGHTS, BITS_PER_WEIGHT, LOSS):
        row[name] = measured[name].value if name in measured else None
    for name in ("increase", *ROUNDING_ESTIMATES):
        row[name] = None
        row[f"{name}_stderr"] = None
        effect = measured.get(name)
        if effect is None:
            continue
        row[name] = effect.value
        if not np.isnan(effect.stderr):
            row[f"{name}_stderr"] = effect.stderr
    return row


def _agreement_of(places: Iterable[Mapping[str, Result]]) -> float:
    """Return the agreement of layers' increases with those on other text of the same size. NaN without any."""
    increases = [results["increase"].samples for results in places if "increase" in results]
    if not increases:
        return float("nan")
    return reliability(np.stack(increases, axis=1))
