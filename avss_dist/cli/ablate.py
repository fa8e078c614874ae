"""`avss ablate`: what each layer does to the loss."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from avss_dist.cli.base import console
from avss_dist.cli.options import (
    AddressOption,
    AttentionOption,
    BatchSizeOption,
    CodeOption,
    CorpusOption,
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


def ablate(
    model: Annotated[str, typer.Argument(help="Hub id (org/name@revision), folder, or .gguf file.")],
    corpus: CorpusOption,
    warehouse: Annotated[str, typer.Option(help="Where results go: a folder, or an s3://, gs://, hdfs:// URI.")],
    no_leave_one_out: Annotated[
        bool, typer.Option("--no-leave-one-out", help="Not the loss without each layer.")
    ] = False,
    shapley: Annotated[int, typer.Option(help="Permutations to sample for layer Shapley values.")] = 0,
    no_truncation: Annotated[
        bool, typer.Option("--no-truncation", help="Go on with a permutation where the model only guesses.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the permutations.")] = 0,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="A backward pass: first-order removal estimate, norms.")
    ] = False,
    max_sequences: MaxSequencesOption = None,
    skip_sequences: Annotated[int, typer.Option(help="Rows at the start of the corpus that are not read.")] = 0,
    sequence_length: SequenceLengthOption = DEFAULTS.sequence_length,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    sequences_per_shard: ShardOption = DEFAULTS.sequences_per_shard,
    layout: LayoutOption = DEFAULTS.layout,
    dtype: DtypeOption = DEFAULTS.dtype,
    layers: LayersOption = None,
    attention: AttentionOption = None,
    executor: ExecutorOption = EXECUTION.executor,
    replicas: ReplicasOption = None,
    address: AddressOption = None,
    device: DeviceOption = DEFAULTS.device,
    trust_remote_code: CodeOption = False,
    fresh: FreshOption = False,
    format: Annotated[str, typer.Option("--format", help="table, json, csv.")] = "table",
) -> None:
    """Leave layers out and see what it does to the loss: the truth that scores are to tell."""
    options: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "no_leave_one_out", "no_truncation", "format")
    }
    options |= {"leave_one_out": not no_leave_one_out, "truncation": not no_truncation}
    require_known("format", format, ("table", "json", "csv"))

    from avss_dist.evaluation.ablate import ablate as run
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.ablation import ablation_rows, ablation_table
    from avss_dist.report.terminal.progress import CellProgress

    with CellProgress() as progress:
        found = run(model, reporter=progress, **options)
    if format == "table":
        console().print(ablation_table(found))
    else:
        write_table(ablation_rows(found), format, console())
