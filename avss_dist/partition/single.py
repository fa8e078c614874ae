"""Partition ``single``: a whole model on one device, or several copies that share the text of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer
from avss_dist.models.loading import forward_function, load
from avss_dist.partition.group import DividedLanguageModel, require_group
from avss_dist.partition.replica import BatchwiseReplica, Placement, describe
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

MAX_COPIES = 8  # the loss of one stops all


def with_copies(placement: Placement, copies: int) -> Placement:
    """Return a placement of several whole copies, each a rank of one gang; unchanged if ranks hold a model together."""
    copies = min(copies, MAX_COPIES)
    if not PARTITIONS[placement.partition].whole or copies < 2:
        return placement
    return replace(placement, ranks=copies, gpus=placement.gpus * copies)


class SingleReplica(BatchwiseReplica):
    """Whole model on one device; see `partition.replica.Replica`."""

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, placement: Placement | None = None, *, head: bool = False
    ) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self._backbone = load(checkpoint, settings, self.device, head=head)
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.structure.layers
        self.model: Mapping[str, Any] = describe(self._backbone, "single")
        opened = checkpoint, settings, self._backbone, self.device
        if head and placement and placement.copies > 1:
            require_group(placement)
            self.language_model = DividedLanguageModel(*opened)
        elif head:
            self.language_model = LanguageModel(*opened)

    def close(self) -> None:
        """Drop the weights."""
        self.language_model = None
        del self._backbone, self._run, self.layers
        free_device(self.device)
