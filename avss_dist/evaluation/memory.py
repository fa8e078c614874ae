"""Memory of the measurements of an ablation, estimated before any weights are loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from avss_dist.core.devices import Devices
from avss_dist.core.settings import Settings
from avss_dist.distillation.memory import LIBRARIES
from avss_dist.evaluation.events import MemoryNeeded
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.models.checkpoint.size import Footprint
from avss_dist.models.structure.head import LOGIT_BYTES
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.choose import size_of
from avss_dist.tasks.backward import BackwardMeasure
from avss_dist.tasks.map_damage import MAX_KEPT_BYTES, RoundedLosses, RoundingDamage
from avss_dist.tasks.task import Measure

ROUNDING_BYTES = 12
"""Bytes of a number that is rounded: the weight, the rounded one and their difference, in float32."""
LARGEST_MAP_SHARE = 4
"""Weights of a layer, in multiples of those of its largest linear map, about."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Sizes of a batch in bytes.

    Attributes:
        hidden: hidden states between two layers.
        forward: activations that exist at once in a forward pass, with logits.
        graph: activations of one layer that its backward pass reads.
        outputs: outputs of all linear maps of a layer.
        logits: logits that exist at once, with their gradient.
    """

    hidden: int
    forward: int
    graph: int
    outputs: int
    logits: int


def activations_of(size: Footprint, settings: Settings) -> Activations:
    """Return the sizes of a batch, from the widths of a model's layers."""
    rows = settings.batch_size
    length = settings.sequence_length
    tokens = rows * length
    # Norms compute in float32.
    norm_bytes = 4 * 6 * size.hidden_size
    # Of the attention there are queries, keys, values and the output, and of the MLP half as many again as the outputs
    # of all its linear maps.
    map_widths = 5 * size.attention_width + int(1.5 * size.mlp_width)
    output_widths = 2 * size.hidden_size + 3 * size.attention_width + size.mlp_width
    logit_bytes = 4 * tokens * size.vocabulary
    return Activations(
        hidden=size.hidden_bytes(rows, length),
        forward=size.activation_bytes(rows, length, head=True),
        graph=tokens * (norm_bytes + size.element_bytes * map_widths),
        outputs=tokens * size.element_bytes * output_widths,
        logits=2 * min(LOGIT_BYTES, logit_bytes),  # with their gradient
    )


def measure_bytes(measure: Measure, size: Footprint, batch: Activations) -> int:
    """Return the bytes that a measure takes beside the weights, for one batch.

    A model whose layers cannot run again alone takes more: `RoundingDamage` needs the graph of all layers then.
    """
    recorded = size.num_layers * batch.hidden
    largest_layer = max(size.layer_bytes) // size.element_bytes
    one_weight = ROUNDING_BYTES * largest_layer // LARGEST_MAP_SHARE
    if isinstance(measure, RoundingDamage):
        changes = min(MAX_KEPT_BYTES, len(measure.formats) * batch.outputs)
        gradients = 2 * (1 + measure.draws) * batch.hidden
        return recorded + gradients + batch.logits + batch.graph + changes + one_weight
    if isinstance(measure, BackwardMeasure):
        return size.num_layers * batch.graph + (1 + measure.draws) * batch.hidden + batch.logits
    if isinstance(measure, RoundedLosses):
        return recorded + batch.forward + max(size.layer_bytes) + one_weight
    return recorded + batch.forward


def estimate_memory(model: PlacedModel, measures: Collection[Measure], devices: Devices) -> MemoryNeeded | None:
    """Return the memory that each process needs for measures of a model, which it makes one after the other.

    None without measures, and for a model of unknown size or one that is divided over devices or read layer by layer.
    """
    if not measures or not PARTITIONS[model.placement.partition].whole:
        return None
    size = size_of(model.checkpoint, model.settings)
    if size is None:
        return None
    batch = activations_of(size, model.settings)
    parts = {
        "weights": size.weight_bytes,
        "measuring": max(measure_bytes(measure, size, batch) for measure in measures),
    }
    if devices.kind == "cpu":
        parts["libraries"] = LIBRARIES
    return MemoryNeeded(parts=parts, free=devices.device_bytes)
