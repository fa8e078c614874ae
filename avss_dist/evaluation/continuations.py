"""Continuations of a few prompts by a whole model and by smaller ones, for people to read side by side.

Each continuation is a cell. Their texts are written into the table ``continuations``, under the run whose scores chose
the layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Intervention, InterventionKey
from avss_dist.core.names import CONTINUATION
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.tokens import special_tokens_around
from avss_dist.evaluation.session import EvaluationSession, PlacedModel, PlannedTask
from avss_dist.evaluation.tasks import plan_text
from avss_dist.models.loading import load_tokenizer
from avss_dist.tasks.base import Task
from avss_dist.tasks.continuation import ContinuePrompt
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

PROMPTS = 3  # by default
PROMPT_TOKENS = 32  # at most half a row

Prompt = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model that continues the prompts.

    Attributes:
        label: name for people.
        task: from `plan_continuations`.
        intervention: change of the task's model.
        described: key of the whole change since the scored model; by default that of the intervention.
    """

    label: str
    task: PlannedTask
    intervention: Intervention
    described: InterventionKey | None = None


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A continuation of a prompt by one model.

    Attributes:
        variant: name of the model for people.
        prompt, text: texts without special tokens.
        key: change of the scored model.
    """

    variant: str
    prompt: str
    text: str
    key: InterventionKey

    def row(self) -> dict[str, Any]:
        """Return a row of ``continuations``, without the columns of RunIdentity and the time."""
        return {**self.key.row(), "variant": self.variant, "prompt": self.prompt, "text": self.text}


def held_out_prompts(model: PlacedModel, texts: Sequence[str], *, skip_sequences: int) -> list[Prompt]:
    """Return the starts of the first rows after the skipped ones, of each text in turn."""
    tokens = min(PROMPT_TOKENS, model.settings.sequence_length // 2)
    reading = model.reading(PROMPTS).settings
    rows = [list(_rows(model, text, reading, skip_sequences)) for text in texts]
    in_turn = (row for same_place in zip_longest(*rows) for row in same_place if row is not None)
    return [tuple(row[:tokens].tolist()) for row in islice(in_turn, PROMPTS)]


def _rows(model: PlacedModel, text: str, settings: Any, skip_sequences: int) -> Iterator[np.ndarray]:
    for shard in plan_text(model.checkpoint, text, settings, skip_sequences=skip_sequences).shards:
        yield from (ids[:length] for ids, length in zip(shard.input_ids, shard.lengths, strict=True))


def given_prompts(model: PlacedModel, texts: Sequence[str]) -> list[Prompt]:
    """Return texts as prompts, after the special tokens with which the tokenizer begins a text."""
    tokenizer = _tokenizer(model)
    prefix = special_tokens_around(tokenizer).prefix.tolist()
    return [(*prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def plan_prompts(
    model: PlacedModel, given: Sequence[str], texts: Sequence[str], *, skip_sequences: int
) -> tuple[list[Prompt], str | None]:
    """Return the prompts to continue, and a note if there are none.

    Args:
        given: prompts of the user; without any, the prompts are starts of held-out rows.
        texts: texts of the held-out rows.
    """
    if given:
        return given_prompts(model, given), None
    if PARTITIONS[partition := model.placement.partition].layerwise:
        return [], f"No text was continued: `partition` {partition} reads the weights for every token. Name a prompt."
    return held_out_prompts(model, texts, skip_sequences=skip_sequences), None


def plan_continuations(model: PlacedModel, prompts: Sequence[Prompt], max_tokens: int) -> PlannedTask:
    """Return the task of continuing prompts, a part for each."""
    parts = tuple(ContinuePrompt(prompt, max_tokens) for prompt in prompts)
    return model.plan(Task(name=CONTINUATION, parts=parts))


def measure_continuations(
    session: EvaluationSession, variants: Iterable[Variant]
) -> tuple[list[Continuation], str | None]:
    """Return the continuations of every prompt by every variant, and a note if a model does not generate text.

    Continuations that the warehouse has are not generated again.

    Raises:
        AvssError: a failure of workers or of the warehouse.
    """
    variants = list(variants)
    try:
        session.run(cell for variant in variants for cell in variant.task.cells([variant.intervention]))
    except ModelError as error:
        return [], f"No text was continued. {error.message}"
    return [continuation for variant in variants for continuation in _read(session, variant)], None


def _read(session: EvaluationSession, variant: Variant) -> Iterator[Continuation]:
    """Yield the stored continuations of a variant, in the order of the prompts."""
    planned, key = variant.task, variant.intervention.key
    tokenizer = _tokenizer(planned)
    stored = session.rows(planned.run_id(variant.intervention))
    samples = {row["part"]: row["samples"] for row in stored if InterventionKey.of_row(row) == key}
    for number, part in enumerate(planned.task.parts):
        assert isinstance(part, ContinuePrompt)
        prompt, text = (
            tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)
            for tokens in (part.prompt, samples[number])
        )
        yield Continuation(variant=variant.label, prompt=prompt, text=text, key=variant.described or key)


def _tokenizer(model: PlacedModel | PlannedTask) -> Any:
    return load_tokenizer(model.checkpoint, trust_remote_code=model.settings.trust_remote_code)


def write_continuations(store: Store, run_id: str, continuations: Sequence[Continuation]) -> None:
    """Write the continuations of the models that were made of a run, in place of those of equal changes and prompts."""
    if not continuations:
        return
    run = Warehouse(store.root.full).run(run_id)
    assert run is not None
    identity = RunIdentity(run_id=run_id, model=run["model"], revision=run["revision"], family=run["family"])
    rows = [continuation.row() for continuation in continuations]
    models = sorted({json.dumps(continuation.key.row()) for continuation in continuations})
    name = fingerprint(prompts=sorted({row["prompt"] for row in rows}), models=models)
    now = datetime.now(UTC)
    store.write_continuations(identity, name[:20], [{**row, "created_at": now} for row in rows])
