"""Sections on routed experts: shares of tokens by layer and expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avss_dist.analysis.experts import LayerExperts
from avss_dist.core.text import describe_count
from avss_dist.report.section import Section
from avss_dist.report.table import BarColumn, ReportColumn, ReportTable, decimals

NUM_NAMED = 3  # experts of the lowest saliency that are named


def experts_section(label: str, run: Mapping[str, Any], layers: Sequence[LayerExperts]) -> Section:
    """Return the section on a run: evenness of its routers, and the experts that stand out.

    Args:
        run: a row of ``runs``.
    """
    return Section(
        label=label,
        about=f"{describe_count(run['num_tokens'])} tokens of {run['corpus']}.",
        sentences=[_summary(layers)],
        tables=[_table(layers)],
    )


def _summary(layers: Sequence[LayerExperts]) -> str:
    idle, number = sum(len(one.idle) for one in layers), sum(len(one.load) for one in layers)
    uneven = min(layers, key=lambda one: one.balance)
    return (
        f"{idle} of {number} experts got no token. The spread is least even in layer {uneven.layer}: "
        f"balance {uneven.balance:.3f}, where 1 is even; its busiest expert got {uneven.load.max():.0%} of the tokens."
    )


def _table(layers: Sequence[LayerExperts]) -> ReportTable:
    balance = [one.balance for one in layers]
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
                _numbered_share,
                meaning="share of the routed tokens",
                priority=2,
                number=False,
            ),
            ReportColumn(
                "carries most",
                [_largest(one.carried) for one in layers],
                _numbered_share,
                meaning="share of the sum of gate x |output|",
                priority=2,
                number=False,
            ),
            ReportColumn(
                "least salient",
                [_lowest_saliency(one) for one in layers],
                meaning="the lowest means of gate x |output| (REAP), idle experts first",
                number=False,
            ),
        ],
    )


def _largest(shares: np.ndarray) -> tuple[int, float]:
    return int(shares.argmax()), float(shares.max())


def _numbered_share(expert: tuple[int, float]) -> str:
    return f"{expert[0]} ({expert[1]:.0%})"


def _lowest_saliency(layer: LayerExperts) -> str:
    order = np.argsort(layer.saliency, kind="stable")[:NUM_NAMED]
    return ", ".join(map(str, order.tolist()))
