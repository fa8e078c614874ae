"""`avss prune`: a checkpoint without the layers of a plan."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from avss_dist.cli.options import (
    TEXT_FORMATS,
    TextFormatOption,
    takes,
)
from avss_dist.core.text import describe_bytes
from avss_dist.requests import PruneRequest
from avss_dist.system.streams import emit, emit_json

if TYPE_CHECKING:
    from avss_dist.api.change import Pruned


@takes(PruneRequest)
def prune(format: TextFormatOption = TEXT_FORMATS[0], **values: Any) -> None:
    """Write a checkpoint without the layers or experts of a plan, repaired on request; needs little memory."""
    from avss_dist.api.change import prune as write_pruned
    from avss_dist.pruning.plan import read_plan
    from avss_dist.report.terminal.progress import CellProgress

    file = values["plan"]
    values["plan"] = read_plan(file)
    if format == "text":
        emit("\n  ".join([f"{file}:", *values["plan"].describe()]))
    with CellProgress() if values.get("warehouse") else nullcontext() as progress:
        done = write_pruned(on_event=progress, **values)
    if format == "json":
        emit_json(done.table().to_pylist()[0])
    else:
        _print(done)


def _print(done: Pruned) -> None:
    from avss_dist.api.change import describe_remaining

    emit(f"{done.folder}: {describe_remaining(done.plan)}, {describe_bytes(done.bytes)} of weights.")
    for line in done.repair.describe() if done.repair else ():
        emit(line)
    if done.difference is None:
        emit("Layers have the shapes and settings that they had.")
    else:
        masked = "the experts masked" if done.plan.experts else "the layers skipped"
        repaired = " and the repaired weights" if done.repair else ""
        emit(f"Outputs are those of the original with {masked}{repaired} (largest difference {done.difference:g}).")
    for note in done.notes:
        emit(note)
