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
    format_option,
    takes_settings,
    warehouse_option,
)
from avss_dist.settings import DRAWS, Execution
from avss_dist.system.streams import console


@takes_settings(*EVALUATED, *Execution.__dataclass_fields__)
def ablate(
    model: ModelArgument,
    corpus: CorpusOption,
    warehouse: Annotated[str, warehouse_option()],
    no_leave_one_out: Annotated[
        bool, typer.Option("--no-leave-one-out", help="Do not measure the loss without each layer.")
    ] = False,
    sublayers: Annotated[
        bool,
        typer.Option("--sublayers", help="Measure the loss without each layer's attention, and without its MLP."),
    ] = False,
    shapley: Annotated[int, typer.Option(help="Permutations to sample for layer Shapley values.", min=0)] = 0,
    no_truncation: Annotated[
        bool, typer.Option("--no-truncation", help="Go on with a permutation where the model only guesses.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed for the permutations.", min=0)] = 0,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="A backward pass: first-order removal estimate, norms.")
    ] = False,
    damage: Annotated[
        bool, typer.Option("--damage", help="Estimate what leaving layers out does, for about 8 passes.")
    ] = False,
    draws: Annotated[int, typer.Option(help="Draws of labels, for --damage.", min=1)] = DRAWS,
    skip_sequences: SkipSequencesOption = 0,
    allow_many: ManyOption = False,
    format: Annotated[str, format_option("table", "json", "csv")] = "table",
    **options: Any,
) -> None:
    """Leave layers out and measure the loss: the ground truth that scores stand for."""
    from avss_dist.evaluation.ablate import ablate as run
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.ablation import ablation_rows, ablation_table
    from avss_dist.report.terminal.progress import CellProgress

    with CellProgress() as progress:
        found = run(
            model,
            corpus=corpus,
            warehouse=warehouse,
            leave_one_out=not no_leave_one_out,
            sublayers=sublayers,
            shapley=shapley,
            truncation=not no_truncation,
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
        write_table(ablation_rows(found), format, console())
