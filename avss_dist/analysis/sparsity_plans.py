"""Sparsity plans from a warehouse: thresholds from the value counts that a run measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from avss_dist.analysis.thresholds import quantiles_of
from avss_dist.core.errors import QueryError
from avss_dist.core.intervention import SPARSITY_RULES, TOP_K
from avss_dist.map_plans.plans import MapPlan, SparsityPlan
from avss_dist.pruning.ground_truth import repeated_command
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
        stats = warehouse.read_layer_stats(run["run_id"]) if described else {}
        if not described or any((layer, site) not in stats for layer, _, site, _, _ in described):
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
    if run.get("projections") == "[]":
        return QueryError(
            f"No input of a linear map of {run['model']} can be seen: its maps are fused.",
            "No sparsity can be planned for it.",
        )
    command = repeated_command("score", warehouse, run, "--sites inputs")
    return QueryError(f"Run {run['run_id']} did not measure what linear maps read.", f"Do: {command}")


def make_plan(
    measured: MeasuredMaps,
    sparsities: Float64,
    by: str,
    why: Mapping[str, Any],
    *,
    rule: str = SPARSITY_RULES[0],
    weighted: bool = False,
) -> SparsityPlan:
    """Return a plan with a sparsity for each map.

    Args:
        sparsities: float64[maps].
        by: `THRESHOLD` or `TOP_K`.
        why: record of the method and its target, stored in the plan.

    Raises:
        PlanError: if a top-k keeps no unit.
    """
    maps = []
    for one, share in zip(measured.maps, sparsities.tolist(), strict=True):
        value, expected = share, int(share * one.inputs) / one.inputs
        if by != TOP_K:
            value, counts = float(one.thresholds([share])[0]), one.read.abs_value_count
            up_to = float(counts[one.read.abs_value.astype(np.float64) <= value].sum())
            expected = share if one.read.abs_value_cut else up_to / max(float(counts.sum()), 1.0)
            if share == 0:
                value, expected = 0.0, one.read.zero_count / max(1, one.read.count)
        plan = MapPlan(
            layer=one.layer,
            map=one.path,
            site=one.site,
            outputs=one.outputs,
            inputs=one.inputs,
            sparsity=min(expected, 1 - 1e-9),
            by=by,
            value=value,
        )
        maps.append(plan)
    whole, findings = set(range(measured.run["num_layers"])), []
    for site, what in (("query_input", "attention"), ("neuron", "MLP")):
        if missing := whole - {one.layer for one in measured.maps if one.site == site}:
            findings.append(f"The {what} of {len(missing)} of {len(whole)} layers stays dense: its maps are fused.")
    by_map, run = np.array([one.sparsity for one in maps]), measured.run
    return SparsityPlan(
        model=run["model"],
        revision=run["revision"],
        num_layers=run["num_layers"],
        sparsity=float(by_map @ measured.sizes / measured.sizes.sum()),
        rule=rule,
        weighted=weighted,
        why=why,
        run_id=run["run_id"],
        findings=tuple(findings),
        projections=tuple(maps),
    )
