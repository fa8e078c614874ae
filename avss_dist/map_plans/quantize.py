"""Precision plans from a warehouse: formats by the losses that were predicted for rounded weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.core.intervention import RoundedPlace
from avss_dist.core.registry import MEASURED_ONLY, PRECISION_ESTIMATES, SECOND_ORDER
from avss_dist.core.text import describe_bytes
from avss_dist.map_plans.budget import ROUNDING_ERROR, Choice, Float64, in_order, least_damage, same_format, total
from avss_dist.map_plans.exports import EXPORTS
from avss_dist.map_plans.plans import MapPrecision, PrecisionPlan
from avss_dist.pruning.ground_truth import MapRounding, map_roundings, repeated_command
from avss_dist.pruning.plan import run_size, write_text
from avss_dist.pruning.selection import PlanError
from avss_dist.requests import PrecisionRequest
from avss_dist.warehouse.reader import Warehouse

MAX_FALL = 0.01  # nats per token that maps of a plan may gain together: other text does not have them
MAX_RISE = 0.5  # nats per token of all maps in one format, above which predictions of it mean little


def plan_precision(request: PrecisionRequest, store: Warehouse, run: Mapping[str, Any]) -> PrecisionPlan:
    """Choose the number format of each linear map of a run's model.

    Args:
        run: a row of ``runs``.

    Raises:
        QueryError: the effect of a format was not predicted. The hint is the command that does.
        PlanError: the budget is below the smallest formats.
    """
    by = request.by if request.by in PRECISION_ESTIMATES else SECOND_ORDER
    measured = _measured(store, run, request.formats, by)
    formats = [name for name in measured.formats if name in (request.formats or measured.formats)]
    maps = sorted({(place.layer, place.path or "") for place in measured.weights})
    places = [[RoundedPlace(layer=layer, path=path, format=name) for name in formats] for layer, path in maps]
    damage, bits = (
        np.array([[values[place] for place in row] for row in places], np.float64)
        for values in (measured.damage, measured.bits)
    )
    weights = np.array([measured.weights[row[0]] for row in places], np.float64)
    bits *= weights[:, None]
    chosen = _choose(request, damage, bits, _budget(request, run, weights, bits))
    rounded = [
        MapPrecision(
            layer=layer,
            map=path,
            format=formats[index],
            weights=int(weights[number]),
            bits=float(bits[number, index] / weights[number]),
        )
        for number, ((layer, path), index) in enumerate(zip(maps, chosen.tolist(), strict=True))
    ]
    plan = PrecisionPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"] or 1 + max(layer for layer, _ in maps),
        bits=float(total(bits, chosen) / weights.sum()),
        why={
            "by": request.by,
            "formats": ", ".join(formats),
            f"sum_of_{by}": round(total(damage, chosen), 6),
            **({"bits": request.bits} if request.bits else {"memory": describe_bytes(request.memory or 0)}),
            **({"seed": request.seed} if request.by == "random" else {}),
        },
        run_id=None if run.get("status") == MEASURED_ONLY else run["run_id"],
        evaluation=measured.run_id,
        findings=tuple(_findings(by, damage, chosen, formats)),
        rounded=tuple(rounded),
    )
    if request.output is not None:
        if request.format in EXPORTS:
            write_text(request.output, EXPORTS[request.format](plan))
        else:
            plan.write(request.output)
    return plan


def _findings(by: str, damage: Float64, chosen: Choice, formats: Sequence[str]) -> Iterator[str]:
    """Yield a sentence on each format of a plan that costs so much that its prediction means little, and on falls."""
    for index in sorted(set(chosen.tolist())) if by != "output_error" else ():
        if (rise := float(damage[:, index].sum())) > MAX_RISE:
            yield (
                f"Rounding every linear map to {formats[index]} is predicted to cost {rise:.2g} nats per token. "
                "Predictions are of small changes, and too low for this one: choose from other formats."
            )
    if (fall := -total(np.minimum(damage, 0.0), chosen)) > MAX_FALL:
        yield (
            f"Some linear maps are predicted to lower the loss when they are rounded, by {fall:.2g} nats per token "
            f"together. That is so on the text of the prediction: for other text, choose `by` {SECOND_ORDER}."
        )


def _measured(store: Warehouse, run: Mapping[str, Any], formats: Sequence[str], by: str) -> MapRounding:
    """Return the newest prediction that has all formats.

    Raises:
        QueryError: there is none.
    """
    predictions = [*map_roundings(store, run, by)]
    for measured in predictions:
        if set(formats) <= {*measured.formats}:
            return measured
    wanted = formats or ("int4-g64", "int8")
    what = f"one prediction of {', '.join(wanted)}" if predictions else "a prediction of rounded weights"
    options = ["--no-leave-one-out", "--no-rounded-layers", *(f"--quantize {name}" for name in wanted)]
    raise QueryError(
        f"{store.root} lacks {what} for the linear maps of {run['model']}.",
        f"Do: {repeated_command('ablate', store, run, *options)}",
    )


def _budget(request: PrecisionRequest, run: Mapping[str, Any], weights: Float64, bits: Float64) -> float:
    """Return the bits that all linear maps may have together.

    Raises:
        PlanError: they are fewer than those of the smallest formats.
    """
    least = float(bits.min(axis=1).sum())
    if request.bits is not None:
        budget = request.bits * weights.sum()
        if budget < least * (1 - ROUNDING_ERROR):
            raise PlanError(
                f"`bits` {request.bits:g} is below the {least / weights.sum():.4g} bits per weight of the smallest "
                "formats.",
                "Raise `bits`, or predict a smaller format with avss ablate --quantize.",
            )
        return float(budget)
    assert request.memory is not None
    size = run_size(run)
    others = size.weight_bytes - weights.sum() * size.element_bytes
    if request.memory * 8 < others * 8 + least:
        raise PlanError(
            f"`memory` {describe_bytes(request.memory)} is below the {describe_bytes(others + least / 8)} of the model "
            f"with the smallest formats: its other weights take {describe_bytes(others)} in {size.dtype}.",
            "Raise `memory`, or predict a smaller format with avss ablate --quantize.",
        )
    return float((request.memory - others) * 8)


def _choose(request: PrecisionRequest, damage: Float64, bits: Float64, budget: float) -> Choice:
    """Return the format of each map by the method of a request.

    Raises:
        ConfigError: no single format is within the budget of ``uniform``.
    """
    if request.by in PRECISION_ESTIMATES:
        return least_damage(damage, bits, budget)
    if request.by == "uniform":
        if bits.sum(axis=0).min() > budget * (1 + ROUNDING_ERROR):
            raise ConfigError("No single format is within the budget.", f"Raise it, or use `by` {SECOND_ORDER}.")
        return same_format(bits, budget)
    order = np.random.default_rng(request.seed).permutation(len(bits)).tolist()
    return in_order(order, damage, bits, budget)
