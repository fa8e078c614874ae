"""Sections on routed experts: shares of tokens by layer and expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avss_dist.analysis.experts import LayerExperts
from avss_dist.core.text import describe_count
from avss_dist.reports.section import BarColumn, ReportColumn, ReportTable, Section, decimals

NUM_NAMED = 3  # experts of the lowest saliency that are named


def experts_section(label: str, run: Mapping[str, Any], layers: Sequence[LayerExperts]) -> Section:
    """Return the section on a run: evenness of its routers, and the experts that stand out.

    Args:
        run: a row of ``runs``.
    """
    idle, number = sum(len(one.idle) for one in layers), sum(len(one.load) for one in layers)
    uneven = min(layers, key=lambda one: one.balance)
    summary = (
        f"{idle} of {number} experts got no token. The spread is least even in layer {uneven.layer}: "
        f"balance {uneven.balance:.3f}, where 1 is even; its busiest expert got {uneven.load.max():.0%} of the tokens."
    )
    return Section(
        label=label,
        about=f"{describe_count(run['num_tokens'])} tokens of {run['corpus']}.",
        sentences=[summary],
        tables=[_table(layers)],
    )


def _table(layers: Sequence[LayerExperts]) -> ReportTable:
    balance = [one.balance for one in layers]
    least_salient = [np.argsort(one.saliency, kind="stable")[:NUM_NAMED].tolist() for one in layers]
    return ReportTable(
        name="experts",
        title="Routed experts by layer",
        columns=[
            ReportColumn("layer", [one.layer for one in layers]),
            BarColumn(values=balance),
            ReportColumn(
                "balance", balance, decimals(3), meaning="entropy of the tokens' spread over experts, 1 is even"
            ),
            ReportColumn(
                "router entropy",
                [one.router_entropy for one in layers],
                decimals(3),
                meaning="of its probabilities, a mean over tokens",
                priority=3,
            ),
            ReportColumn("experts", [len(one.load) for one in layers], priority=4),
            ReportColumn("idle", [len(one.idle) for one in layers]),
            ReportColumn(
                "busiest",
                [_largest(one.load) for one in layers],
                meaning="share of the routed tokens",
                priority=2,
                number=False,
            ),
            ReportColumn(
                "carries most",
                [_largest(one.carried) for one in layers],
                meaning="share of the sum of gate x |output|",
                priority=2,
                number=False,
            ),
            ReportColumn(
                "least salient",
                [", ".join(map(str, experts)) for experts in least_salient],
                meaning="the lowest means of gate x |output| (REAP), idle experts first",
                number=False,
            ),
        ],
    )


def _largest(shares: np.ndarray) -> str:
    return f"{shares.argmax()} ({shares.max():.0%})"
