"""ExpertStats: sums over the tokens that a router sent to the experts of one layer. They merge by addition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, get_type_hints

from avss_dist.stats.rows import Float64, Int64


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertStats:
    """Statistics of the experts of a layer, one entry for each expert, including those that no token reached.

    ``gated_norm_sum / routed_tokens`` is the saliency of REAP (Lasby et al., arXiv 2510.13999, equation 9). The output
    of an expert is taken at a gate of 1. Tokens with a non-finite output count only in the first two sums.
    """

    routed_tokens: Annotated[Int64, "tokens that the router gave to the expert"]
    gate_sum: Annotated[Float64, "sum over those tokens of the gate: what the expert's output is multiplied by"]
    gated_norm_sum: Annotated[Float64, "sum over those tokens of gate * |output|"]
    output_count: Annotated[Int64, "elements of the expert's outputs (tokens x units)"]
    output_sum: Annotated[Float64, "sum over those elements"]
    output_sum_sq: Annotated[Float64, "sum of their squares"]
    token_count: Annotated[Int64, "tokens that the router of the layer saw; the same for each of its experts"]
    router_entropy_sum: Annotated[
        Float64, "sum over those tokens of the entropy of the router's softmax; the same for each expert", "nats"
    ]

    def merge(self, other: ExpertStats) -> ExpertStats:
        """Return the statistics over the tokens of both operands."""
        return ExpertStats(**{name: getattr(self, name) + getattr(other, name) for name in EXPERT_FIELDS})


_HINTS = get_type_hints(ExpertStats, include_extras=True)
EXPERT_FIELDS = tuple(f.name for f in fields(ExpertStats))
EXPERT_COLUMNS = {name: (_HINTS[name].__origin__ is Int64, *_HINTS[name].__metadata__) for name in EXPERT_FIELDS}
"""Description of each field: whether it is a count, its meaning, and its unit if it has one."""


def merge_experts(parts: Iterable[Mapping[int, ExpertStats]]) -> dict[int, ExpertStats]:
    """Merge the statistics of each layer, in the order of the parts."""
    merged: dict[int, ExpertStats] = {}
    for part in parts:
        for layer, stats in part.items():
            merged[layer] = merged[layer].merge(stats) if layer in merged else stats
    return dict(sorted(merged.items()))
