"""`avss score` and `avss estimate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.base import console, spelled
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
    MaxMemoryOption,
    MaxSequencesOption,
    RanksOption,
    ReplicasOption,
    SequenceLengthOption,
    ShardOption,
    SitesOption,
    absolute,
    sizes,
)
from avss_dist.errors import require_known
from avss_dist.settings import PARTITIONS, SITES, Execution, Settings

if TYPE_CHECKING:
    from avss_dist.runs.api import Run

DEFAULTS, EXECUTION = Settings(), Execution()


def score(
    models: Annotated[list[str], typer.Argument(help="Hub id (org/name@revision), folder, or .gguf file.")],
    corpus: CorpusOption,
    out: Annotated[str, typer.Option(help="Warehouse: a folder, or an s3://, gs://, hdfs:// URI.")],
    max_sequences: MaxSequencesOption = None,
    sequence_length: SequenceLengthOption = DEFAULTS.sequence_length,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    sequences_per_shard: ShardOption = DEFAULTS.sequences_per_shard,
    layout: LayoutOption = DEFAULTS.layout,
    skip_first_tokens: Annotated[
        int, typer.Option(help="Leading tokens of each row that are not counted.")
    ] = DEFAULTS.skip_first_tokens,
    dtype: DtypeOption = DEFAULTS.dtype,
    sites: SitesOption = None,
    thresholds: Annotated[
        list[str] | None,
        typer.Option("--threshold", help="Absolute near-zero threshold, instead of the grid; repeatable."),
    ] = None,
    layers: LayersOption = None,
    attention: AttentionOption = None,
    executor: ExecutorOption = EXECUTION.executor,
    replicas: ReplicasOption = None,
    address: AddressOption = None,
    device: DeviceOption = DEFAULTS.device,
    partition: Annotated[str, typer.Option(help=f"{', '.join(PARTITIONS)}.")] = EXECUTION.partition,
    ranks: RanksOption = None,
    gpus_per_replica: Annotated[int | None, typer.Option(help="GPUs of one replica.")] = None,
    max_memory: MaxMemoryOption = None,
    offload_folder: Annotated[str | None, typer.Option(help="For what has no room in memory.")] = None,
    placement_seconds: Annotated[
        float, typer.Option(help="How long to wait for room on a cluster.")
    ] = EXECUTION.placement_seconds,
    hang_seconds: Annotated[
        float, typer.Option(help="A worker that begins no layer for this long is replaced.")
    ] = EXECUTION.hang_seconds,
    trust_remote_code: CodeOption = False,
    fresh: FreshOption = False,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Then a backward pass on the same text: what avss ablate can tell too.")
    ] = False,
) -> int:
    """Score every layer of one or more models on a corpus, and keep the result as Parquet."""
    options: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name not in ("models", "corpus", "out", "sites", "thresholds", "gradients")
    }
    options["max_memory"] = sizes(max_memory or [])
    options["sites"] = tuple(sites or SITES)
    options["thresholds"] = absolute(thresholds) if thresholds else DEFAULTS.thresholds

    from avss_dist.report.terminal.progress import Progress
    from avss_dist.runs.api import score as score_one
    from avss_dist.runs.api import score_all

    with Progress() as progress:
        if len(models) == 1:
            runs = [score_one(models[0], corpus=corpus, out=out, reporter=progress, **options)]
        else:
            runs = score_all(models, corpus=corpus, out=out, reporter=progress, **options)
    for run in runs:
        print(_outcome(run))
    done = [run for run in runs if run.status != "failed"]
    if gradients:
        _take_gradients([run.model for run in done], corpus, out, options)
    if done:
        print(f"Look at it: avss show {done[-1].warehouse} --run {done[-1].run_id}")
    return 0 if len(done) == len(runs) else 1


def estimate(
    model: Annotated[str, typer.Argument(help="Hub id (org/name@revision), folder, or .gguf file.")],
    corpus: CorpusOption,
    max_sequences: MaxSequencesOption = None,
    sequence_length: SequenceLengthOption = DEFAULTS.sequence_length,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    sequences_per_shard: ShardOption = DEFAULTS.sequences_per_shard,
    layout: LayoutOption = DEFAULTS.layout,
    dtype: DtypeOption = DEFAULTS.dtype,
    sites: SitesOption = None,
    layers: LayersOption = None,
    attention: AttentionOption = None,
    device: DeviceOption = DEFAULTS.device,
    ranks: RanksOption = None,
    max_memory: MaxMemoryOption = None,
    trust_remote_code: CodeOption = False,
    format: Annotated[str, typer.Option("--format", help="table, json.")] = "table",
) -> None:
    """Say what a run will take in memory and time, for every partition, before any weight is loaded."""
    require_known("format", format, ("table", "json"))
    names = Settings.__dataclass_fields__
    given = {name: value for name, value in locals().items() if name in names}
    settings = Settings(**{**given, "sites": tuple(sites or SITES)})
    execution = Execution(partition="zero3" if ranks else "auto", ranks=ranks, max_memory=sizes(max_memory or []))

    from avss_dist.estimate.estimate import estimate as estimate_run
    from avss_dist.report.terminal.estimate import estimate_table

    with console().status("Measuring a few layers on this device ...") if sys.stdout.isatty() else nullcontext():
        made = estimate_run(model, corpus, settings, execution)
    if format == "json":
        print(json.dumps(made.as_dict(), indent=2))
    else:
        console().print(estimate_table(made))


def _take_gradients(models: Sequence[str], corpus: str, out: str, options: dict[str, Any]) -> None:
    """Measure gradients as the runs were: the same rows, the same settings."""
    from avss_dist.evaluation.ablate import ablate
    from avss_dist.report.terminal.progress import CellProgress

    for model in models:
        with CellProgress() as progress:
            found = ablate(
                model, corpus=corpus, warehouse=out, leave_one_out=False, gradients=True, reporter=progress, **options
            )
        print(f"{model}: gradients of {len(found.layers)} layers, in the table evaluations.")


def _outcome(run: Run) -> str:
    if run.status == "failed":
        return f"{run.run_id}: failed. {spelled(str(run.error))}"
    if run.status == "skipped":
        return f"{run.run_id}: done before, nothing to do (--fresh measures again)."
    kept = f", {run.resumed_shards} of {run.num_shards} shards from before" if run.resumed_shards else ""
    return f"{run.run_id}: {run.num_tokens:,} tokens in {run.seconds:.1f} s{kept}."
