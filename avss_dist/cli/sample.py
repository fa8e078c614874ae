"""`avss sample`: text that a model generates."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

from avss_dist.cli.options import TEXT_FORMATS, takes
from avss_dist.core.errors import ConfigError
from avss_dist.requests import SampleRequest
from avss_dist.system.streams import emit, emit_json, say


@takes(SampleRequest, TEXT_FORMATS)
def sample(format: str, **values: Any) -> None:
    """Let a causal language model write texts to fit a repair on, if no text of its domain is available.

    A stopped command continues when it is run again: texts are kept in OUTPUT.part until it ends.
    """
    from avss_dist.models.checkpoints import resolve
    from avss_dist.models.sampling import sample as batches_of
    from avss_dist.system.journal import Journal

    request = SampleRequest(**values)
    output, settings = Path(request.output), request.settings
    if output.exists():
        raise ConfigError(f"{output} exists already.", "Name another file with `output`.")
    checkpoint = resolve(str(request.model), trust_remote_code=settings.trust_remote_code)
    how: dict[str, Any] = {"count": request.count, "prompt": request.prompt, "seed": request.seed}
    with Journal(
        output.with_name(output.name + ".part"), {"checkpoint": checkpoint.revision, **how, **settings.as_dict()}
    ) as journal:
        if journal.batches:
            say(f"Continuing after {sum(map(len, journal.batches)):,} texts that were written before.")
        for batch in batches_of(checkpoint, settings, first=len(journal.batches), **how):
            journal.add(batch)
        texts = list(chain.from_iterable(journal.batches))
        if not texts:
            raise ConfigError("The model generated no text.", "Give another `prompt`, or a larger `count`.")
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        output.write_text("".join(lines), encoding="utf-8")
        journal.remove()
    if format == "json":
        emit_json({"output": str(output), "texts": len(texts), "model": checkpoint.name, "corpus": f"{output}:text"})
    else:
        emit(f"{output}: {len(texts):,} texts that {checkpoint.name} wrote. As a corpus: {output}:text")
