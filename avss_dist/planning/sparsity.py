"""Sparsity plans of a run: allocation of a sparsity over its linear maps by a method, and their thresholds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from avss_dist.analysis.next_commands import repeated_command
from avss_dist.analysis.thresholds import quantiles_of
from avss_dist.core.errors import QueryError
from avss_dist.core.intervention import SPARSITY_RULES, THRESHOLD, TOP_K
from avss_dist.core.values import JsonObject, TableRow
from avss_dist.corpus.seen import SeenText, distinct
from avss_dist.corpus.shards import Shard
from avss_dist.plans.budget import MAX_SPARSITY, heavy_tail_ratios, interpolate_path, knapsack, proportional
from avss_dist.plans.map_plans import MapPlan, SparsityPlan
from avss_dist.stats.layer_stats import Float64, LayerStats
from avss_dist.tasks.block_search import GREEDY_STEPS, HILL, GreedyBlock, Spectra
from avss_dist.tasks.map_damage import SECOND, MapDamage
from avss_dist.tasks.task import Measure
from avss_dist.warehouse.reader import Warehouse

LARGEST_SPARSITY = 1 - 1e-9
"""Largest sparsity of a map in a plan, which has no map with a sparsity of 1."""
LEVELS = np.append(np.arange(1, 20) / 20, 0.98)
"""Sparsities at which the method ``loss`` measures the damage."""
READ_TEXT = ("loss", "teal")
"""Methods that read a text."""
BASE_STEP = 0.05
"""Step of the method ``teal`` for the largest map of a block, as in TEAL."""
LARGEST_OF_TOKEN = ("acttail", "wina")
"""Methods that keep the largest inputs of each token. All others keep inputs above a threshold."""

MeasuredMaps = Mapping[MapPlan, LayerStats]
"""Linear maps of a run, as dense ones, with the statistics of their inputs."""
MapSamples = Mapping[tuple[int, str], Float64]
"""Samples of a task by layer and metric, summed over its parts."""
MeasureMaps = Callable[[tuple[Measure, ...]], MapSamples]
"""Function that measures the parts of a task."""


@dataclass(frozen=True)
class Allocation:
    """Allocation of a sparsity over linear maps.

    Attributes:
        sparsities: sparsity of each map, float64[maps].
        reasons: what the plan says about it, beside the method and the target.
    """

    sparsities: Float64
    reasons: JsonObject = field(default_factory=dict)


def measured_maps(warehouse: Warehouse, run: TableRow) -> MeasuredMaps:
    """Return the linear maps of a run whose inputs were measured, as dense ones, with the statistics of their inputs.

    Args:
        run: a row of ``runs``.

    Raises:
        QueryError: if some or all inputs were not measured. The message has the command that measures them.
    """
    described = json.loads(run["projections"] or "[]")
    stats = warehouse.read_layer_stats(run["run_id"]) if described else {}
    measured: dict[MapPlan, LayerStats] = {}
    for layer, path, site, outputs, inputs in described:
        if (layer, site) not in stats:
            raise _unmeasured_inputs(warehouse, run)
        linear_map = MapPlan(
            layer=layer,
            map=path,
            site=site,
            outputs=outputs,
            inputs=inputs,
            sparsity=0.0,
            by=THRESHOLD,
            value=0.0,
        )
        measured[linear_map] = stats[layer, site]
    if measured:
        return measured
    if run.get("projections") == "[]":
        raise QueryError(
            f"No input of a linear map of {run['model']} can be seen: its maps are fused.",
            "No sparsity can be planned for it.",
        )
    raise _unmeasured_inputs(warehouse, run)


def _unmeasured_inputs(warehouse: Warehouse, run: TableRow) -> QueryError:
    """Return the error of a run that lacks inputs of linear maps."""
    return QueryError(
        f"Run {run['run_id']} did not measure what linear maps read.",
        f"Do: {repeated_command('score', warehouse, run, {'sites': 'inputs'})}",
    )


def map_sizes(maps: Iterable[MapPlan]) -> Float64:
    """Return the number of weights of each map, float64[maps]."""
    return np.array([linear_map.weights for linear_map in maps], np.float64)


def allocate(
    method: str, maps: MeasuredMaps, target: float, shards: Sequence[Shard], measure: MeasureMaps
) -> Allocation:
    """Return the sparsities by a method that measures the maps.

    Args:
        method: one of `MEASURED_METHODS`.
        target: mean sparsity, weighted by the numbers of weights.
        shards: shards of the text; none for a method that reads no text.
        measure: measures the parts of a task.
    """
    if method == "loss":
        return _by_damage(maps, target, shards, measure)
    if method == "teal":
        return _by_paths(maps, target, shards, measure)
    return _by_tails(maps, target, measure)


MEASURED_METHODS = (*READ_TEXT, "acttail")
"""Methods that measure the maps of a model. For the others the statistics of the run are enough."""


def _by_damage(maps: MeasuredMaps, target: float, shards: Sequence[Shard], measure: MeasureMaps) -> Allocation:
    """Return the sparsities with the least damage."""
    thresholds = {}
    for linear_map, inputs in maps.items():
        thresholds[linear_map.layer, linear_map.map] = _thresholds(inputs, LEVELS)
    samples = measure(tuple(MapDamage(shard=shard, thresholds=thresholds) for shard in shards))
    damage = []
    for linear_map in maps:
        damage.append(samples[linear_map.layer, f"{SECOND}:{linear_map.map}"])
    return Allocation(knapsack(np.array(damage), LEVELS, map_sizes(maps), target))


def _by_paths(maps: MeasuredMaps, target: float, shards: Sequence[Shard], measure: MeasureMaps) -> Allocation:
    """Return sparsities with which each block meets the target, interpolated between two steps of its path."""
    every_map = list(maps)
    blocks: dict[int, list[int]] = {}  # places of the maps of each layer
    for place, linear_map in enumerate(every_map):
        blocks.setdefault(linear_map.layer, []).append(place)
    parts = []
    for layer, block in blocks.items():
        members = [every_map[place] for place in block]
        parts.append(_greedy_block(layer, {member: maps[member] for member in members}, shards))
    samples = measure(tuple(parts))
    sizes = map_sizes(maps)
    sparsities = np.zeros(len(maps))
    for layer, block in blocks.items():
        steps_of_maps = []
        for place in block:
            steps_of_maps.append(samples[layer, f"{GREEDY_STEPS}{every_map[place].map}"])
        path = np.stack(steps_of_maps, axis=1)
        sparsities[block] = interpolate_path(path, sizes[block], target)
    return Allocation(sparsities, {"base_step": BASE_STEP})


def _greedy_block(layer: int, members: MeasuredMaps, shards: Sequence[Shard]) -> GreedyBlock:
    """Return the measurement of the greedy path of the linear maps of one layer. Small maps take larger steps."""
    weights = {linear_map.map: linear_map.weights for linear_map in members}
    largest = max(weights.values())
    steps = {path: BASE_STEP * largest / number for path, number in weights.items()}
    thresholds = {}
    for linear_map, inputs in members.items():
        step = steps[linear_map.map]
        thresholds[linear_map.map] = _thresholds(inputs, np.arange(step, LARGEST_SPARSITY, step))
    return GreedyBlock(layer=layer, shards=tuple(shards), thresholds=thresholds, steps=steps, sizes=weights)


def _by_tails(maps: MeasuredMaps, target: float, measure: MeasureMaps) -> Allocation:
    """Return sparsities in proportion to ratios that depend on the heavy tail of each weight's spectrum."""
    layers = sorted({linear_map.layer for linear_map in maps})
    samples = measure(tuple(Spectra(layer) for layer in layers))
    exponents = []
    for linear_map in maps:
        (exponent,) = samples[linear_map.layer, f"{HILL}{linear_map.map}"]
        exponents.append(exponent)
    ratios = heavy_tail_ratios(np.array(exponents))
    sparsities = proportional(ratios, map_sizes(maps), target, MAX_SPARSITY)
    reasons = {
        "reading": "the mapping of AlphaPruning, which is read as ActTail's: its paper's is not at hand",
        "exponents": "Hill, upper half",
    }
    return Allocation(sparsities, reasons)


