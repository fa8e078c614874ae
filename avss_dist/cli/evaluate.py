"""`avss evaluate`: what a model can do, whole and without layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from avss_dist.cli.options import (
    OverlapOption,
    SkipSequencesOption,
    WarehouseOption,
    format_option,
    takes_settings,
)
from avss_dist.options import EvaluationOptions
from avss_dist.settings import DEFAULT_WAREHOUSE
from avss_dist.system.streams import console

EVALUATED = tuple(EvaluationOptions.__annotations__)
"""Settings that matter where nothing is measured inside of layers, and where the work runs."""
PROMPTS = "Questions of lm-evaluation-harness"  # a panel of the help


@takes_settings(*EVALUATED)
def evaluate(
    subjects: Annotated[list[str], typer.Argument(metavar="SUBJECT", help="Models, or plans (PLAN.yaml).")],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--task", help="perplexity:CORPUS, or a task of lm-evaluation-harness by name or YAML file; repeatable."
        ),
    ],
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
    skip_sequences: SkipSequencesOption = 0,
    skip_questions: Annotated[
        int, typer.Option(help="Skip this many questions at the start of TruthfulQA.", min=0)
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="The most questions per task.", min=1)] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each question of a harness task.", min=0, rich_help_panel=PROMPTS),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Format harness questions with the model's chat template.",
            rich_help_panel=PROMPTS,
        ),
    ] = False,
    system_instruction: Annotated[
        str | None,
        typer.Option(help="System prompt of harness tasks.", rich_help_panel=PROMPTS),
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool,
        typer.Option(
            "--fewshot-as-multiturn", help="Make each few-shot example a turn of the chat.", rich_help_panel=PROMPTS
        ),
    ] = False,
    sparse: Annotated[
        str | None, typer.Option(help="A sparsity plan, SPARSE.yaml, to evaluate every subject with as well.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that a pruned checkpoint was made of, to compare with; by default that of its model card.",
        ),
    ] = None,
    allow_overlap: OverlapOption = False,
    format: Annotated[str, format_option("table", "json", "csv")] = "table",
    **options: Any,
) -> None:
    """Evaluate models and plans; a plan skips its layers in place and is compared with the whole model."""
    from avss_dist.evaluation.evaluate import evaluate as run
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.evaluation import evaluation_table
    from avss_dist.report.terminal.progress import CellProgress

    with CellProgress() as progress:
        found = run(
            subjects,
            tasks=tasks,
            warehouse=warehouse,
            skip_sequences=skip_sequences,
            skip_questions=skip_questions,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            fewshot_as_multiturn=fewshot_as_multiturn,
            sparse=sparse,
            base=base,
            allow_overlap=allow_overlap,
            reporter=progress,
            **options,
        )
    if format == "table":
        console().print(evaluation_table(found))
    else:
        write_table(found.table(), format, console())
