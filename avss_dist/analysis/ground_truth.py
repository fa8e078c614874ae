"""Ground truth and estimates of a checkpoint's layers, from the evaluations in a warehouse."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pyarrow.compute as pc

from avss_dist.analysis.next_commands import ablate_command, describe_headless
from avss_dist.core.errors import QueryError
from avss_dist.core.intervention import InterventionKey, RoundedPlace, parse_rounded, round_place, stored_removals
from avss_dist.core.values import NewRow, TableRow
from avss_dist.plans.catalog import ROUNDING_ESTIMATES
from avss_dist.plans.criteria import LEAVE_ONE_OUT, BlockValues, Layers, LayerValues, ValuesOrigin
from avss_dist.plans.seen import seen_by_evaluation
from avss_dist.stats.catalog import BLOCK_DISTANCE, SCORES, metrics_of
from avss_dist.stats.metrics import BITS_PER_WEIGHT, LOSS, NUM_WEIGHTS
from avss_dist.stats.rankings import average_ranks
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.names import ROUNDED_LOSS, ROUNDING_TASK
from avss_dist.warehouse.reader import Warehouse, grouped


@dataclass(frozen=True, kw_only=True)
class RoundedValues(LayerValues):
    """Values of a measurement, or of an estimate of it, for layers whose weights are rounded.

    Attributes:
        format: number format that the weights of each layer are rounded to.
        text: hash of the text; None if the evaluation has none.
    """

    format: str
    text: str | None

    def key(self, layer: int) -> InterventionKey:
        """Return the key of the intervention that measured the value of a layer."""
        return InterventionKey(rounding=round_place(self.format, layer).key)


def measured_values(store: Warehouse, run: TableRow, by: str) -> LayerValues:
    """Return a measured score for the layers of a run's checkpoint, from the newest evaluation with it.

    ``loss`` is the loss without the layer minus the loss of the whole model.

    Args:
        by: one of ``stats.catalog.MEASURED``.

    Raises:
        QueryError: there is no such evaluation. The hint is the command that measures it.
    """
    measured = find_measured_values(store, run, by)
    if measured is None:
        raise nothing_measured(store, run, by)
    return measured


def block_distances(store: Warehouse, run: TableRow) -> BlockValues:
    """Return the distances of the hidden states before and after each block of layers of a run's checkpoint.

    Raises:
        QueryError: they were not measured. The hint is the command that measures them.
    """
    for rows in _newest_evaluations(store, run, SCORES[BLOCK_DISTANCE].task, [BLOCK_DISTANCE]):
        distances: dict[Layers, float] = {tuple(row["drop"]): row["value"] for row in rows}
        return BlockValues(
            values=distances, run_id=rows[0]["run_id"], task=rows[0]["task"], seen=seen_by_evaluation(rows[0])
        )
    raise nothing_measured(store, run, BLOCK_DISTANCE)


def nothing_measured(store: Warehouse, run: TableRow, by: str) -> QueryError:
    """Return the error that a warehouse lacks a measurement of `avss ablate` for the layers of a run.

    Its hint is the command that measures it, or says that the model cannot be measured.
    """
    if has_head(run):
        hint = ablate_command(store, run, by)
    else:
        hint = f"{describe_headless(run)} Choose by a score."
    return QueryError(f"{store.root} has no measurement '{by}' of the layers of {run['model']}.", hint)


def find_measured_values(store: Warehouse, run: TableRow, by: str) -> LayerValues | None:
    """Return the result of `measured_values`, or None if there is no such evaluation."""
    for rows in _newest_evaluations(store, run, SCORES[by].task, metrics_of(by)):
        values = _values_by_layer(rows, by)
        if values:
            return LayerValues(
                values=values, run_id=rows[0]["run_id"], task=rows[0]["task"], seen=seen_by_evaluation(rows[0])
            )
    return None


def rounded_values(store: Warehouse, run: TableRow) -> dict[str, RoundedValues]:
    """Return the rise of the loss with each layer rounded, by number format, from the newest evaluations.

    A format is missing if there is no such evaluation of the run's checkpoint.
    """
    by_format: dict[str, RoundedValues] = {}
    for rows in _newest_evaluations(store, run, ROUNDED_LOSS, [LOSS]):
        whole = [row["value"] for row in rows if row["rounding"] is None]
        if not whole:
            continue
        for name, losses in _losses_by_format(rows).items():
            rises = {layer: loss - whole[0] for layer, loss in losses.items()}
            by_format.setdefault(name, _rounded_values(rows[0], name, rises))
    return by_format


def rounding_estimates(store: Warehouse, run: TableRow, measured: RoundedValues) -> dict[str, RoundedValues]:
    """Return the estimates of the rise of the loss with each layer rounded to a format, by metric.

    Each is of the newest evaluation of another text than that of the measurement, or else of the newest one.

    Args:
        measured: measured rises of the loss with the format.
    """
    estimates: dict[str, list[RoundedValues]] = {metric: [] for metric in ROUNDING_ESTIMATES}
    for rows in _newest_evaluations(store, run, ROUNDING_TASK, [*ROUNDING_ESTIMATES]):
        for metric, of_metric in estimates.items():
            by_format = _losses_by_format([row for row in rows if row["metric"] == metric])
            if measured.format in by_format:
                of_metric.append(_rounded_values(rows[0], measured.format, by_format[measured.format]))
    chosen = {}
    for metric, of_metric in estimates.items():
        if not of_metric:
            continue
        of_other_text = [estimate for estimate in of_metric if estimate.text != measured.text]
        chosen[metric] = of_other_text[0] if of_other_text else of_metric[0]
    return chosen


@dataclass(frozen=True, kw_only=True)
class MapRoundings(ValuesOrigin):
    """An estimate of the damage of rounding each linear map of a model, by place and format.

    Attributes:
        damage: values of the estimate; low is harmless.
        bits_per_weight: bits of a weight in the format, with its share of scales.
        num_weights: number of weights of the map.
    """

    damage: Mapping[RoundedPlace, float]
    bits_per_weight: Mapping[RoundedPlace, float]
    num_weights: Mapping[RoundedPlace, float]


def map_roundings(store: Warehouse, run: TableRow, by: str) -> Iterator[MapRoundings]:
    """Yield the estimated damage of rounding each linear map of a run's checkpoint, newest evaluation first.

    Args:
        by: metric of the estimate.
    """
    metrics = (by, BITS_PER_WEIGHT, NUM_WEIGHTS)
    for rows in _newest_evaluations(store, run, ROUNDING_TASK, metrics):
        by_metric: dict[str, dict[RoundedPlace, float]] = {}
        for row in rows:
            place = parse_rounded(row["rounding"] or "")
            if place is not None and place.path is not None:
                by_metric.setdefault(row["metric"], {})[place] = row["value"]
        has_every_metric = len(by_metric) == len(metrics)
        if has_every_metric:
            yield MapRoundings(
                damage=by_metric[by],
                bits_per_weight=by_metric[BITS_PER_WEIGHT],
                num_weights=by_metric[NUM_WEIGHTS],
                run_id=rows[0]["run_id"],
                task=rows[0]["task"],
                seen=seen_by_evaluation(rows[0]),
            )


def _losses_by_format(rows: Sequence[TableRow]) -> dict[str, dict[int, float]]:
    """Return the values of rows in which a whole layer is rounded, by number format and layer."""
    by_format: dict[str, dict[int, float]] = {}
    for row in rows:
        place = parse_rounded(row["rounding"] or "")
        if place is not None and place.path is None:
            by_format.setdefault(place.format, {})[place.layer] = row["value"]
    return by_format


def _rounded_values(row: TableRow, name: str, values: Mapping[int, float]) -> RoundedValues:
    """Return values of layers that are rounded to a format, measured by the evaluation of a row."""
    text = json.loads(row["settings"]).get("text")
    return RoundedValues(values=values, run_id=row["run_id"], task=row["task"], format=name, text=text)


def _newest_evaluations(store: Warehouse, run: TableRow, task: str, metrics: Sequence[str]) -> list[list[NewRow]]:
    """Return the rows of each evaluation of a run's checkpoint with these metrics, the newest evaluation first.

    Args:
        task: start of the name of the evaluated task.
    """
    where = pc.field("revision") == run["revision"]
    where &= pc.starts_with(pc.field("task"), task)
    where &= pc.field("metric").isin(metrics)
    evaluations = grouped(store.table("evaluations", where=where).to_pylist(), itemgetter("run_id"))
    return sorted(evaluations.values(), key=lambda rows: rows[-1]["created_at"], reverse=True)


def _rises_by_layer(rows: Sequence[TableRow]) -> dict[int, float]:
    """Return the rise of the loss without each layer. Empty if the loss of the whole model is missing."""
    whole = [row["value"] for row in rows if not stored_removals(row)]
    if not whole:
        return {}
    rises = {}
    for row in rows:
        removed = stored_removals(row)
        if len(removed) == 1 and isinstance(removed[0], int):
            rises[removed[0]] = row["value"] - whole[0]
    return rises


def _values_by_layer(rows: Sequence[TableRow], by: str) -> dict[int, float]:
    """Return the values of `LayerValues` from the rows of an evaluation, empty if the evaluation lacks one."""
    if by == LEAVE_ONE_OUT:
        return _rises_by_layer(rows)
    if SCORES[by].mean_rank_of:
        return mean_ranks(by, [(row["metric"], row["layer"], row["value"]) for row in rows])
    return {row["layer"]: row["value"] for row in rows}


def mean_ranks(score: str, measured: Collection[tuple[str, int, float]]) -> dict[int, float]:
    """Return each layer's mean rank (1 = lowest) over the metrics of a score, such as ``damage``.

    Args:
        measured: metric, layer and value; other metrics have no effect.

    Returns:
        By layer; empty if a layer lacks a finite value of one of the metrics.
    """
    by_metric: dict[str, dict[int, float]] = {name: {} for name in metrics_of(score)}
    for metric, layer, value in measured:
        if metric in by_metric:
            by_metric[metric][layer] = value
    layers = sorted(next(iter(by_metric.values())))
    if not layers:
        return {}
    ranks = []
    for by_layer in by_metric.values():
        if sorted(by_layer) != layers:
            return {}
        values = np.array([by_layer[layer] for layer in layers])
        if not np.isfinite(values).all():
            return {}
        ranks.append(average_ranks(values))
    return dict(zip(layers, np.mean(ranks, axis=0).tolist(), strict=True))
