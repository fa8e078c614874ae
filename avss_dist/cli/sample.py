"""`avss sample`: text that a model writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from avss_dist.cli.options import (
    TEXT_FORMATS,
    CodeOption,
    ModelArgument,
    TextFormatOption,
    output_option,
    takes_settings,
)
from avss_dist.errors import ConfigError
from avss_dist.settings import Settings
from avss_dist.system.streams import emit, emit_json

READING = ("sequence_length", "batch_size", "dtype", "attention", "device")


@takes_settings(*READING)
def sample(
    model: ModelArgument,
    output: Annotated[Path, output_option("File of JSON lines, with a field text; read it as FILE.jsonl:text.")],
    count: Annotated[int, typer.Option(help="Texts.", min=1)] = 512,
    prompt: Annotated[
        str | None, typer.Option(help="What each begins with; by default the token that texts begin with.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    trust_remote_code: CodeOption = False,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> None:
    """Let a causal language model write texts, to fit a repair on where the domains that it will meet are not known."""
    from avss_dist.models.checkpoints import resolve
    from avss_dist.models.sampling import sample as texts_of

    if output.exists():
        raise ConfigError(f"{output} exists.", "Name another file with `output`.")
    settings = Settings(**options, trust_remote_code=trust_remote_code)
    checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    texts = list(texts_of(checkpoint, settings, count=count, prompt=prompt, seed=seed))
    if not texts:
        raise ConfigError("The model wrote no word.", "Give another `prompt`, or a larger `count`.")
    output.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )
    if format == "json":
        emit_json({"output": str(output), "texts": len(texts), "model": checkpoint.name, "corpus": f"{output}:text"})
    else:
        emit(f"{output}: {len(texts):,} texts that {checkpoint.name} wrote. As a corpus: {output}:text")
