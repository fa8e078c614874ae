"""Speed of a model by what a warehouse has: of its losses, of a run of a model of its shape, and of its own text."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc

from avss_dist.core.errors import WarehouseError
from avss_dist.core.values import TableRow
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.partition.choose import size_of
from avss_dist.runs.past_speed import finished_rows, is_same_kind, replica_speed, run_of_shape
from avss_dist.stats.metrics import LOSS
from avss_dist.warehouse.names import OWN_TEXT, PERPLEXITY
from avss_dist.warehouse.reader import Warehouse

READ_FOR_WRITTEN = 2
"""Tokens that are read in the time in which one is written, about, where no own text has been written yet."""


@dataclass(frozen=True)
class PastSpeed:
    """Tokens per second of one forward pass of a model, and what they were measured by."""

    tokens_per_second: float
    reference: str


def past_speed(session: EvaluationSession, model: PlacedModel) -> PastSpeed | None:
    """Return the speed of a model by what a warehouse has: stored losses of it, or else a run of the same shape."""
    warehouse = Warehouse(session.store.root.full)
    kind = session.executor.devices.kind
    speed = _speed_of_losses(warehouse, model, kind)
    if speed is not None:
        return speed
    size = size_of(model.checkpoint, model.settings)
    if size is None:
        return None
    run = run_of_shape(finished_rows(warehouse), size, model.placement.partition, kind)
    if run is None:
        return None
    return PastSpeed(replica_speed(run), run["run_id"])


def writing_speed(session: EvaluationSession, model: PlacedModel) -> PastSpeed | None:
    """Return the speed of a model that writes text: of text that it has written, or else by its `past_speed`."""
    kind = session.executor.devices.kind
    written = 0
    seconds = 0.0
    reference = ""
    for row in _cell_rows(Warehouse(session.store.root.full), model):
        if row["task"] == OWN_TEXT and is_same_kind(row["device"], kind) and row["seconds"]:
            written += len(row["weights"])
            seconds += row["seconds"]
            reference = row["run_id"]
    if written:
        return PastSpeed(written / seconds, reference)
    speed = past_speed(session, model)
    if speed is None:
        return None
    return PastSpeed(speed.tokens_per_second / READ_FOR_WRITTEN, speed.reference)


def _speed_of_losses(warehouse: Warehouse, model: PlacedModel, kind: str) -> PastSpeed | None:
    """Return the speed of the stored losses of a checkpoint on a kind of device, or None without any."""
    tokens = 0.0
    seconds = 0.0
    reference = ""
    for row in _cell_rows(warehouse, model):
        is_loss = row["metric"] == LOSS and row["task"].startswith(PERPLEXITY)
        if is_loss and is_same_kind(row["device"], kind) and row["seconds"]:
            tokens += sum(row["weights"])
            seconds += row["seconds"]
            reference = row["run_id"]
    if not seconds:
        return None
    return PastSpeed(tokens / seconds, reference)


def _cell_rows(warehouse: Warehouse, model: PlacedModel) -> list[TableRow]:
    """Return the rows of the stored cells of a checkpoint, with the columns that tell their speed."""
    columns = ["run_id", "task", "metric", "device", "seconds", "weights"]
    try:
        of_model = pc.field("revision") == model.checkpoint.revision
        rows: list[TableRow] = warehouse.table("cells", columns=columns, where=of_model).to_pylist()
    except WarehouseError:  # there is none yet
        return []
    return rows
