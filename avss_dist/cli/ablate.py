"""`avss ablate`: what each layer does to the loss."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from avss_dist.cli.evaluate import EVALUATED
from avss_dist.cli.options import (
    CorpusOption,
    ManyOption,
    ModelArgument,
    SkipSequencesOption,
    WarehouseOption,
    format_option,
    takes_settings,
)
from avss_dist.settings import DEFAULT_WAREHOUSE, DRAWS
from avss_dist.system.streams import console

LEFT_OUT = "What is left out, and how"


@takes_settings(*EVALUATED)
def ablate(
    model: ModelArgument,
    corpus: CorpusOption,
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
    leave_one_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-out/--no-leave-one-out", rich_help_panel=LEFT_OUT, help="Measure the loss without each layer."
        ),
    ] = True,
    sublayers: Annotated[
        bool,
        typer.Option(
            "--sublayers",
            rich_help_panel=LEFT_OUT,
            help="Measure the loss without each layer's attention, and without its MLP.",
        ),
    ] = False,
    shapley: Annotated[
        int, typer.Option(rich_help_panel=LEFT_OUT, help="Permutations to sample for layer Shapley values.", min=0)
    ] = 0,
    truncation: Annotated[
        bool,
        typer.Option(
            "--truncation/--no-truncation",
            rich_help_panel=LEFT_OUT,
            help="End a permutation once the model only guesses.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(rich_help_panel=LEFT_OUT, help="Seed for the permutations.", min=0)] = 0,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            rich_help_panel=LEFT_OUT,
            help="Run a backward pass: first-order estimates of removal, and norms.",
        ),
    ] = False,
    damage: Annotated[
        bool,
        typer.Option(
            "--damage",
            rich_help_panel=LEFT_OUT,
            help="Estimate the effect of leaving layers out, at the cost of about 8 passes.",
        ),
    ] = False,
    draws: Annotated[int, typer.Option(rich_help_panel=LEFT_OUT, help="Draws of labels for --damage.", min=1)] = DRAWS,
    skip_sequences: SkipSequencesOption = 0,
    allow_many: ManyOption = False,
    format: Annotated[str, format_option("table", "json", "csv")] = "table",
    **options: Any,
) -> None:
    """Leave layers out and measure the loss: the ground truth for scores."""
    from avss_dist.evaluation.ablate import ablate as run
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.ablation import ablation_table
    from avss_dist.report.terminal.progress import CellProgress

    with CellProgress() as progress:
        found = run(
            model,
            corpus=corpus,
            warehouse=warehouse,
            leave_one_out=leave_one_out,
            sublayers=sublayers,
            shapley=shapley,
            truncation=truncation,
            seed=seed,
            gradients=gradients,
            damage=damage,
            draws=draws,
            skip_sequences=skip_sequences,
            allow_many=allow_many,
            reporter=progress,
            **options,
        )
    if format == "table":
        console().print(ablation_table(found))
    else:
        write_table(found.table(), format, console())
