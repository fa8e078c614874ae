"""The size of the checkpoint that a run was of, from its headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avss_dist.errors import AvssError
from avss_dist.models.size import Footprint, footprint
from avss_dist.settings import Settings
from avss_dist.warehouse.checks import settings_of


def run_size(run: Mapping[str, Any]) -> Footprint:
    """That of a row of ``runs``; of a hub id, the hub is queried.

    Raises:
        ModelError: there is no such checkpoint any more, or it cannot be read.
    """
    model, settings = run["model"], settings_of(run)
    kept = {name: settings[name] for name in ("dequantize", "layers", "trust_remote_code") if settings.get(name)}
    kept["dtype"] = run["dtype"] or "auto"
    named = model if Path(model).expanduser().exists() else f"{model}@{run['revision']}"
    return footprint(named, Settings(**kept))


def known_size(run: Mapping[str, Any]) -> Footprint | None:
    """The same of a checkpoint on this machine; None of others, or where it cannot be read."""
    if not Path(run["model"]).expanduser().exists():
        return None
    try:
        return run_size(run)
    except AvssError:
        return None
