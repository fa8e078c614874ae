"""Options that several commands take, and how their texts are read."""

from __future__ import annotations

from typing import Annotated

import typer

from avss_dist.errors import AvssError, ConfigError
from avss_dist.settings import RECIPES, SITES
from avss_dist.text import parse_bytes, parse_threshold

WarehousePath = Annotated[str, typer.Argument(help="Warehouse: a folder, or an s3://, gs://, hdfs:// URI.")]
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
ExecutorOption = Annotated[str, typer.Option(help="auto, local (this process), ray.")]
ReplicasOption = Annotated[int | None, typer.Option(help="Model copies that work in parallel.")]
AddressOption = Annotated[str | None, typer.Option(help="A running Ray cluster.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Measure again what is done already.")]
RunOption = Annotated[str | None, typer.Option("--run", help="Which run; the newest by default.")]
EveryRunOption = Annotated[
    list[str] | None,
    typer.Option("--run", help="Which run, or a glob such as 'smollm2-*'; repeatable. All by default."),
]
RunsOption = Annotated[
    list[str] | None, typer.Option("--run", help="Which run, or a glob; repeatable. The newest by default.")
]
RecipeOption = Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}.")]
SiteOption = Annotated[str, typer.Option(help=f"{', '.join(SITES)}.")]
ThresholdOption = Annotated[str, typer.Option(help="Near zero means below this: 1e-5, or 0.1rms.")]


def sizes(texts: list[str]) -> dict[str, int]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (_, equals, _) in zip(texts, pairs, strict=True) if not equals]:
        raise ConfigError(f"--max-memory {wrong[0]} names no device.", "Write cpu=20GB, or 0=40GiB for the first GPU.")
    return {device: parse_bytes(size) for device, _, size in pairs}


def absolute(thresholds: list[str]) -> tuple[float, ...]:
    parsed = [parse_threshold(text) for text in thresholds]
    if any(kind != "absolute" for _, kind in parsed):
        raise AvssError(
            "--threshold counts absolute values; multiples of the RMS are always scored.", "Write 1e-4, say."
        )
    return tuple(value for value, _ in parsed)
