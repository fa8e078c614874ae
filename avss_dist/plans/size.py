"""Sizes of the checkpoints of runs, and what plans save of them."""

from __future__ import annotations

import os
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from avss_dist.core.errors import AvssError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes, describe_count
from avss_dist.core.values import TableRow
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.warehouse.checks import checkpoint_name, settings_of

if TYPE_CHECKING:
    from avss_dist.models.checkpoint.size import Footprint


def run_size(run: TableRow) -> Footprint:
    """Return the size of the checkpoint that a run has scored. The headers of a hub id are read from the hub.

    Args:
        run: a row of ``runs``.

    Raises:
        ModelError: the checkpoint does not exist any more, or cannot be read.
    """
    from avss_dist.models.checkpoint.size import footprint

    settings = settings_of(run)
    options = {name: settings[name] for name in ("dequantize", "layers", "trust_remote_code") if settings.get(name)}
    return footprint(checkpoint_name(run), Settings(dtype=run["dtype"] or "auto", **options))


def local_run_size(run: TableRow) -> Footprint | None:
    """Return `run_size` for a checkpoint on this machine, or None if it is elsewhere or cannot be read."""
    if not os.path.exists(os.path.expanduser(checkpoint_name(run))):
        return None
    try:
        return run_size(run)
    except AvssError:
        return None


def count_for_memory(size: Footprint, memory: float) -> int:
    """Return the minimum number of layers to drop so that any choice of them leaves at most these bytes of weights.

    Raises:
        PlanError: the whole model has no more, or no number of layers is enough.
    """
    excess = size.weight_bytes - memory
    weights = describe_bytes(size.weight_bytes)
    if excess <= 0:
        raise PlanError(
            f"The model has {describe_count(size.num_parameters)} parameters in {weights} as it is, which meets "
            "`memory` already.",
            "Lower it.",
        )
    # Bytes of the smallest layer, of the two smallest, and so on: any choice of as many layers frees at least these.
    freed = list(accumulate(sorted(size.layer_bytes)))[:-1]
    maximum = freed[-1] if freed else 0
    if excess > maximum:
        raise PlanError(
            f"`memory` cannot be met: with one layer left, {describe_bytes(size.weight_bytes - maximum)} of {weights} "
            "stay.",
            "Quantize the remaining layers instead.",
        )
    return 1 + bisect_left(freed, excess)


def describe_savings(plan: Plan, size: Footprint) -> str:
    """Return a line on what a model without some layers saves. Sublayers that are left out save nothing in a file.

    Args:
        size: size of the whole model.
    """
    saved = sum(size.layer_bytes[layer] for layer in plan.dropped_layers)
    cache_bytes = sum(size.cache_bytes[layer] for layer in plan.dropped_layers)
    share = saved / size.weight_bytes
    saved_parameters = round(share * size.num_parameters)
    layers = f"{len(plan.dropped_layers)} of {size.num_layers} layers"
    parameters = f"{describe_count(saved_parameters)} of {describe_count(size.num_parameters)} parameters ({share:.1%})"
    weights = f"{describe_bytes(saved)} of {describe_bytes(size.weight_bytes)}"
    cache = f"{describe_count(cache_bytes)} of {describe_count(sum(size.cache_bytes))} bytes of keys and values"
    return f"Saves {layers}, {parameters}, {weights}, and {cache} for each token."
