"""A run's routed experts by layer, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from avss_dist.analysis.experts import LayerExperts
from avss_dist.report.terminal.scores import BAR_WIDTH, bar_cells
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.text import describe_count

LEAST = 3  # experts of the lowest saliency that are named


def experts_table(run: Mapping[str, Any], layers: Sequence[LayerExperts]) -> RenderableType:
    """One row a layer: how evenly its router spreads tokens, and the experts that stand out."""
    unmarked = [False] * len(layers)
    columns = [
        Column(title="layer", cells=[str(one.layer) for one in layers]),
        Column(title="", cells=bar_cells([one.balance for one in layers], unmarked), width=BAR_WIDTH, priority=1),
        Column(title="balance", cells=[f"{one.balance:.3f}" for one in layers]),
        Column(title="router entropy", cells=[_number(one.router_entropy) for one in layers], priority=3),
        Column(title="experts", cells=[str(len(one.load)) for one in layers], priority=4),
        Column(title="idle", cells=[str(len(one.idle)) for one in layers]),
        Column(title="busiest", cells=[_most(one.load) for one in layers], priority=2),
        Column(title="carries most", cells=[_most(one.carried) for one in layers], priority=2),
        Column(title="least salient", cells=[_least(one) for one in layers]),
    ]
    caption = Text(
        f"{run['run_id']}: {describe_count(run['num_tokens'])} tokens of {run['corpus']}.\n"
        "balance: entropy of the tokens' spread over experts, 1 is even; router entropy: of its probabilities, a mean "
        "over tokens.\nbusiest: share of the routed tokens; carries most: share of the sum of gate x |output|; "
        "least salient: the lowest means of it (REAP), idle experts first."
    )
    return FittedTable(columns, title=f"{run['model']}  routed experts", caption=caption)


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"


def _most(shares: np.ndarray) -> str:
    return f"{int(shares.argmax())} ({shares.max():.0%})"


def _least(layer: LayerExperts) -> str:
    order = np.argsort(layer.saliency, kind="stable")[:LEAST]
    return ", ".join(map(str, order.tolist()))
