"""Checkpoints of runs, of which only the configuration is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avss_dist.core.values import TableRow
from avss_dist.warehouse.checks import checkpoint_name

if TYPE_CHECKING:
    from avss_dist.models.checkpoint.locate import Checkpoint


def configured_checkpoint(run: TableRow) -> Checkpoint:
    """Return the checkpoint of a run. From the hub, only its configuration is fetched, at the revision of the run.

    Args:
        run: a row of ``runs``.

    Raises:
        ModelError: the checkpoint does not exist or cannot be opened.
    """
    from avss_dist.models.checkpoint.locate import fetch_files, locate

    name = checkpoint_name(run)
    return locate(name) or fetch_files(name, ["config.json"])
