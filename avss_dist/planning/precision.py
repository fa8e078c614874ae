"""Precision plans of a run: the number format of each linear map, by what was predicted for rounded weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from avss_dist.analysis.chosen import ChosenRun, newest_run
from avss_dist.analysis.ground_truth import MapRoundings, map_roundings
from avss_dist.analysis.next_commands import repeated_command
from avss_dist.core.errors import AvssError, ConfigError, QueryError
from avss_dist.core.files import write_output
from avss_dist.core.intervention import RoundedPlace
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.core.values import NewObject, TableRow
from avss_dist.models.change.number_formats import fitting
from avss_dist.models.checkpoint.locate import find_checkpoint
from avss_dist.plans.budget import ROUNDING_ERROR, FormatIndices, in_order, least_damage, same_format, total
from avss_dist.plans.catalog import PRECISION_ESTIMATES, SECOND_ORDER
from avss_dist.plans.choice import PlanError
from avss_dist.plans.map_plans import MapPrecision, PrecisionPlan
from avss_dist.plans.precision_files import EXPORTS, map_shapes
from avss_dist.plans.size import run_size
from avss_dist.requests import PrecisionRequest
from avss_dist.stats.layer_stats import Float64
from avss_dist.warehouse.checks import checkpoint_name, settings_of
from avss_dist.warehouse.names import MEASURED_ONLY
from avss_dist.warehouse.reader import Warehouse

USUAL_FORMATS = ("int4-g64", "int4-g32", "int4")
"""Formats to predict beside int8: the first that every linear map can take. The last has no groups of inputs."""
MAX_FALL = 0.01
"""Fall of the loss, in nats per token, that maps of a plan may have together: other text does not have it."""
MAX_RISE = 0.5
"""Rise of the loss, in nats per token of all maps in one format, above which predictions of it mean little."""


class NotPredicted(QueryError):
    """The warehouse lacks a prediction of some number formats for the model of a run.

    Attributes:
        run: the row of ``runs``.
    """

    def __init__(self, message: str, run: TableRow) -> None:
        super().__init__(message)
        self.run = run


@dataclass(frozen=True, eq=False, kw_only=True)
class FormatValues:
    """Predicted damage and size of each linear map of a model in each number format.

    Attributes:
        maps: layer and path of each map, ascending.
        formats: names of the formats, the one with the fewest bits first.
        damage: float64[maps, formats].
        bits: bits of all weights of a map, float64[maps, formats].
        weights: number of weights of each map, float64[maps].
    """

    maps: Sequence[tuple[int, str]]
    formats: Sequence[str]
    damage: Float64
    bits: Float64
    weights: Float64

    @classmethod
    def of_prediction(cls, predicted: MapRoundings, formats: Sequence[str]) -> FormatValues:
        """Return the values that an evaluation has predicted for some of its formats."""
        maps = sorted({(place.layer, place.path or "") for place in predicted.damage})
        shape = (len(maps), len(formats))
        damage = np.empty(shape)
        bits = np.empty(shape)
        weights = np.empty(len(maps))
        for number, (layer, path) in enumerate(maps):
            places = [RoundedPlace(layer=layer, path=path, format=name) for name in formats]
            weights[number] = round(predicted.num_weights[places[0]])
            damage[number] = [predicted.damage[place] for place in places]
            bits[number] = [predicted.bits_per_weight[place] * weights[number] for place in places]
        return cls(maps=maps, formats=formats, damage=damage, bits=bits, weights=weights)

    def precisions(self, chosen: FormatIndices) -> tuple[MapPrecision, ...]:
        """Return the maps in the formats that were chosen for them."""
        precisions = []
        for number, (layer, path) in enumerate(self.maps):
            index = int(chosen[number])
            precision = MapPrecision(
                layer=layer,
                map=path,
                format=self.formats[index],
                weights=int(self.weights[number]),
                bits=float(self.bits[number, index] / self.weights[number]),
            )
            precisions.append(precision)
        return tuple(precisions)


def plan_precision(request: PrecisionRequest, store: Warehouse, run: TableRow) -> PrecisionPlan:
    """Choose the number format of each linear map of a run's model.

    Args:
        run: a row of ``runs``.

    Raises:
        NotPredicted: the effect of a format was not predicted.
        PlanError: the budget is below the smallest formats.
    """
    by = _estimate(request)
    predicted = _prediction(store, run, request.formats, by)
    formats = _formats(predicted)
    if request.formats:
        formats = [name for name in formats if name in request.formats]
    values = FormatValues.of_prediction(predicted, formats)
    chosen = _choose(request, values, _budget(request, run, values))
    sum_of_estimates = round(total(values.damage, chosen), 6)
    why: NewObject = {"by": request.by, "formats": ", ".join(formats), f"sum_of_{by}": sum_of_estimates}
    if request.bits:
        why["bits"] = request.bits
    else:
        why["memory"] = describe_bytes(request.memory or 0)
    if request.by == "random":
        why["seed"] = request.seed
    run_id = run["run_id"]
    if run.get("status") == MEASURED_ONLY:
        run_id = None
    last_layer, _ = values.maps[-1]
    bits_per_weight = total(values.bits, chosen) / values.weights.sum()
    plan = PrecisionPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"] or 1 + last_layer,
        bits=float(bits_per_weight),
        why=why,
        run_id=run_id,
        evaluation=predicted.run_id,
        seen=predicted.seen,
        findings=tuple(_findings(by, values, chosen)),
        rounded=values.precisions(chosen),
    )
    if request.output is not None:
        if request.format in EXPORTS:
            write_output(request.output, EXPORTS[request.format](plan), PlanError)
        else:
            plan.write(request.output)
    return plan


def predicted_run(request: PrecisionRequest, store: Warehouse) -> ChosenRun:
    """Return the newest run for whose model the damage of the formats of a request was predicted.

    Raises:
        QueryError: there is none. The hint is the command that predicts it, or formats that the model can take.
    """

    def require(run: TableRow) -> None:
        _prediction(store, run, request.formats, _estimate(request))

    try:
        return newest_run(store, request.run, require, measured=True)
    except NotPredicted as error:
        raise QueryError(error.message, _prediction_hint(store, error.run, request.formats)) from None


def _prediction_hint(store: Warehouse, run: TableRow, requested: Sequence[str]) -> str:
    """Return the command that predicts the damage of formats, or the formats that can be predicted.

    Args:
        requested: formats to predict; by default usual ones. The hint names none that a linear map cannot take.
    """
    shapes = _map_shapes(run)
    # Without shapes, only formats whose scales are of any number of inputs are known to fit.
    able = fitting(shapes or [(1, 1)])
    unable = [name for name in requested if name not in able]
    if shapes and unable:
        every = f"Formats that can take every linear map of {run['model']}: {', '.join(able)}."
        return f"{', '.join(unable)} cannot. {every}"
    names = requested
    if not names:
        smallest_usual = next(name for name in USUAL_FORMATS if name in able)
        names = (smallest_usual, "int8")
    measures = {"leave_one_out": False, "rounded_layers": False, "quantize": names}
    return f"Do: {repeated_command('ablate', store, run, measures)}"


def _map_shapes(run: TableRow) -> set[tuple[int, int]]:
    """Return the shapes (outputs, inputs) of the linear maps of a run's model, or none if the model is not found."""
    from avss_dist.models.checkpoint.size import find_layers, load_skeleton

    settings = settings_of(run)
    options = Settings(layers=settings.get("layers"), trust_remote_code=settings.get("trust_remote_code", False))
    with suppress(AvssError):
        checkpoint = find_checkpoint(checkpoint_name(run), trust_remote_code=options.trust_remote_code)
        model, _ = load_skeleton(checkpoint, options)
        return map_shapes(find_layers(model, options))
    return set()


