"""`avss sample`: text that a model writes itself."""

from __future__ import annotations

import json
from itertools import chain
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
from avss_dist.system.streams import emit, emit_json, say

READING = ("sequence_length", "batch_size", "dtype", "attention", "device")


@takes_settings(*READING)
def sample(
    model: ModelArgument,
    output: Annotated[Path, output_option("JSON lines file with a field text; read it as FILE.jsonl:text.")],
    count: Annotated[int, typer.Option(help="Texts.", min=1)] = 512,
    prompt: Annotated[str | None, typer.Option(help="Start of each text; by default the model's start token.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    trust_remote_code: CodeOption = False,
    format: TextFormatOption = TEXT_FORMATS[0],
    **options: Any,
) -> None:
    """Let a causal language model write texts to fit a repair on, where no text of its later domains is at hand.

    Stopped before it ended, the same command goes on: what was written is kept in OUTPUT.part until then.
    """
    from avss_dist.models.checkpoints import resolve
    from avss_dist.models.sampling import sample as batches_of
    from avss_dist.system.journal import Journal

    if output.exists():
        raise ConfigError(f"{output} exists.", "Name another file with `output`.")
    settings = Settings(**options, trust_remote_code=trust_remote_code)
    checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    identity = {"checkpoint": checkpoint.revision, "count": count, "prompt": prompt, "seed": seed, **settings.as_dict()}
    with Journal(output.with_name(output.name + ".part"), identity) as journal:
        if journal.batches:
            say(f"Going on after {sum(map(len, journal.batches)):,} texts that were written before.")
        first = len(journal.batches)
        for batch in batches_of(checkpoint, settings, count=count, prompt=prompt, seed=seed, first=first):
            journal.add(batch)
        texts = list(chain.from_iterable(journal.batches))
        if not texts:
            raise ConfigError("The model wrote no word.", "Give another `prompt`, or a larger `count`.")
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        output.write_text("".join(lines), encoding="utf-8")
        journal.remove()
    if format == "json":
        emit_json({"output": str(output), "texts": len(texts), "model": checkpoint.name, "corpus": f"{output}:text"})
    else:
        emit(f"{output}: {len(texts):,} texts that {checkpoint.name} wrote. As a corpus: {output}:text")
