"""Speeds of finished runs of a warehouse, by which the time of planned work is estimated."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow.compute as pc

from avss_dist.core.errors import WarehouseError
from avss_dist.core.values import TableRow
from avss_dist.models.checkpoint.size import Footprint
from avss_dist.warehouse.reader import Warehouse

_SHAPE = ("num_layers", "hidden_size", "num_parameters", "dtype")
_SPEED = ("run_id", "partition", "device", "replicas", "tokens_per_second", "created_at")


def finished_rows(warehouse: Warehouse) -> list[TableRow]:
    """Return the rows of finished ``runs`` with a speed, the newest first."""
    try:
        measured = (pc.field("status") == "done") & (pc.field("tokens_per_second") > 0)
        finished = warehouse.table("runs", columns=[*_SHAPE, *_SPEED], where=measured)
    except WarehouseError:  # there is none yet
        return []
    rows: list[TableRow] = finished.sort_by([("created_at", "descending")]).to_pylist()
    return rows


def run_of_shape(rows: Iterable[TableRow], size: Footprint, partition: str, device: str) -> TableRow | None:
    """Return the first run of a model of the same shape, with the same partition and kind of device, or None.

    Args:
        rows: see `finished_rows`.
        device: ``cpu`` or ``cuda``.
    """
    shape = {name: getattr(size, name) for name in _SHAPE}
    for row in rows:
        if is_same_kind(row["device"], device) and row["partition"] == partition and shape.items() <= row.items():
            return row
    return None


def is_same_kind(device: str, kind: str) -> bool:
    """Return whether the device of a row, ``cpu`` or the name of a GPU, is of a kind, ``cpu`` or ``cuda``."""
    return (device == "cpu") == (kind == "cpu")


def replica_speed(row: TableRow) -> float:
    """Return the tokens per second of one replica of a run."""
    speed: float = row["tokens_per_second"] / (row["replicas"] or 1)
    return speed
