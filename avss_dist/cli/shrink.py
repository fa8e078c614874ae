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
from avss_dist.settings import INTERACTIONS, NO_REPAIR, REPAIRS
from avss_dist.system.streams import console, emit, emit_json


@takes_settings(*EVALUATED)
def shrink(
    model: ModelArgument,
    corpus: CorpusOption,
    output: Annotated[str, output_option("Folder of the new checkpoint.")],
    share: Annotated[float | None, typer.Option(help="Drop this share of the layers; 0.25 by default.")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Drop as many layers as can go while every task keeps this share: 0.9, for example."),
    ] = None,
    by: Annotated[
        str,
        choice(
            (*CHOSEN_BY, INTERACTIONS, "greedy"),
            "What layers are chosen by: what avss ablate measures, a score, chance; or, greedily, the repaired loss.",
        ),
    ] = "damage",
    protect: ProtectOption = "",
    repair: Annotated[
        str, choice((NO_REPAIR, *REPAIRS), "What is fitted at each cut, to give back what the removed layers did.")
    ] = "refit",
    repair_corpora: Annotated[
        list[str] | None,
        typer.Option(
            "--repair-corpus",
            help="Text that the repair is fitted on, in place of the corpus: CORPUS or CORPUS=WEIGHT; repeatable.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="What is evaluated, as avss evaluate takes it; repeatable. By default a part of every text.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of a task at most.", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question of a harness task.", min=0)
    ] = None,
    warehouse: Annotated[
        str | None, warehouse_option("Where what is measured is kept; OUTPUT-warehouse by default.")
    ] = None,
    allow_overlap: OverlapOption = False,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> None:
    """Score a model, drop layers, repair what is left, evaluate both, and write the checkpoint; stopped, it goes on."""
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
