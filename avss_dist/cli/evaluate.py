"""`avss evaluate`: what a model can do, whole and without layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from avss_dist.cli.base import console
from avss_dist.cli.options import (
    AddressOption,
    AttentionOption,
    BatchSizeOption,
    CodeOption,
    DeviceOption,
    DtypeOption,
    ExecutorOption,
    FreshOption,
    LayersOption,
    LayoutOption,
    MaxSequencesOption,
    ReplicasOption,
    SequenceLengthOption,
    ShardOption,
)
from avss_dist.errors import require_known
from avss_dist.settings import Execution, Settings

DEFAULTS, EXECUTION = Settings(), Execution()


def evaluate(
    subjects: Annotated[list[str], typer.Argument(help="Models, or plans by avss plan: PLAN.yaml.")],
    task: Annotated[
        list[str],
        typer.Option(help="perplexity:CORPUS, or a task of lm-evaluation-harness by name or YAML file; repeatable."),
    ],
    warehouse: Annotated[str, typer.Option(help="Where results go: a folder, or an s3://, gs://, hdfs:// URI.")],
    max_sequences: MaxSequencesOption = None,
    skip_sequences: Annotated[int, typer.Option(help="Rows at the start of a corpus that are not read.")] = 0,
    sequence_length: SequenceLengthOption = DEFAULTS.sequence_length,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    sequences_per_shard: ShardOption = DEFAULTS.sequences_per_shard,
    layout: LayoutOption = DEFAULTS.layout,
    limit: Annotated[int | None, typer.Option(help="Questions of a harness task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a harness task.")] = None,
    dtype: DtypeOption = DEFAULTS.dtype,
    layers: LayersOption = None,
    attention: AttentionOption = None,
    executor: ExecutorOption = EXECUTION.executor,
    replicas: ReplicasOption = None,
    address: AddressOption = None,
    device: DeviceOption = DEFAULTS.device,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Evaluate on text that a plan's scores were measured on.")
    ] = False,
    trust_remote_code: CodeOption = False,
    fresh: FreshOption = False,
    format: Annotated[str, typer.Option("--format", help="table, json, csv.")] = "table",
) -> None:
    """Evaluate models and plans; a plan skips its layers in place, and is compared with its whole model."""
    options: dict[str, Any] = {
        name: value for name, value in locals().items() if name not in ("subjects", "task", "warehouse", "format")
    }
    require_known("format", format, ("table", "json", "csv"))

    from avss_dist.evaluation.evaluate import evaluate as run
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.evaluation import evaluation_rows, evaluation_table
    from avss_dist.report.terminal.progress import CellProgress

    with CellProgress() as progress:
        found = run(subjects, tasks=task, warehouse=warehouse, reporter=progress, **options)
    if format == "table":
        console().print(evaluation_table(found))
    else:
        write_table(evaluation_rows(found), format, console())
