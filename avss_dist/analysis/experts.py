"""Routed experts by layer: load, saliency and balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from avss_dist.analysis.section import BarColumn, ReportColumn, ReportRow, ReportTable, Section
from avss_dist.core.errors import QueryError
from avss_dist.core.text import describe_count
from avss_dist.core.values import TableRow
from avss_dist.stats.layer_stats import ExpertStats, Float64, Int64
from avss_dist.warehouse.encoding import to_experts
from avss_dist.warehouse.reader import Warehouse

NUM_NAMED = 3  # experts of the lowest saliency that are named

_NUMBER = "{:z.3f}".format
_COLUMNS = (
    ReportColumn("layer", "layer"),
    BarColumn(key="balance"),
    ReportColumn("balance", "balance", _NUMBER, meaning="entropy of the tokens' spread over experts, 1 is even"),
    ReportColumn(
        "router entropy", "router_entropy", _NUMBER, meaning="of its probabilities, a mean over tokens", priority=3
    ),
    ReportColumn("experts", "experts", priority=4),
    ReportColumn("idle", "idle"),
    ReportColumn("busiest", "busiest", meaning="share of the routed tokens", priority=2, number=False),
    ReportColumn(
        "carries most", "carries_most", meaning="share of the sum of gate x |output|", priority=2, number=False
    ),
    ReportColumn(
        "least salient",
        "least_salient",
        meaning="the lowest means of gate x |output| (REAP), idle experts first",
        number=False,
    ),
)


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
        """Return the scores of the experts by the names of `stats.catalog.EXPERT_SCORES` that are measured."""
        return {"reap": self.saliency, "tokens": self.load, "gate": self.gate}

    @property
    def idle(self) -> list[int]:
        """Indices of the experts that no token reached."""
        return [int(expert) for expert in np.flatnonzero(self.load == 0)]


def require_experts(warehouse: Warehouse, run_id: str) -> list[LayerExperts]:
    """Return the experts of each layer of a run.

    Raises:
        QueryError: if no experts were measured.
    """
    layers = experts_by_layer(warehouse.table("expert_stats", run_ids=[run_id]))
    if not layers:
        raise QueryError(
            f"Run '{run_id}' has no statistics of routed experts.",
            "Score a mixture of experts with avss score --experts.",
        )
    return layers


def experts_by_layer(rows: pa.Table) -> list[LayerExperts]:
    """Return the experts of each layer of one run, from its rows of ``expert_stats``."""
    return [_layer_experts(layer, stats) for layer, stats in to_experts(rows).items()]


def _layer_experts(layer: int, stats: ExpertStats) -> LayerExperts:
    """Return the statistics of the experts of one layer, from sums over its tokens."""
    routed = stats.routed_tokens
    tokens = stats.token_count[0]
    load = _shares(routed.astype(np.float64))
    used = load[load > 0]
    # The entropy of equal shares. That of a single expert is 0, by which nothing can be divided.
    even = np.log(max(len(routed), 2))
    entropy = -(used * np.log(used)).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        router_entropy = float(stats.router_entropy_sum[0] / tokens) / even
    experts_per_token = int(routed.sum()) / max(1, int(tokens))
    return LayerExperts(
        layer=layer,
        load=load,
        saliency=_means(stats.gated_norm_sum, routed),
        gate=_means(stats.gate_sum, routed),
        carried=_shares(stats.gated_norm_sum),
        balance=float(entropy / even),
        router_entropy=router_entropy,
        top_k=round(experts_per_token),
    )


def _means(totals: Float64, tokens: Int64) -> Float64:
    """Return the mean over the tokens of each expert, 0 for an idle expert."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = totals / tokens
    return np.where(tokens > 0, means, 0.0)


def _shares(values: Float64) -> Float64:
    total = values.sum()
    if total > 0:
        return values / total
    return np.zeros_like(values)


def experts_section(label: str, run: TableRow, layers: Sequence[LayerExperts]) -> Section:
    """Return the section on a run: evenness of its routers, and the experts that stand out.

    Args:
        run: a row of ``runs``.
    """
    idle = sum(len(layer.idle) for layer in layers)
    number = sum(len(layer.load) for layer in layers)
    uneven = min(layers, key=lambda layer: layer.balance)
    summary = (
        f"{idle} of {number} experts got no token. The spread is least even in layer {uneven.layer}: "
        f"balance {uneven.balance:.3f}, where 1 is even; its busiest expert got {uneven.load.max():.0%} of the tokens."
    )
    table = ReportTable(
        name="experts",
        title="Routed experts by layer",
        columns=_COLUMNS,
        rows=[_layer_row(layer) for layer in layers],
    )
    return Section(
        label=label,
        about=f"{describe_count(run['num_tokens'])} tokens of {run['corpus']}.",
        sentences=[summary],
        tables=[table],
    )


def _layer_row(layer: LayerExperts) -> ReportRow:
    """Return the row of the experts of one layer."""
    row = {
        "layer": layer.layer,
        "balance": layer.balance,
        "router_entropy": layer.router_entropy,
        "experts": len(layer.load),
        "idle": len(layer.idle),
        "busiest": _largest(layer.load),
        "carries_most": _largest(layer.carried),
        "least_salient": _least_salient(layer),
    }
    return ReportRow(row)


def _largest(shares: Float64) -> str:
    """Return the expert of the largest share in words."""
    return f"{shares.argmax()} ({shares.max():.0%})"


def _least_salient(layer: LayerExperts) -> str:
    """Return the experts of the lowest saliency in words."""
    experts = np.argsort(layer.saliency, kind="stable")[:NUM_NAMED]
    return ", ".join(str(expert) for expert in experts.tolist())
