"""Ground truth and estimates of a checkpoint's layers, from the evaluations in a warehouse."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow.compute as pc

from avss_dist.core.errors import QueryError
from avss_dist.core.intervention import InterventionKey, RoundedPlace, parse_rounded, round_place
from avss_dist.core.settings import TEXT_OPTIONS, Settings
from avss_dist.core.suggestions import command_line, option_words
from avss_dist.corpus.seen import SeenText
from avss_dist.plans.catalog import ROUNDING_ESTIMATES
from avss_dist.plans.seen import seen_by_evaluation
from avss_dist.stats.catalog import BLOCK_DISTANCE, SCORES, metrics_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import BITS_PER_WEIGHT, LOSS, NUM_WEIGHTS
from avss_dist.stats.rankings import average_ranks
from avss_dist.warehouse.checks import has_head, settings_of
from avss_dist.warehouse.names import ROUNDED_LOSS, ROUNDING_TASK
from avss_dist.warehouse.reader import Warehouse, grouped

_OF_MODEL = ("dtype", "layers", "attention", "device", "trust_remote_code", "dequantize")
_REPEATED = (*TEXT_OPTIONS, "batch_size", *_OF_MODEL)
_OF_STATISTICS = ("skip_first_tokens", "allow_pickle")  # of avss score alone
HUB_COMMIT_LENGTH = 40
"""Length of the hash of a commit of the hub. Revisions of folders have another length."""


@dataclass(frozen=True, kw_only=True)
class LayerTruth:
    """A measurement of each layer, or of each block of consecutive layers, by an evaluation.

    Attributes:
        values: by layer, or by the layers of the block, ascending; low is unimportant.
        run_id, task: the evaluation; empty for a score that people bring.
        format: number format that the weights of each layer are rounded to; None if layers are left out.
        text: hash of the text; None if the evaluation has none.
        seen: texts that the evaluation has read.
    """

    values: Mapping[Any, float]
    run_id: str
    task: str
    format: str | None = None
    text: str | None = None
    seen: tuple[SeenText, ...] = ()

    def key(self, layer: int) -> InterventionKey:
        """Return the key of the intervention on a layer."""
        if self.format is None:
            return InterventionKey(removed=(layer,))
        return InterventionKey(rounding=round_place(self.format, layer).key)

    def by_layer(self, num_layers: int) -> Float64:
        """Return the values as float64[layers], NaN for layers without one."""
        return np.array([self.values.get(layer, np.nan) for layer in range(num_layers)], np.float64)


def layer_truth(store: Warehouse, run: Mapping[str, Any], by: str) -> LayerTruth:
    """Return a measured score for the layers of a run's checkpoint, from the newest evaluation with it.

    ``loss`` is the loss without the layer minus the loss of the whole model.

    Args:
        by: one of ``stats.catalog.MEASURED``, or the distance of the hidden states before and after a block of layers.

    Raises:
        QueryError: there is no such evaluation. The hint is the command that measures it.
    """
    truth = find_layer_truth(store, run, by)
    if truth is None:
        raise nothing_measured(store, run, by)
    return truth


def nothing_measured(store: Warehouse, run: Mapping[str, Any], by: str) -> QueryError:
    """Return the error that a warehouse lacks a measurement of `avss ablate` for the layers of a run.

    Its hint is the command that measures it, or says that the model cannot be measured.
    """
    if has_head(run):
        hint = ablate_command(store, run, by)
    else:
        hint = f"{describe_headless(run)} Choose by a score."
    return QueryError(f"{store.root} has no measurement '{by}' of the layers of {run['model']}.", hint)


def describe_headless(run: Mapping[str, Any]) -> str:
    """Return a sentence that says why avss ablate and avss evaluate refuse the model of a run."""
    return f"{run['model']} ({run['architecture']}) predicts no next token: avss ablate and avss evaluate refuse it."


def find_layer_truth(store: Warehouse, run: Mapping[str, Any], by: str) -> LayerTruth | None:
    """Return the result of `layer_truth`, or None if there is no such evaluation."""
    for evaluation in _newest_first(store, run, SCORES[by].task, metrics_of(by)):
        if values := _by_layer(evaluation, by):
            row = evaluation[0]
            return LayerTruth(values=values, run_id=row["run_id"], task=row["task"], seen=seen_by_evaluation(row))
    return None


def rounded_truths(store: Warehouse, run: Mapping[str, Any]) -> dict[str, LayerTruth]:
    """Return the rise of the loss with each layer rounded, by number format, from the newest evaluations.

    A format is missing if there is no such evaluation of the run's checkpoint.
    """
    truths: dict[str, LayerTruth] = {}
    for rows in _newest_first(store, run, ROUNDED_LOSS, [LOSS]):
        whole = [row["value"] for row in rows if row["rounding"] is None]
        if not whole:
            continue
        for name, losses in _by_format(rows).items():
            rises = {layer: loss - whole[0] for layer, loss in losses.items()}
            truths.setdefault(name, _rounded_truth(rows[0], name, rises))
    return truths


def rounding_estimates(store: Warehouse, run: Mapping[str, Any], truth: LayerTruth) -> dict[str, LayerTruth]:
    """Return the estimates of the rise of the loss with each layer rounded to the format of a truth, by metric.

    Each is of the newest evaluation of another text than that of the truth, or else of the newest one.
    """
    estimates: dict[str, list[LayerTruth]] = {metric: [] for metric in ROUNDING_ESTIMATES}
    for rows in _newest_first(store, run, ROUNDING_TASK, [*ROUNDING_ESTIMATES]):
        for metric, measured in estimates.items():
            by_format = _by_format([row for row in rows if row["metric"] == metric])
            if truth.format in by_format:
                measured.append(_rounded_truth(rows[0], truth.format, by_format[truth.format]))
    chosen = {}
    for metric, measured in estimates.items():
        if not measured:
            continue
        of_other_text = [estimate for estimate in measured if estimate.text != truth.text]
        chosen[metric] = of_other_text[0] if of_other_text else measured[0]
    return chosen


def map_roundings(
    store: Warehouse, run: Mapping[str, Any], by: str
) -> Iterator[tuple[str, dict[str, dict[RoundedPlace, float]]]]:
    """Yield the estimated damage of rounding each linear map of a run's checkpoint, newest evaluation first.

    Args:
        by: metric of the estimate.

    Yields:
        Id of the evaluation, and values of the estimate, `BITS_PER_WEIGHT` and `NUM_WEIGHTS`, by place and format.
    """
    for rows in _newest_first(store, run, ROUNDING_TASK, [by, BITS_PER_WEIGHT, NUM_WEIGHTS]):
        values: dict[str, dict[RoundedPlace, float]] = {}
        for row in rows:
            place = parse_rounded(row["rounding"] or "")
            if place is not None and place.path is not None:
                values.setdefault(row["metric"], {})[place] = row["value"]
        if len(values) == 3:  # An evaluation may lack a metric.
            yield rows[0]["run_id"], values


def _by_format(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the values of rows in which a whole layer is rounded, by number format and layer."""
    by_format: dict[str, dict[int, float]] = {}
    for row in rows:
        place = parse_rounded(row["rounding"] or "")
        if place is not None and place.path is None:
            by_format.setdefault(place.format, {})[place.layer] = row["value"]
    return by_format