def _estimate(request: PrecisionRequest) -> str:
    """Return the estimate of the damage that a request reads. Controls read the second order for its formats."""
    return request.by if request.by in PRECISION_ESTIMATES else SECOND_ORDER


def _prediction(store: Warehouse, run: TableRow, formats: Sequence[str], by: str) -> MapRoundings:
    """Return the newest prediction for a run's model that has all of these formats.

    Args:
        by: metric of the estimate.

    Raises:
        NotPredicted: there is none.
    """
    predictions = [*map_roundings(store, run, by)]
    for predicted in predictions:
        if set(formats) <= set(_formats(predicted)):
            return predicted
    lacking = "a prediction of rounded weights"
    if predictions and formats:
        lacking = f"one prediction of {', '.join(formats)}"
    raise NotPredicted(f"{store.root} lacks {lacking} for the linear maps of {run['model']}.", run)


def _formats(predicted: MapRoundings) -> list[str]:
    """Return the formats of a prediction, the one with the fewest bits first."""
    bits = {place.format: value for place, value in predicted.bits_per_weight.items()}
    return sorted(bits, key=lambda name: bits[name])


def _findings(by: str, values: FormatValues, chosen: FormatIndices) -> Iterator[str]:
    """Yield a sentence on each format of a plan that costs so much that its prediction means little, and on falls."""
    predicts_loss = by != "output_error"
    if predicts_loss:
        for index in sorted(set(chosen.tolist())):
            rise = float(values.damage[:, index].sum())
            if rise > MAX_RISE:
                yield (
                    f"Rounding every linear map to {values.formats[index]} is predicted to cost {rise:.2g} nats per "
                    "token. Predictions are of small changes, and too low for this one: choose from other formats."
                )
    fall = -total(np.minimum(values.damage, 0.0), chosen)
    if fall > MAX_FALL:
        yield (
            f"Some linear maps are predicted to lower the loss when they are rounded, by {fall:.2g} nats per token "
            f"together. That is so on the text of the prediction: for other text, choose `by` {SECOND_ORDER}."
        )


