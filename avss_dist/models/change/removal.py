"""Removal of layers, sublayers and routed experts from an open model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from avss_dist.core.intervention import Removal, whole_layers
from avss_dist.models.change.experts import expert_removals
from avss_dist.models.change.skipping import skips
from avss_dist.models.change.sublayers import sublayer_removals
from avss_dist.models.forward import Change
from avss_dist.models.structure.layers import Layer


def removal_changes(layers: Sequence[Layer], removed: Collection[Removal]) -> list[Change]:
    """Return the changes by which a model computes without layers, sublayers and experts.

    Args:
        layers: all layers of the model, for which `experts.require_experts` passes.

    Raises:
        ModelError: a layer is used more than once in a pass.
    """
    return [
        *skips(layers, whole_layers(removed)),
        *sublayer_removals(layers, removed),
        *expert_removals(layers, removed),
    ]