def _rounded_truth(row: Mapping[str, Any], name: str | None, values: Mapping[int, float]) -> LayerTruth:
    return LayerTruth(
        values=values,
        run_id=row["run_id"],
        task=row["task"],
        format=name,
        text=json.loads(row["settings"]).get("text"),
    )


def _newest_first(
    store: Warehouse, run: Mapping[str, Any], task: str, metrics: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Return the rows of each evaluation of a run's checkpoint with these metrics, the newest evaluation first."""
    where = pc.field("revision") == run["revision"]
    where &= pc.starts_with(pc.field("task"), task)
    where &= pc.field("metric").isin(metrics)
    evaluations = grouped(store.table("evaluations", where=where).to_pylist(), itemgetter("run_id"))
    return sorted(evaluations.values(), key=lambda rows: rows[-1]["created_at"], reverse=True)


def _by_layer(rows: Sequence[Mapping[str, Any]], by: str) -> Mapping[Any, float]:
    """Return the values of `LayerTruth` from the rows of an evaluation, empty if the evaluation lacks one."""
    if by == BLOCK_DISTANCE:
        return {tuple(row["drop"]): row["value"] for row in rows}
    if by == "loss":
        whole = [row["value"] for row in rows if not row["drop"]]
        if not whole:
            return {}
        return {row["drop"][0]: row["value"] - whole[0] for row in rows if len(row["drop"]) == 1}
    if not SCORES[by].mean_rank_of:
        return {row["layer"]: row["value"] for row in rows}
    return mean_ranks(by, [(row["metric"], row["layer"], row["value"]) for row in rows])


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


def ablate_command(store: Warehouse, run: Mapping[str, Any], by: str = "loss") -> str:
    """Return the command that measures a score alone for a run's checkpoint, on the run's text."""
    return repeated_command("ablate", store, run, SCORES[by].ablate)


def repeated_command(
    verb: str, store: Warehouse, run: Mapping[str, Any], measures: Mapping[str, Any] | None = None
) -> str:
    """Return the `avss` command of a verb that measures more of a run's checkpoint, opened and on rows as in the run.

    Args:
        measures: what to measure, as values of options by field.
    """
    model = run["model"]
    if len(run["revision"] or "") == HUB_COMMIT_LENGTH:
        model += f"@{run['revision']}"
    repeated = repeated_options(run)
    if verb == "score":
        repeated |= _set_options(run, _OF_STATISTICS)
    options = option_words(repeated | dict(measures or {}))
    return command_line(verb, model, "--corpus", run["corpus"], "--warehouse", store.root, *options)


def repeated_options(run: Mapping[str, Any], request: object = None) -> dict[str, Any]:
    """Return the options by field that read rows and open the model as a run did, without those at their defaults.

    Args:
        request: a request, whose own options for opening the model replace those of the run.
    """
    options = _set_options(run, _REPEATED)
    defaults = vars(Settings())
    for name in _OF_MODEL:
        value = getattr(request, name, None)
        if value not in (None, defaults[name]):
            options[name] = value
    return options


def _set_options(run: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return those settings of a run that differ from their defaults, by name.

    A run always stores the device that it used. It is repeated if it was a CPU, which all machines have.
    """
    settings = settings_of(run)
    defaults = vars(Settings())
    options = {}
    for name in names:
        value = settings.get(name)
        if value not in (None, defaults[name]) and (name, value) != ("device", "cuda"):
            options[name] = value
    return options