def _thresholds(inputs: LayerStats, levels: Float64) -> tuple[float, ...]:
    """Return the thresholds under which shares of the inputs of a linear map lie.

    Args:
        levels: shares, float64[levels].
    """
    thresholds, _, _ = quantiles_of(inputs, levels)
    return tuple(thresholds.tolist())


def plan_sparsity(
    run: TableRow,
    measured: MeasuredMaps,
    sparsities: Float64,
    method: str,
    why: JsonObject,
    seen: Iterable[SeenText] = (),
    *,
    rule: str = SPARSITY_RULES[0],
) -> SparsityPlan:
    """Return a plan with a sparsity for each map.

    Args:
        run: a row of ``runs``.
        measured: the maps of the run, see `measured_maps`.
        sparsities: float64[maps].
        method: a name of ``plans.catalog.SPARSITY_METHODS``.
        why: record of the method and its target, stored in the plan.
        seen: texts that were read.

    Raises:
        PlanError: if a top-k keeps no unit.
    """
    by = TOP_K if method in LARGEST_OF_TOKEN else THRESHOLD
    maps = []
    for (linear_map, inputs), sparsity in zip(measured.items(), sparsities.tolist(), strict=True):
        maps.append(_sparse_map(linear_map, inputs, sparsity, by))
    sizes = map_sizes(measured)
    by_map = np.array([planned.sparsity for planned in maps])
    mean = by_map @ sizes / sizes.sum()
    return SparsityPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"],
        sparsity=float(mean),
        rule=rule,
        weighted=method == "wina",
        why=why,
        run_id=run["run_id"],
        findings=tuple(_fused_parts(measured, run["num_layers"])),
        seen=distinct(seen),
        projections=tuple(maps),
    )