def _budget(request: PrecisionRequest, run: TableRow, values: FormatValues) -> float:
    """Return the bits that all linear maps may have together.

    Raises:
        PlanError: they are fewer than those of the smallest formats.
    """
    least = float(values.bits.min(axis=1).sum())
    num_weights = values.weights.sum()
    if request.bits is not None:
        budget = request.bits * num_weights
        if budget < least * (1 - ROUNDING_ERROR):
            raise PlanError(
                f"`bits` {request.bits:g} is below the {least / num_weights:.4g} bits per weight of the smallest "
                "formats.",
                "Raise `bits`, or predict a smaller format with avss ablate --quantize.",
            )
        return float(budget)
    assert request.memory is not None
    size = run_size(run)
    outside = size.weight_bytes - num_weights * size.element_bytes
    if request.memory * 8 < outside * 8 + least:
        raise PlanError(
            f"`memory` {describe_bytes(request.memory)} is below the {describe_bytes(outside + least / 8)} of the "
            f"model with the smallest formats: its other weights take {describe_bytes(outside)} in {size.dtype}.",
            "Raise `memory`, or predict a smaller format with avss ablate --quantize.",
        )
    return float((request.memory - outside) * 8)


def _choose(request: PrecisionRequest, values: FormatValues, budget: float) -> FormatIndices:
    """Return the format of each map by the method of a request.

    Raises:
        ConfigError: no single format is within the budget of ``uniform``.
    """
    if request.by in PRECISION_ESTIMATES:
        return least_damage(values.damage, values.bits, budget)
    if request.by == "uniform":
        if values.bits.sum(axis=0).min() > budget * (1 + ROUNDING_ERROR):
            raise ConfigError("No single format is within the budget.", f"Raise it, or use `by` {SECOND_ORDER}.")
        return same_format(values.bits, budget)
    order = np.random.default_rng(request.seed).permutation(len(values.maps))
    return in_order(order.tolist(), values.damage, values.bits, budget)
