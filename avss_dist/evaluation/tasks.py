"""Tasks of a checkpoint, by their names."""

from __future__ import annotations

from avss_dist.core.errors import CorpusError
from avss_dist.core.names import PERPLEXITY, ROW_START, TRUTHFULQA
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.chats import chat_template
from avss_dist.corpus.shards import CorpusPlan, tokenize_choices, tokenize_corpus, with_other_start
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.options import DEFAULT_PROMPT, PromptOptions
from avss_dist.tasks.base import Task, TextLoss
from avss_dist.tasks.row_start import RowStartLoss
from avss_dist.tasks.truthfulqa import TruthfulChoices

COMPARED_ROWS = 4  # of a text, with two starts


def make_task(
    checkpoint: Checkpoint,
    name: str,
    settings: Settings,
    *,
    skip_sequences: int = 0,
    skip_questions: int = 0,
    limit: int | None = None,
    prompting: PromptOptions = DEFAULT_PROMPT,
) -> Task:
    """Return a task by its name.

    Raises:
        AvssError: there is none such, or its data could not be loaded.
    """
    if name.startswith(PERPLEXITY):
        corpus = RedactedURI(name).full.removeprefix(PERPLEXITY)
        return text_task(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    if name.startswith(TRUTHFULQA):
        questions = slice(skip_questions, None if limit is None else skip_questions + limit)
        return choices_task(checkpoint, RedactedURI(name).full.removeprefix(TRUTHFULQA), settings, questions)
    from avss_dist.tasks.harness import harness_task

    code, template = settings.trust_remote_code, None
    if prompting.apply_chat_template:
        template = chat_template(load_tokenizer(checkpoint, trust_remote_code=code))
    return harness_task(name, limit=limit, prompting=prompting, template=template, trust_remote_code=code)


def plan_text(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> CorpusPlan:
    """Read the rows of a corpus after the first ``skip_sequences``, in the checkpoint's tokens.

    Raises:
        CorpusError: it cannot be read, is too short, or has nothing to predict.
    """
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    text = tokenize_corpus(corpus, tokenizer, settings, skip_sequences=skip_sequences)
    if max(int(shard.lengths.max()) for shard in text.shards) <= max(1, settings.skip_first_tokens):
        raise CorpusError(
            f"No row of {RedactedURI(corpus)} has a token that is predicted from others before it and counts.",
            "Make `sequence_length` at least 2, and larger than `skip_first_tokens`; or take longer documents.",
        )
    return text


def text_task(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> Task:
    """Return the task of the loss on a corpus, in the checkpoint's tokens.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    text = plan_text(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    return Task(name=f"{PERPLEXITY}{RedactedURI(corpus)}", parts=tuple(TextLoss(shard) for shard in text.shards))


def row_start_task(checkpoint: Checkpoint, text: Task, settings: Settings) -> Task | None:
    """Return the task of comparing two starts of the first rows of a `text_task`, or None where there is only one."""
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    first = next(part.shard for part in text.parts if isinstance(part, TextLoss))
    shards = with_other_start(first, tokenizer, settings, COMPARED_ROWS)
    if shards is None:
        return None
    return Task(name=f"{ROW_START}{text.name.removeprefix(PERPLEXITY)}", parts=(RowStartLoss(*shards),))


def choices_task(checkpoint: Checkpoint, path: str, settings: Settings, questions: slice = slice(None)) -> Task:
    """Return the task of multiple choice on some questions of a file of TruthfulQA.

    Raises:
        CorpusError: it cannot be read, or a row is too long.
    """
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    parts = tuple(TruthfulChoices(shard) for shard in tokenize_choices(path, tokenizer, settings, questions))
    return Task(name=f"{TRUTHFULQA}{RedactedURI(path)}", parts=parts)
