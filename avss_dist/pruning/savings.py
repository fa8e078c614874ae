"""Sizes of checkpoints from their headers: savings of a plan, and the number of layers that fits in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss_dist.core.errors import AvssError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes, describe_count
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.selection import PlanError
from avss_dist.warehouse.checks import settings_of

if TYPE_CHECKING:
    from avss_dist.models.size import Footprint


def run_size(run: Mapping[str, Any]) -> Footprint:
    """Return the size of the checkpoint that a run has scored. The headers of a hub id are read from the hub.

    Args:
        run: a row of ``runs``.

    Raises:
        ModelError: the checkpoint does not exist any more, or cannot be read.
    """
    from avss_dist.models.size import footprint

    model, settings = run["model"], settings_of(run)
    given = {name: settings[name] for name in ("dequantize", "layers", "trust_remote_code") if settings.get(name)}
    name = model if Path(model).expanduser().exists() else f"{model}@{run['revision']}"
    return footprint(name, Settings(dtype=run["dtype"] or "auto", **given))


def local_run_size(run: Mapping[str, Any]) -> Footprint | None:
    """Return `run_size` for a checkpoint on this machine, or None if it is elsewhere or cannot be read."""
    if not Path(run["model"]).expanduser().exists():
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
    if excess <= 0:
        raise PlanError(f"The model has {_describe(size)} as it is, which meets `memory` already.", "Lower it.")
    removed = list(accumulate(sorted(size.layer_bytes)))[:-1]
    if not removed or removed[-1] < excess:
        minimum = size.weight_bytes - (removed[-1] if removed else 0)
        raise PlanError(
            f"`memory` cannot be met: with one layer left, {describe_bytes(minimum)} of "
            f"{describe_bytes(size.weight_bytes)} stay.",
            "Quantize the remaining layers instead.",
        )
    return 1 + sum(bytes_ < excess for bytes_ in removed)


def _describe(size: Footprint) -> str:
    return f"{describe_count(size.num_parameters)} parameters in {describe_bytes(size.weight_bytes)}"


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Difference in size between a model and the same model without some of its layers.

    Attributes:
        layers, parameters: number of dropped layers and parameters.
        weight_bytes: bytes of their weights, in the compute dtype, or as stored if they are quantized.
        cache_bytes: bytes of their keys and values for each cached token.
        size: size of the whole model.
    """

    layers: int
    parameters: int
    weight_bytes: int
    cache_bytes: int
    size: Footprint

    @classmethod
    def of_plan(cls, plan: Plan, size: Footprint) -> Savings:
        """Return the savings of a plan. Sublayers that are left out alone save nothing in a file."""
        saved = sum(size.layer_bytes[layer] for layer in plan.dropped_layers)
        return cls(
            layers=len(plan.dropped_layers),
            parameters=round(saved / size.weight_bytes * size.num_parameters),
            weight_bytes=saved,
            cache_bytes=sum(size.cache_bytes[layer] for layer in plan.dropped_layers),
            size=size,
        )

    def describe(self) -> str:
        """Return a line for people."""
        whole, share = self.size, self.weight_bytes / self.size.weight_bytes
        return (
            f"Saves {self.layers} of {whole.num_layers} layers, {describe_count(self.parameters)} of "
            f"{describe_count(whole.num_parameters)} parameters ({share:.1%}), {describe_bytes(self.weight_bytes)} of "
            f"{describe_bytes(whole.weight_bytes)}, and {describe_count(self.cache_bytes)} of "
            f"{describe_count(sum(whole.cache_bytes))} bytes of keys and values for each token."
        )
