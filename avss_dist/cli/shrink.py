"""`avss shrink`: a smaller checkpoint of a model, in one command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from avss_dist.cli.evaluate import EVALUATED
from avss_dist.cli.options import (
    TEXT_FORMATS,
    CorpusOption,
    ModelArgument,
    OverlapOption,
    ProtectOption,
    TextFormatOption,
    choice,
    output_option,
    protected,
    takes_settings,
    warehouse_option,
)
from avss_dist.cli.plan import CHOSEN_BY
from avss_dist.registry import INTERACTIONS
from avss_dist.settings import DEFAULT_REPAIR, NO_REPAIR, REPAIRS
from avss_dist.system.streams import console, emit, emit_json


@takes_settings(*EVALUATED)
def shrink(
    model: ModelArgument,
    corpus: CorpusOption,
    output: Annotated[str, output_option("Folder of the new checkpoint.")],
    share: Annotated[float | None, typer.Option(help="Drop this share of the layers; 0.25 by default.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Drop as many layers as possible while every task keeps this share, such as 0.9."),
    ] = None,
    by: Annotated[
        str,
        choice(
            (*CHOSEN_BY, INTERACTIONS, "greedy"),
            "What chooses the layers: a measurement of avss ablate, a score, chance, or greedily the repaired loss.",
        ),
    ] = "damage",
    protect: ProtectOption = "",
    repair: Annotated[
        str, choice((NO_REPAIR, *REPAIRS), "What to fit at each cut to make up for the removed layers.")
    ] = DEFAULT_REPAIR,
    repair_corpora: Annotated[
        list[str] | None,
        typer.Option(
            "--repair-corpus",
            help="Text to fit the repair on instead of the corpus: CORPUS or CORPUS=WEIGHT; repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Tasks, as for avss evaluate; repeatable. By default, part of every text.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The most questions per task.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question of a harness task.", min=0)
    ] = None,
    warehouse: Annotated[
        str | None, warehouse_option("Warehouse for the measurements; OUTPUT-warehouse by default.")
    ] = None,
    allow_overlap: OverlapOption = False,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> None:
    """Score a model, drop layers, repair the rest, evaluate both, and write the checkpoint; resumes if stopped."""
    first, last = protected(protect)

    from avss_dist.evaluation.shrink import shrink as run
    from avss_dist.report.terminal.shrink import ShrinkProgress, shrunk_lines, shrunk_tables, shrunk_values

    with ShrinkProgress() as progress:
        done = run(
            model,
            corpus=corpus,
            output=output,
            warehouse=warehouse,
            reporter=progress,
            share=share,
            keep=keep,
            by=by,
            first=first,
            last=last,
            repair=repair,
            repair_corpora=repair_corpora or (),
            tasks=tasks or (),
            limit=limit,
            num_fewshot=num_fewshot,
            allow_overlap=allow_overlap,
            **options,
        )
    if format == "json":
        emit_json(shrunk_values(done))
        return
    console().print(shrunk_tables(done))
    for line in shrunk_lines(done):
        emit(line)
