"""Data parallelism: whole copies of a model each take a part of one task's text, and their sums are reduced."""

from __future__ import annotations

from dataclasses import replace

import torch

from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import Backbone
from avss_dist.partition.base import Placement, RowSplit
from avss_dist.partition.group import DividedWork, require_group

MAX_COPIES = 8  # the loss of one stops all


def with_copies(placement: Placement, copies: int) -> Placement:
    """Return a placement of several whole copies, each a rank of one gang; unchanged if ranks hold a model together."""
    copies = min(copies, MAX_COPIES)
    if not PARTITIONS[placement.partition].whole or copies < 2:
        return placement
    return replace(placement, ranks=copies, gpus=placement.gpus * copies)


class CopiedLanguageModel(DividedWork, LanguageModel):
    """One of several copies of a language model. All take the same cells, and the first one reports.

    Raises:
        ConfigError: this process is not in a group of that many processes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        backbone: Backbone,
        device: torch.device,
        placement: Placement,
    ) -> None:
        super().__init__(checkpoint, settings, backbone, device)
        self._split = RowSplit(*require_group(placement))
        self.reports = self._split.rank == 0
