"""Continuations of a few prompts by a whole model and by smaller ones, for people to read side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import Intervention, InterventionKey
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.tasks.task import Task
from avss_dist.tasks.text_loss import ContinuePrompt
from avss_dist.warehouse.names import CONTINUATION

PROMPTS = 3
PROMPT_TOKENS = 32
"""Tokens of a prompt, at most half a row."""
NEW_TOKENS = 48

Prompt = tuple[int, ...]


Continuation = dict[str, str]
"""A continuation of a prompt by one model: its ``prompt``, the name of the ``model`` for people, and the ``text``.

The texts have no special tokens.
"""


def held_out_prompts(model: PlacedModel, texts: Sequence[str], *, skip_sequences: int) -> list[Prompt]:
    """Return the starts of the first rows after the skipped ones, of each text in turn.

    A partition that reads all weights for every token gets no prompts.
    """
    if PARTITIONS[model.placement.partition].layerwise:
        return []
    tokens = min(PROMPT_TOKENS, model.settings.sequence_length // 2)
    reading = model.reading(max_sequences=PROMPTS, skip_sequences=skip_sequences).settings
    starts: list[list[Prompt]] = []
    for text in texts:
        of_text: list[Prompt] = []
        for shard in plan_text(model.checkpoint, text, reading).shards:
            for ids, length in zip(shard.input_ids, shard.lengths, strict=True):
                of_text.append(tuple(ids[: min(length, tokens)].tolist()))
        starts.append(of_text)
    in_turn: list[Prompt] = []
    for number in range(PROMPTS):
        in_turn += [of_text[number] for of_text in starts if number < len(of_text)]
    return in_turn[:PROMPTS]


def plan_continuations(model: PlacedModel, prompts: Sequence[Prompt]) -> PlannedTask:
    """Return the task of continuing prompts."""
    parts = tuple(ContinuePrompt(ids, NEW_TOKENS) for ids in prompts)
    return model.plan(Task(name=CONTINUATION, parts=parts))


def continue_prompts(
    session: EvaluationSession, model: PlacedModel, prompts: Sequence[Prompt], variants: Mapping[str, Intervention]
) -> tuple[list[Continuation], list[str]]:
    """Return the greedy continuations of every prompt under every intervention, and a note if no text is generated.

    Continuations that the warehouse has are not generated again.

    Args:
        variants: interventions by the name of the model for people.

    Raises:
        AvssError: a failure of workers or of the warehouse.
    """
    planned = plan_continuations(model, prompts)
    try:
        session.run(planned.cells(variants.values()))
    except ModelError as error:
        return [], [f"No text was continued. {error.message}"]
    tokenizer = load_tokenizer(model.checkpoint)
    continuations = []
    for variant, intervention in variants.items():
        generated = {}
        for row in session.store.cells.read(planned.run_id(intervention)).to_pylist():
            if InterventionKey.of_row(row) == intervention.key:
                generated[row["part"]] = [int(token) for token in row["samples"]]
        for number, ids in enumerate(prompts):
            prompt = tokenizer.decode(list(ids), skip_special_tokens=True)
            text = tokenizer.decode(generated[number], skip_special_tokens=True)
            continuations.append({"prompt": prompt, "model": variant, "text": text})
    return continuations, []
