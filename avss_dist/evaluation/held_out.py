"""Held-out text: whether what is evaluated on is what the scores of a plan, or a repair, have seen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avss_dist.corpus.overlap import SHORTEST, plain_text, shared_text
from avss_dist.corpus.shards import Shard, tokenize_corpus
from avss_dist.errors import AvssError, ConfigError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.names import SEARCH
from avss_dist.pruning.repair.record import read_repairs
from avss_dist.settings import Settings
from avss_dist.tasks.base import Task, TextLoss
from avss_dist.tasks.truthfulqa import TruthfulChoices
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

OTHER_QUESTIONS = "Use other text there, or other questions."
MOST_SHARED = 0.03  # of the passages of a text; what other rows of one text repeat is less
_OLD_ROWS = {"row_start": "none"}  # of rows that were read before the setting was there


def refuse_overlap(
    task: Task,
    run_id: str,
    store: Warehouse,
    checkpoint: Checkpoint,
    *,
    corpus: str = "",
    skips: str = "skip_sequences",
) -> None:
    """Refuse a task on text that a run's scores were measured on; tasks without a corpus pass.

    Args:
        corpus: the text of the run, with the keys that reading it takes; by default as its row names it, without.
        skips: the field that says which rows of the task's text are not read.

    Raises:
        ConfigError: they share text, cannot be compared, or the run's text cannot be read again or has changed.
    """
    run = store.run(run_id)
    if not _shards(task) or run is None:
        return
    seen = _read_run(run, checkpoint, corpus)
    hint = f"Use other text: another corpus, or `{skips}` {run['num_sequences']}."
    _refuse_shared(task, seen, f"the scores of {run_id} were measured on ({run['corpus']})", hint)


def refuse_questions(task: Task, run_id: str, store: Warehouse, checkpoint: Checkpoint, *, corpus: str = "") -> None:
    """Refuse multiple choice on questions whose answers a run's scores were measured on.

    Args:
        corpus: as for `refuse_overlap`.

    Raises:
        ConfigError: there are some, or the run's text cannot be read again or has changed.
    """
    run = store.run(run_id)
    if not _choices(task) or run is None:
        return
    seen = _read_run(run, checkpoint, corpus)
    number = len(_prompts(seen.shards, seen.tokenizer))
    hint = f"Ask others: with `skip_questions` {number}, where the run is of the first questions of the file."
    _refuse_prompts(task, seen, f"the scores of {run_id} were measured on", hint)


def refuse_text(task: Task, text: Task, what: str, skip_sequences: int, tokenizer: Any) -> None:
    """Refuse a task on text or questions that ``what`` is fitted on; tasks of lm-evaluation-harness pass.

    Args:
        text: that text, as a task.
        skip_sequences: rows before it.
        tokenizer: the one that made the tokens of both.

    Raises:
        ConfigError: they share text, or cannot be compared.
    """
    seen, use = SeenText(_shards(text), tokenizer), f"{what} is fitted on ({text.name})"
    _refuse_prompts(task, seen, use, OTHER_QUESTIONS)
    rows = skip_sequences + sum(shard.num_sequences for shard in seen.shards)
    _refuse_shared(task, seen, use, f"Use other text: another corpus, or `skip_sequences` {rows}.")


def refuse_search_text(task: Task, evaluation: str, store: Warehouse, checkpoint: Checkpoint) -> None:
    """Refuse a task on text that a set of layers was searched on; tasks without a corpus pass.

    Args:
        evaluation: of the search.

    Raises:
        ConfigError: they share text, cannot be compared, or the search's text cannot be read again.
    """
    rows = store.table("evaluations", run_ids=[evaluation]).to_pylist() if _shards(task) else []
    if not rows:
        return
    options, corpus = settings_of(rows[0]), rows[0]["task"].removeprefix(SEARCH)
    skip = options.pop("skip_sequences")
    seen = _read_again(
        checkpoint, corpus, Settings(**_OLD_ROWS | options), skip, "the search of a plan", "layers may be chosen for"
    )
    hint = f"Use other text: another corpus, or `skip_sequences` {skip + rows[0]['num_samples']}."
    _refuse_shared(task, seen, "the layers of a plan were searched on", hint)


def refuse_repair_text(task: Task, checkpoint: Checkpoint) -> None:
    """Refuse a task on text or questions that a checkpoint's repair was fitted on; tasks of lm-evaluation-harness pass.

    Raises:
        ConfigError: they share text, cannot be compared, or the repair's text cannot be read again or has changed.
        ModelError: the record of the repair is damaged.
    """
    for repair in read_repairs(checkpoint.folder) if _shards(task) or _choices(task) else ():
        fit, skip = f"the repair of '{checkpoint.name}'", repair.skip_sequences
        for text in repair.texts:
            settings, prints = repair.reading(), (text.fingerprint,)
            seen = _read_again(checkpoint, text.corpus, settings, skip, fit, "it may be fitted to", prints)
            use = f"{fit} was fitted on ({text.corpus})"
            _refuse_prompts(task, seen, use, OTHER_QUESTIONS)
            _refuse_shared(task, seen, use, f"Use other text: another corpus, or `skip_sequences` {skip + text.rows}.")


@dataclass(frozen=True)
class SeenText:
    """Rows of text that scores, a search or a repair have seen, and the tokenizer that made them."""

    shards: Sequence[Shard]
    tokenizer: Any


def _refuse_shared(task: Task, seen: SeenText, use: str, hint: str) -> None:
    """Refuse a task on text of which too much is in ``seen``, or of which that cannot be told."""
    if not _shards(task):
        return
    shared = shared_text(seen.shards, _shards(task), seen.tokenizer)
    if shared is None:
        raise ConfigError(
            f"{task.name} cannot be compared with the text that {use}: one of them has no {SHORTEST} characters in a "
            "row, without whitespace.",
            "Read more text, or longer rows (`sequence_length`); or set `allow_overlap` and know that they may be one.",
        )
    if shared > MOST_SHARED:
        raise ConfigError(f"{shared:.0%} of {task.name} is text that {use}.", hint)


def _refuse_prompts(task: Task, seen: SeenText, use: str, hint: str) -> None:
    questions = _prompts(_choices(task), seen.tokenizer)
    if shared := len(_prompts(seen.shards, seen.tokenizer) & questions):
        raise ConfigError(f"{shared} of the {len(questions)} questions of {task.name} are prompts that {use}.", hint)


def _choices(task: Task) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, TruthfulChoices)]


def _shards(task: Task) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, TextLoss)]


def _read_run(run: Mapping[str, Any], checkpoint: Checkpoint, corpus: str) -> SeenText:
    """Read the text of a row of ``runs`` again."""
    prints = (run["corpus_fingerprint"], run["tokens_fingerprint"])
    settings, name = Settings(**_OLD_ROWS | settings_of(run)), f"run {run['run_id']}"
    return _read_again(
        checkpoint, corpus or run["corpus"], settings, 0, name, "layers may be chosen on", tuple(filter(None, prints))
    )


def _read_again(
    checkpoint: Checkpoint,
    corpus: str,
    settings: Settings,
    skip_sequences: int,
    user: str,
    risk: str,
    prints: Collection[str] = (),
) -> SeenText:
    """Read a text again that ``user`` has seen.

    Args:
        prints: fingerprints that it had, of its content or its tokens; it has changed where it has none of them.
    """
    tokenizer = load_tokenizer(checkpoint)
    hint = f"Put it back, or set `allow_overlap` and know that {risk} this very text."
    try:
        text = tokenize_corpus(corpus, tokenizer, settings, skip_sequences=skip_sequences)
    except AvssError as error:
        raise ConfigError(f"The text of {user} cannot be read again: {error.message}", hint) from error
    if prints and not {text.corpus_fingerprint, text.tokens_fingerprint} & {*prints}:
        raise ConfigError(f"The text of {user} has changed since it was read: {text.source}.", hint)
    return SeenText(text.shards, tokenizer)


def _prompts(shards: Iterable[Shard], tokenizer: Any) -> set[str]:
    """Return the prompts of paired text, each once, without whitespace."""
    return {
        text
        for shard in shards
        if shard.pairing
        for text in plain_text(
            [ids[:start] for ids, start in zip(shard.input_ids, shard.pairing.starts, strict=True)], tokenizer
        )
    }
