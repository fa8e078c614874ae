"""Routed experts by layer: load, saliency and balance, and findings about idle and dominant experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.stats_findings import DOMINANT, Row, finding, layers_in_words
from avss_dist.core.errors import QueryError
from avss_dist.stats.experts import ExpertStats, Float64
from avss_dist.warehouse.encoding import to_experts
from avss_dist.warehouse.reader import Warehouse

MAX_NAMED = 4  # layers whose experts a finding names


@dataclass(frozen=True, eq=False)
class LayerExperts:
    """Statistics of the experts of one layer.

    Attributes:
        layer: index of the layer.
        load: float64[experts], the share of the routed tokens that each expert got.
        saliency: float64[experts], the mean of gate * |output| over an expert's tokens (REAP), 0 for an idle expert.
        gate: float64[experts], the mean gate over an expert's tokens, 0 for an idle expert.
        carried: float64[experts], each expert's share of the sum of gate * |output|.
        balance: entropy of ``load`` relative to that of equal shares: 1 is even, 0 is one expert.
        router_entropy: mean entropy of the router's probabilities relative to that of equal ones. NaN if not measured.
        top_k: number of experts that the router sends each token to; 0 without tokens.
    """

    layer: int
    load: Float64
    saliency: Float64
    gate: Float64
    carried: Float64
    balance: float
    router_entropy: float
    top_k: int

    def scores(self) -> dict[str, Float64]:
        """Return the scores of the experts by the names of `registry.EXPERT_SCORES` that are measured."""
        return {"reap": self.saliency, "tokens": self.load, "gate": self.gate}

    @property
    def idle(self) -> list[int]:
        """Indices of the experts that no token reached."""
        return [int(expert) for expert in np.flatnonzero(self.load == 0)]


def layer_experts(warehouse: Warehouse, run_id: str) -> list[LayerExperts]:
    """Return the experts of each layer of a run. The list is empty if no experts were measured."""
    return _by_layer(warehouse.table("expert_stats", run_ids=[run_id]))


def require_experts(warehouse: Warehouse, run_id: str) -> list[LayerExperts]:
    """Return the experts of each layer of a run.

    Raises:
        QueryError: if no experts were measured.
    """
    if not (layers := layer_experts(warehouse, run_id)):
        raise QueryError(
            f"Run '{run_id}' has no statistics of routed experts.",
            "Score a mixture of experts with avss score --experts.",
        )
    return layers


def _by_layer(rows: pa.Table) -> list[LayerExperts]:
    return [_of_layer(layer, stats) for layer, stats in to_experts(rows).items()]


def _of_layer(layer: int, stats: ExpertStats) -> LayerExperts:
    even = np.log(max(len(stats.routed_tokens), 2))
    load = _shares(stats.routed_tokens.astype(np.float64))
    seen = load[load > 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        saliency, gate = (
            np.where(stats.routed_tokens > 0, total / stats.routed_tokens, 0.0)
            for total in (stats.gated_norm_sum, stats.gate_sum)
        )
        entropy = float(stats.router_entropy_sum[0] / stats.token_count[0]) / even
    balance = float(-(seen * np.log(seen)).sum() / even)
    return LayerExperts(
        layer=layer,
        load=load,
        saliency=saliency,
        gate=gate,
        carried=_shares(stats.gated_norm_sum),
        balance=balance,
        router_entropy=entropy,
        top_k=round(int(stats.routed_tokens.sum()) / max(1, int(stats.token_count[0]))),
    )


def _shares(values: Float64) -> Float64:
    total = values.sum()
    return values / total if total > 0 else np.zeros_like(values)


def expert_findings(warehouse: Warehouse, run_ids: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield (run id, finding) for the runs whose experts were measured."""
    rows = warehouse.table("expert_stats", run_ids=run_ids)
    for run_id in dict.fromkeys(rows["run_id"].to_pylist()):
        layers = _by_layer(rows.filter(pc.field("run_id") == run_id))
        yield from ((run_id, one) for one in (*_idle(layers), *_carrying(layers)))


def _idle(layers: Sequence[LayerExperts]) -> Iterator[Row]:
    if not (affected := [one for one in layers if one.idle]):
        return
    idle, number = sum(len(one.idle) for one in layers), sum(len(one.load) for one in layers)
    named = "; ".join(f"layer {one.layer}: {', '.join(map(str, one.idle[:8]))}" for one in affected[:MAX_NAMED])
    more = "; ..." if len(affected) > MAX_NAMED else ""
    message = (
        f"{idle} of {number} experts got no token of this text, in {layers_in_words([o.layer for o in affected])} "
        f"({named}{more}): nothing is known of them but that."
    )
    yield finding("idle_experts", "warning" if idle > number / 4 else "note", idle / number, message)


def _carrying(layers: Sequence[LayerExperts]) -> Iterator[Row]:
    affected = [one for one in layers if len(one.carried) > 1 and one.carried.max() > DOMINANT]
    if not affected:
        return
    extreme = max(affected, key=lambda one: float(one.carried.max()))
    share = float(extreme.carried.max())
    message = (
        f"One expert gives more than half of what all experts add, in {layers_in_words([o.layer for o in affected])} "
        f"(expert {int(extreme.carried.argmax())} gives {share:.0%} in layer {extreme.layer})."
    )
    yield finding("dominant_expert", "warning" if len(affected) > len(layers) / 2 else "note", share, message)
