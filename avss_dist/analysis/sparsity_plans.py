"""Sparsity plans from a warehouse: thresholds from the value counts that a run measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from avss_dist.analysis.thresholds import quantiles_of
from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.core.intervention import SPARSITY_RULES, THRESHOLD, TOP_K, TOP_P
from avss_dist.sparsity.plan import MapPlan, SparsityPlan
from avss_dist.stats.layer_stats import Float64, LayerStats
from avss_dist.warehouse.reader import Warehouse


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a run: its location, its shape, and the statistics of its input."""

    layer: int
    path: str
    site: str
    outputs: int
    inputs: int
    read: LayerStats

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs

    def thresholds(self, shares: Sequence[float] | Float64) -> Float64:
        """Return the quantiles of the absolute input values at the given shares."""
        return quantiles_of(self.read, np.asarray(shares).tolist())[0]


@dataclass(frozen=True, eq=False)
class MeasuredMaps:
    """The linear maps of a run whose inputs were measured."""

    run: Mapping[str, Any]
    maps: tuple[LinearMap, ...]

    @staticmethod
    def of_run(warehouse: Warehouse, run: Mapping[str, Any]) -> MeasuredMaps:
        """Read the linear maps of a row of ``runs``.

        Raises:
            QueryError: if some or all inputs were not measured. The message has the command that measures them.
        """
        described = json.loads(run["projections"] or "[]")
        if not described:
            raise _not_measured(warehouse, run)
        stats = warehouse.read_layer_stats(run["run_id"])
        if any((layer, site) not in stats for layer, _, site, _, _ in described):
            raise _not_measured(warehouse, run)
        maps = [
            LinearMap(layer, path, site, out, given, stats[layer, site]) for layer, path, site, out, given in described
        ]
        return MeasuredMaps(run, tuple(maps))

    @cached_property
    def sizes(self) -> Float64:
        """Number of weights of each map, float64[maps]."""
        return np.array([one.weights for one in self.maps], np.float64)


def _not_measured(warehouse: Warehouse, run: Mapping[str, Any]) -> QueryError:
    command = ["avss", "score", run["model"], "--corpus", run["corpus"], "--site", "inputs", "-w", warehouse.root]
    if run["num_sequences"]:
        command += ["--max-sequences", run["num_sequences"]]
    if run.get("projections") == "[]":
        return QueryError(
            f"No input of a linear map of {run['model']} can be seen: its maps are fused.",
            "No sparsity can be planned for it.",
        )
    return QueryError(
        f"Run {run['run_id']} did not measure what linear maps read.", f"Do: {shlex.join(map(str, command))}"
    )


def require_target(target: float) -> None:
    """Raise ConfigError unless a target sparsity is above 0 and below 1."""
    if not 0 < target < 1:
        raise ConfigError(
            f"`target` must be above 0 and below 1, not {target:g}.", "0.5 makes half of the inputs zero."
        )


def plan_uniform(measured: MeasuredMaps, target: float, method: str = "uniform", **fields: Any) -> SparsityPlan:
    """Return a plan with the same sparsity in every linear map.

    ``method`` decides which inputs stay: those above a threshold, the largest of each token (``wina``), or those that
    make up a share of the token's sum (``topp``).

    Raises:
        ConfigError: if the target or a pattern is invalid.
    """
    require_target(target)
    pattern = fields.get("pattern")
    if pattern is not None:
        return _plan_pattern(measured, target, method, **fields)
    by = {"wina": TOP_K, "topp": TOP_P}.get(method, THRESHOLD)
    sparsities = np.full(len(measured.maps), target)
    return make_plan(measured, sparsities, by, {"by": method, "target": target}, weighted=method == "wina", **fields)


