"""Partition ``single``: a whole model on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer
from avss_dist.models.loading import forward_function, load
from avss_dist.partition.base import Placement
from avss_dist.partition.batchwise import BatchwiseReplica, describe
from avss_dist.partition.copies import CopiedLanguageModel
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory


class SingleReplica(BatchwiseReplica):
    """Whole model on one device; see `partition.base.Replica`."""

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
            self.language_model = CopiedLanguageModel(*opened, placement)
        elif head:
            self.language_model = LanguageModel(*opened)

    def close(self) -> None:
        """Drop the weights."""
        self.language_model = None
        del self._backbone, self._run, self.layers
        free_device(self.device)
