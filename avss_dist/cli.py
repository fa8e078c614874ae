"""The command line: parse, call, print. Exit codes: 0 done, 1 a run failed, 2 a mistake, 130 stopped by Ctrl-C."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist import __version__
from avss_dist.config import (
    PARTITIONS,
    PUBLISHED_THRESHOLD,
    RECIPES,
    SITES,
    Execution,
    Settings,
    parse_bytes,
    parse_threshold,
)
from avss_dist.errors import AvssError, ConfigError, QueryError, require_known

if TYPE_CHECKING:
    from rich.console import Console

    from avss_dist.query import Warehouse
    from avss_dist.run import Run

app = typer.Typer(
    help="Which layers of a language model matter: activation variance and sparsity (AVSS) by layer, kept as Parquet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DEFAULTS, EXECUTION = Settings(), Execution()
FORMATS = ("table", "csv", "json", "parquet")
WarehousePath = Annotated[str, typer.Argument(help="Warehouse: a folder, or an s3://, gs://, hdfs:// URI.")]


def main() -> None:
    """The console script ``avss``."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


def explained(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turn errors into a message and an exit code; a command returns its exit code, None for 0."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except AvssError as error:
            code = error.exit_code
            _say(f"Error: {error}")
        except KeyboardInterrupt:
            code = 130
            _say("Stopped. Everything measured so far is kept; run the same command again to finish.")
        except BrokenPipeError:
            sys.stderr.close()
            code = 0
        raise typer.Exit(code or 0)

    return run


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _console() -> Console:
    """Standard output; wide enough for a whole table where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"avss_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


# What several commands take.
CorpusOption = Annotated[
    str, typer.Option(help="file.txt, file.jsonl[:field], file.parquet[:column], hf:NAME..., builtin:pydoc.")
]
MaxSequencesOption = Annotated[int | None, typer.Option(help="Rows of tokens to read at most.")]
SequenceLengthOption = Annotated[int, typer.Option(help="Tokens in a row.")]
BatchSizeOption = Annotated[int, typer.Option(help="Rows in a forward pass.")]
ShardOption = Annotated[int, typer.Option(help="Rows in a shard, the unit of work and retry.")]
LayoutOption = Annotated[str, typer.Option(help="packed, or padded (one document a row).")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
SitesOption = Annotated[
    list[str] | None, typer.Option("--site", help=f"{', '.join(SITES)}; repeatable. All of them by default.")
]
LayersOption = Annotated[str | None, typer.Option(help="Module path of the layer list, if it is not found.")]
AttentionOption = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
RanksOption = Annotated[int | None, typer.Option(help="Processes of one replica: zero3, tensor_parallel.")]
MaxMemoryOption = Annotated[
    list[str] | None, typer.Option(help="What to use of a device at most: cpu=200MB, 0=40GiB; repeatable.")
]
CodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint ships.")]


@app.command()
@explained
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
    site: SitesOption = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="Absolute near-zero threshold, instead of the grid; repeatable.")
    ] = None,
    layers: LayersOption = None,
    attention: AttentionOption = None,
    executor: Annotated[str, typer.Option(help="auto, local (this process), ray.")] = EXECUTION.executor,
    replicas: Annotated[int | None, typer.Option(help="Model copies that work in parallel.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
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
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is done already.")] = False,
) -> int:
    """Score every layer of one or more models on a corpus, and keep the result as Parquet."""
    options: dict[str, Any] = {
        name: value for name, value in locals().items() if name not in ("models", "corpus", "out", "site", "threshold")
    }
    options["max_memory"] = _sizes(max_memory or [])
    options["sites"] = tuple(site or SITES)
    options["thresholds"] = _absolute(threshold) if threshold else DEFAULTS.thresholds

    from avss_dist.report.progress import Progress
    from avss_dist.run import score as score_one
    from avss_dist.run import score_all

    with Progress() as progress:
        if len(models) == 1:
            runs = [score_one(models[0], corpus=corpus, out=out, reporter=progress, **options)]
        else:
            runs = score_all(models, corpus=corpus, out=out, reporter=progress, **options)
    for run in runs:
        print(_outcome(run))
    done = [run for run in runs if run.status != "failed"]
    if done:
        print(f"Look at it: avss show {out} --run {done[-1].run_id}")
    return 0 if len(done) == len(runs) else 1


@app.command()
@explained
def estimate(
    model: Annotated[str, typer.Argument(help="Hub id (org/name@revision), folder, or .gguf file.")],
    corpus: CorpusOption,
    max_sequences: MaxSequencesOption = None,
    sequence_length: SequenceLengthOption = DEFAULTS.sequence_length,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    sequences_per_shard: ShardOption = DEFAULTS.sequences_per_shard,
    layout: LayoutOption = DEFAULTS.layout,
    dtype: DtypeOption = DEFAULTS.dtype,
    site: SitesOption = None,
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
    settings = Settings(**given, sites=tuple(site or SITES))
    execution = Execution(partition="zero3" if ranks else "auto", ranks=ranks, max_memory=_sizes(max_memory or []))

    from avss_dist.estimate import estimate as estimate_run
    from avss_dist.report.estimate import estimate_table

    with _console().status("Measuring a few layers on this device ...") if sys.stdout.isatty() else nullcontext():
        made = estimate_run(model, corpus, settings, execution)
    if format == "json":
        print(json.dumps(made.as_dict(), indent=2))
    else:
        _console().print(estimate_table(made))


def _sizes(texts: list[str]) -> dict[str, int]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, equals, _) in zip(texts, pairs, strict=True) if not equals]:
        raise ConfigError(f"--max-memory {wrong[0]} names no device.", "Write cpu=20GB, or 0=40GiB for the first GPU.")
    return {device: parse_bytes(size) for device, _, size in pairs}


def _absolute(thresholds: list[str]) -> tuple[float, ...]:
    parsed = [parse_threshold(text) for text in thresholds]
    if any(kind != "absolute" for _, kind in parsed):
        raise AvssError(
            "--threshold counts absolute values; multiples of the RMS are always scored.", "Write 1e-4, say."
        )
    return tuple(value for value, _ in parsed)


def _outcome(run: Run) -> str:
    if run.status == "failed":
        return f"{run.run_id}: failed. {run.error}"
    if run.status == "skipped":
        return f"{run.run_id}: done before, nothing to do (--fresh measures again)."
    kept = f", {run.resumed_shards} of {run.num_shards} shards from before" if run.resumed_shards else ""
    return f"{run.run_id}: {run.num_tokens:,} tokens in {run.seconds:.1f} s{kept}."


def _choose_runs(warehouse: Warehouse, run_ids: list[str]) -> list[dict[str, Any]]:
    """The named runs, or the newest one that is done."""
    every = warehouse.runs().to_pylist(maps_as_pydicts="strict")
    rows = [row for row in every if row["status"] == "done"]
    by_id, failed = {row["run_id"]: row for row in rows}, {r["run_id"]: r for r in every if r["status"] != "done"}
    if not rows:
        raise QueryError(f"{warehouse.root} has no finished run.", "avss score makes one.")
    for run_id in run_ids:
        if run_id in failed:
            raise QueryError(f"Run '{run_id}' failed: {failed[run_id]['error']}", "Mend that and run avss score again.")
        require_known("run", run_id, sorted(by_id), QueryError)
    return [by_id[run_id] for run_id in run_ids] or [max(rows, key=lambda row: row["created_at"])]


def _choose_scores(
    warehouse: Warehouse, runs: list[dict[str, Any]], site: str, recipe: str, threshold: str
) -> list[dict[str, Any]]:
    require_known("site", site, SITES)
    require_known("recipe", recipe, RECIPES)
    value, kind = parse_threshold(threshold)
    rows = warehouse.table("scores", run_ids=[run["run_id"] for run in runs]).to_pylist()
    scored = sorted({f"{row['site']} {row['recipe']}" for row in rows})
    rows = [row for row in rows if (row["site"], row["recipe"]) == (site, recipe)]
    if not rows:
        raise QueryError(f"No scores of site '{site}' with recipe '{recipe}'.", f"Scored: {', '.join(scored)}.")
    wanted = [row for row in rows if (row["threshold"], row["threshold_kind"]) == (value, kind)]
    if not wanted:
        seen = sorted({(r["threshold_kind"], r["threshold"]) for r in rows})
        names = ", ".join(f"{t:g}{'rms' if k == 'rms' else ''}" for k, t in seen)
        raise QueryError(f"No scores at threshold {threshold}.", f"Scored: {names}.")
    return sorted(wanted, key=lambda row: (row["run_id"], row["layer"]))


RunOption = Annotated[str | None, typer.Option("--run", help="Which run; the newest by default.")]
RunsOption = Annotated[list[str] | None, typer.Option("--run", help="Which run; repeatable. The newest by default.")]
RecipeOption = Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}.")]
SiteOption = Annotated[str, typer.Option(help=f"{', '.join(SITES)}.")]
ThresholdOption = Annotated[str, typer.Option(help="Near zero means below this: 1e-5, or 0.1rms.")]


@app.command()
@explained
def show(
    warehouse: WarehousePath,
    run: RunOption = None,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = f"{PUBLISHED_THRESHOLD:g}",
) -> None:
    """Show a run's layers as a table with bars; the lowest 25% are marked."""
    from avss_dist.query import Warehouse
    from avss_dist.report.table import layer_table

    opened = Warehouse(warehouse)
    runs = _choose_runs(opened, [run] if run else [])
    _console().print(layer_table(runs[0], _choose_scores(opened, runs, site, recipe, threshold)))
    others = opened.runs().num_rows - 1
    if others and not run:
        print(f"{others} more in {warehouse}: avss query {warehouse} 'SELECT run_id, model, status FROM runs'")


@app.command()
@explained
def plot(
    warehouse: WarehousePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.png, .svg or .html.")],
    run: RunsOption = None,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = f"{PUBLISHED_THRESHOLD:g}",
) -> None:
    """Draw scores by depth, the rivals beside them."""
    from avss_dist.query import Warehouse
    from avss_dist.report.chart import layers_chart, save_chart

    opened = Warehouse(warehouse)
    runs = _choose_runs(opened, run or [])
    save_chart(layers_chart(runs, _choose_scores(opened, runs, site, recipe, threshold)), output)
    print(output)


@app.command()
@explained
def query(
    warehouse: WarehousePath,
    sql: Annotated[str, typer.Argument(help="One SELECT over runs, scores, layer_stats, shard_stats, evaluations.")],
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")] = FORMATS[0],
) -> None:
    """Query a warehouse with SQL (DuckDB). It only reads, and only the warehouse."""
    require_known("format", format, FORMATS)
    from avss_dist.query import Warehouse
    from avss_dist.report.output import write_table

    if format == "parquet" and sys.stdout.isatty():
        raise QueryError(
            "Parquet is not for a terminal.", "Redirect it: avss query ... --format parquet > result.parquet"
        )
    write_table(Warehouse(warehouse).sql(sql), format, _console())


@app.command()
@explained
def doctor() -> int:
    """Say what works here: devices, Ray, DeepSpeed, versions."""
    from avss_dist.report.doctor import findings

    console = _console()
    works = True
    for what, fine, seen in findings():
        works &= fine
        console.print(f"[{'green' if fine else 'red'}]{'ok ' if fine else 'NO '}[/] {what:<24}", end="")
        console.print(seen, markup=False)
    return 0 if works else 1


if __name__ == "__main__":
    main()