def _sparse_map(linear_map: MapPlan, inputs: LayerStats, share: float, by: str) -> MapPlan:
    """Return a map with a sparsity: the threshold or the share that makes it, and the sparsity that is expected.

    Args:
        inputs: statistics of the inputs of the map.
        share: sparsity that is asked for.
        by: `THRESHOLD` or `TOP_K`.

    Raises:
        ConfigError: the map has read nothing, so that it has no threshold.
    """
    if by == TOP_K:
        value = share
        expected = int(share * linear_map.inputs) / linear_map.inputs
    elif share == 0:
        value = 0.0
        expected = inputs.zero_count / max(1, inputs.count)
    else:
        quantiles, _, _ = quantiles_of(inputs, [share])
        value = quantiles.item()
        expected = share
        # Where every value is counted, ties make more of them zero than are asked for.
        if not inputs.abs_value_cut:
            counts = inputs.abs_value_count
            up_to = float(counts[inputs.abs_value.astype(np.float64) <= value].sum())
            expected = up_to / max(float(counts.sum()), 1.0)
    return replace(linear_map, sparsity=min(expected, LARGEST_SPARSITY), by=by, value=value)


def _fused_parts(maps: Iterable[MapPlan], num_layers: int) -> Iterator[str]:
    """Yield a sentence on each part of the layers that stays dense in some of them, because its maps are fused."""
    seen_layers: dict[str, set[int]] = {}
    for linear_map in maps:
        seen_layers.setdefault(linear_map.site, set()).add(linear_map.layer)
    for site, part in (("query_input", "attention"), ("neuron", "MLP")):
        dense = num_layers - len(seen_layers.get(site, ()))
        if dense > 0:
            yield f"The {part} of {dense} of {num_layers} layers stays dense: its maps are fused."
