"""ExpertStats: sums over what a router gave to the experts of one layer, which merge by adding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, get_type_hints

from avss_dist.stats.rows import Float64, Int64


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertStats:
    """Statistics of the experts of a layer: an entry for each expert, also if no token reached it.

    ``gated_norm_sum / routed_tokens`` is the saliency of REAP (Lasby et al., arXiv 2510.13999, equation 9). The output
    of an expert is what it gives for a gate of 1; tokens whose output is not finite count in the first two sums alone.
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
        """Statistics of both samples together."""
        return ExpertStats(**{name: getattr(self, name) + getattr(other, name) for name in EXPERT_FIELDS})


_HINTS = get_type_hints(ExpertStats, include_extras=True)
EXPERT_FIELDS = tuple(f.name for f in fields(ExpertStats))
EXPERT_COLUMNS = {name: (_HINTS[name].__origin__ is Int64, *_HINTS[name].__metadata__) for name in EXPERT_FIELDS}
"""Of each field, whether it is a count, its meaning, and its unit if it has one."""


def merge_experts(parts: Iterable[Mapping[int, ExpertStats]]) -> dict[int, ExpertStats]:
    """Merge statistics by layer, in the order given."""
    merged: dict[int, ExpertStats] = {}
    for part in parts:
        for layer, stats in part.items():
            merged[layer] = merged[layer].merge(stats) if layer in merged else stats
    return dict(sorted(merged.items()))