def _plan_pattern(measured: MeasuredMaps, target: float, method: str, pattern: str, **fields: Any) -> SparsityPlan:
    """Return a plan in which a pattern, such as 2:4, alone decides which inputs are zero.

    Raises:
        ConfigError: if the pattern is invalid, or contradicts the target or the method.
    """
    largest, _, group = pattern.partition(":")
    if method not in ("uniform", "wina"):
        raise ConfigError(f"`pattern` and `method` {method} are mutually exclusive.", "Use `method` uniform or wina.")
    if not (largest.isdecimal() and group.isdecimal() and 0 < int(largest) < int(group)):
        raise ConfigError(
            f"invalid `pattern` '{pattern}': expected N:M.", "2:4 keeps the 2 largest of 4 units in a row."
        )
    if abs(target - (1 - int(largest) / int(group))) > 1e-6:
        share = 1 - int(largest) / int(group)
        raise ConfigError(f"`pattern` {pattern} makes {share:g} zero, not {target:g}.", f"Set `target` to {share:g}.")
    plan = make_plan(measured, np.zeros(len(measured.maps)), THRESHOLD, {"by": method, "target": target}, **fields)
    maps = tuple(replace(one, sparsity=target, value=0.0) for one in plan.projections)
    return replace(plan, projections=maps, sparsity=target, pattern=pattern, weighted=method == "wina")


def make_plan(
    measured: MeasuredMaps,
    sparsities: Float64,
    by: str,
    why: Mapping[str, Any],
    *,
    rule: str = SPARSITY_RULES[0],
    pattern: str | None = None,
    weighted: bool = False,
) -> SparsityPlan:
    """Return a plan with a sparsity for each map.

    Args:
        sparsities: float64[maps].
        by: one of the `THRESHOLD`, `TOP_K` and `TOP_P` rules.
        why: record of the method and its target, stored in the plan.

    Raises:
        PlanError: if a top-k keeps no unit, or a pattern does not divide the units.
    """
    maps = tuple(_planned(one, float(s), by) for one, s in zip(measured.maps, sparsities, strict=True))
    expected = np.array([one.sparsity for one in maps])
    run = measured.run
    return SparsityPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"],
        sparsity=float(expected @ measured.sizes / measured.sizes.sum()),
        rule=rule,
        weighted=weighted,
        pattern=pattern,
        why=why,
        run_id=run["run_id"],
        findings=tuple(_findings(measured)),
        projections=maps,
    )


def _planned(linear_map: LinearMap, sparsity: float, by: str) -> MapPlan:
    if by == TOP_K:
        value, expected = sparsity, int(sparsity * linear_map.inputs) / linear_map.inputs
    else:
        threshold = float(linear_map.thresholds([sparsity])[0])
        below, mass = _shares_up_to(linear_map.read, threshold)
        value, expected = (threshold, below) if by == THRESHOLD else (1 - mass, sparsity)
        if linear_map.read.abs_value_cut and by == THRESHOLD:
            expected = sparsity
        if sparsity == 0 and by == THRESHOLD:
            value, expected = 0.0, linear_map.read.zero_count / max(1, linear_map.read.count)
    return MapPlan(
        layer=linear_map.layer,
        map=linear_map.path,
        site=linear_map.site,
        outputs=linear_map.outputs,
        inputs=linear_map.inputs,
        sparsity=min(expected, 1 - 1e-9),
        by=by,
        value=value,
    )


def _shares_up_to(read: LayerStats, threshold: float) -> tuple[float, float]:
    """Return the share of elements with abs(x) up to a threshold, and their share of the sum of abs(x)."""
    values, counts = read.abs_value.astype(np.float64), read.abs_value_count
    is_below = values <= threshold
    total, mass = float(counts.sum()), float((values * counts).sum())
    return float(counts[is_below].sum()) / max(total, 1.0), float((values * counts)[is_below].sum()) / max(mass, 1e-300)


def _findings(measured: MeasuredMaps) -> Iterator[str]:
    whole = set(range(measured.run["num_layers"]))
    for site in ("query_input", "neuron"):
        if missing := sorted(whole - {one.layer for one in measured.maps if one.site == site}):
            what = "attention" if site == "query_input" else "MLP"
            yield f"The {what} of {len(missing)} of {len(whole)} layers stays dense: its maps are fused."
