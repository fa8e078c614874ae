"""`avss sample`: text that a model writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from avss_dist.cli.options import CodeOption, ModelArgument, takes_settings
from avss_dist.errors import ConfigError
from avss_dist.settings import Settings
from avss_dist.system.streams import emit

READING = ("sequence_length", "batch_size", "dtype", "attention", "device")


@takes_settings(*READING)
def sample(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="File of JSON lines, with a field text; read it as OUT.jsonl:text.")],
    count: Annotated[int, typer.Option(help="Texts.", min=1)] = 512,
    prompt: Annotated[
        str | None, typer.Option(help="What each begins with; by default the token that texts begin with.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    trust_remote_code: CodeOption = False,
    **options: Any,
) -> None:
    """Let a causal language model write texts, to fit a repair on where the domains that it will meet are not known."""
    from avss_dist.models.checkpoints import resolve
    from avss_dist.models.sampling import sample as texts_of

    if out.exists():
        raise ConfigError(f"{out} exists.", "Name another file with `out`.")
    settings = Settings(**options, trust_remote_code=trust_remote_code)
    checkpoint = resolve(model, trust_remote_code=trust_remote_code)
    texts = list(texts_of(checkpoint, settings, count=count, prompt=prompt, seed=seed))
    if not texts:
        raise ConfigError("The model wrote no word.", "Give another `prompt`, or a larger `count`.")
    out.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    emit(f"{out}: {len(texts):,} texts that {checkpoint.name} wrote. As a corpus: {out}:text")
