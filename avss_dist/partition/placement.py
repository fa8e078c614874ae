"""Placement of a replica on devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from avss_dist.partition.catalog import PARTITIONS

MAX_COPIES = 8  # the loss of one stops all


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of one replica on devices. Its partition is never ``auto``.

    Attributes:
        partition: a name of ``partition.catalog.PARTITIONS``.
        ranks: processes of the replica; see `copies`.
        gpus: GPUs of the replica, over all its ranks; 0 on a CPU.
        max_memory: bytes that weights and waiting hidden states may take, by device: ``cpu``, ``0``, ``1``, ... With
            ``streaming``, those of a GPU include activations.
        why: the reason for the choice, for people.
    """

    partition: str = "single"
    ranks: int = 1
    gpus: int = 0
    max_memory: Mapping[str, int] = field(default_factory=dict)
    why: str = "it was requested"

    @property
    def copies(self) -> int:
        """Number of whole copies of the model that share a task, or 1 where ranks hold one together."""
        return 1 if PARTITIONS[self.partition].gang else self.ranks


SINGLE = Placement()
"""The whole model in one process."""


def fingerprint_part(placement: Placement) -> dict[str, int]:
    """Return the part of a placement that can change a number, for a fingerprint: ranks that sum in another order."""
    if PARTITIONS[placement.partition].splits_matrices or placement.copies > 1:
        return {placement.partition: placement.ranks}
    return {}


def with_copies(placement: Placement, copies: int) -> Placement:
    """Return a placement of whole copies, each a rank of one gang, or the same one if ranks hold a model together."""
    copies = min(copies, MAX_COPIES)
    if not PARTITIONS[placement.partition].whole or copies < 2:
        return placement
    return replace(placement, ranks=copies, gpus=placement.gpus * copies)
