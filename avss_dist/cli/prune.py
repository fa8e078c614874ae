"""`avss prune`: a checkpoint without the layers of a plan."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.options import (
    TEXT_FORMATS,
    CodeOption,
    ModelArgument,
    SkipSequencesOption,
    TextFormatOption,
    choice,
    output_option,
    takes_settings,
    warehouse_option,
)
from avss_dist.options import WorkOptions
from avss_dist.settings import DEFAULT_REPAIR, NO_REPAIR, REPAIRS
from avss_dist.system.streams import emit, emit_json
from avss_dist.text import describe_bytes

if TYPE_CHECKING:
    from avss_dist.api.change import Pruned


READING = (
    *("max_sequences", "shuffle_seed", "chat_template", "sequence_length", "batch_size", "layout", "row_start"),
    "sequences_per_shard",
    *("dtype", "dequantize", "attention", "device", "threads"),
)


@takes_settings(*READING, *WorkOptions.__annotations__)
def prune(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="A plan, written by avss plan or by hand.")],
    output: Annotated[Path, output_option("Folder of the new checkpoint.")],
    repair: Annotated[
        str | None,
        choice(
            (NO_REPAIR, *REPAIRS),
            f"What to fit at each cut to make up for the removed layers; {DEFAULT_REPAIR} by default if there is text.",
            checked=False,  # a repair that no checkpoint can hold is refused with the reason
        ),
    ] = None,
    repair_corpora: Annotated[
        list[str] | None,
        typer.Option("--repair-corpus", help="Text to fit the repair on: CORPUS or CORPUS=WEIGHT; repeatable."),
    ] = None,
    skip_sequences: SkipSequencesOption = 0,
    warehouse: Annotated[
        str | None,
        warehouse_option("Warehouse with the plan's evaluations, for the model card; the fit is kept in it."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Also upload it to the hub as ORG/NAME; a new model there is private.")
    ] = None,
    trust_remote_code: CodeOption = False,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> None:
    """Write a checkpoint without the layers that a plan drops, repaired on request; needs little memory."""
    from avss_dist.api.change import prune as write_pruned
    from avss_dist.pruning.plan import read_plan
    from avss_dist.report.terminal.progress import CellProgress

    made = read_plan(plan)
    if format == "text":
        emit("\n  ".join([f"{plan}:", *made.describe()]))
    with CellProgress() if warehouse else nullcontext() as progress:
        done = write_pruned(
            model,
            made,
            output,
            repair=repair,
            repair_corpora=repair_corpora or (),
            skip_sequences=skip_sequences,
            warehouse=warehouse,
            push=push,
            reporter=progress,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if format == "json":
        emit_json(done.table().to_pylist()[0])
    else:
        _print(done)


def _print(done: Pruned) -> None:
    layers = f"{len(done.plan.keep)} of {done.plan.num_layers} layers"
    emit(f"{done.folder}: {layers}, {describe_bytes(done.bytes)} of weights.")
    for line in done.repair.describe() if done.repair else ():
        emit(line)
    if done.difference is None:
        emit("Layers have the shapes and settings that they had.")
    else:
        repaired = " and the repaired weights" if done.repair else ""
        emit(
            f"Outputs are those of the original with the layers skipped{repaired} "
            f"(largest difference {done.difference:g})."
        )
    for note in done.notes:
        emit(note)
    if done.pushed:
        emit(f"Uploaded to {done.pushed}")
