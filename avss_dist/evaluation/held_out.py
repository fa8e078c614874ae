"""Held-out text: the texts that the scores, the search or the repair of a model have read, and one check of tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.core.names import SEARCH
from avss_dist.core.settings import Settings
from avss_dist.corpus.overlap import SHORTEST, plain_text, shared_text
from avss_dist.corpus.shards import CorpusPlan, Shard, tokenize_corpus
from avss_dist.distillation.record import SELF, read_record
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.pruning.repair.record import read_repairs
from avss_dist.tasks.base import Task, TextLoss
from avss_dist.tasks.truthfulqa import TruthfulChoices
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

OTHER_QUESTIONS = "Use other text there, or other questions."
MOST_SHARED = 0.03  # of the passages of a text; what other rows of one text repeat is less
_OLD_ROWS = {"row_start": "none"}  # of rows that were read before the setting was there


@dataclass(frozen=True, eq=False, kw_only=True)
class SeenText:
    """A text that scores, a search or a repair have read, so that it is not held out.

    Attributes:
        use: end of a sentence that begins with the text: ``the scores of RUN were measured on``.
        name: the text.
        rows: index of the end of its rows, the value of `skip` that passes them.
        read: returns its rows, read again if necessary; raises ConfigError if that is not possible.
        load_tokenizer: loads the tokenizer of its rows.
        skip: field of the evaluation that skips rows of a text.
        ask_others: hint where questions are shared, with ``{}`` for the number of prompts; "" compares no questions.
    """

    use: str
    name: str = ""
    rows: int
    read: Callable[[], Sequence[Shard]]
    load_tokenizer: Callable[[], Any]
    skip: str = "skip_sequences"
    ask_others: str = OTHER_QUESTIONS

    @cached_property
    def shards(self) -> Sequence[Shard]:
        """Rows of the text."""
        return self.read()

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the text and of the tasks."""
        return self.load_tokenizer()

    def refuse(self, task: Task) -> None:
        """Refuse a task on the text or on questions in it; tasks of lm-evaluation-harness pass.

        Raises:
            ConfigError: they share text or questions, cannot be compared, or the text cannot be read again.
        """
        if (questions := _questions(task)) and self.ask_others:
            self._refuse_questions(task, _prompts(questions, self.tokenizer))
        if text := _text(task):
            self._refuse_text(task, shared_text(self.shards, text, self.tokenizer))

    def _refuse_questions(self, task: Task, questions: set[str]) -> None:
        prompts = _prompts(self.shards, self.tokenizer)
        if shared := len(prompts & questions):
            raise ConfigError(
                f"{shared} of the {len(questions)} questions of {task.name} are prompts that {self.use}.",
                self.ask_others.format(len(prompts)),
            )

    def _refuse_text(self, task: Task, shared: float | None) -> None:
        named = f"{self.use} ({self.name})" if self.name else self.use
        if shared is None:
            raise ConfigError(
                f"{task.name} cannot be compared with the text that {named}: one of them has no {SHORTEST} characters "
                "in a row, without whitespace.",
                "Read more text, or longer rows (`sequence_length`); or set `allow_overlap` and know that they may be "
                "one.",
            )
        if shared > MOST_SHARED:
            hint = f"Use other text: another corpus, or `{self.skip}` {self.rows}."
            raise ConfigError(f"{shared:.0%} of {task.name} is text that {named}.", hint)


def refuse_overlap(tasks: Iterable[Task], texts: Iterable[SeenText]) -> None:
    """Refuse tasks on text or on questions that have been seen.

    Raises:
        ConfigError: a task overlaps with a text, or cannot be compared with it.
    """
    if not (tasks := [task for task in tasks if _questions(task) or _text(task)]):
        return
    texts = list(texts)
    for task in tasks:
        for text in texts:
            text.refuse(task)


def _questions(task: Task) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, TruthfulChoices)]


def _text(task: Task) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, TextLoss)]


def texts_of_run(
    store: Warehouse, run_id: str | None, checkpoint: Checkpoint, *, corpus: str = "", skip: str = "skip_sequences"
) -> Iterator[SeenText]:
    """Yield the text that the scores of a run were measured on; empty if the warehouse does not have the run.

    Args:
        corpus: the text with the keys of its URI; by default the text in the run's row, which has no keys.
        skip: see `SeenText`.
    """
    run = store.run(run_id) if run_id else None
    if run is None:
        return
    prints = tuple(filter(None, (run["corpus_fingerprint"], run["tokens_fingerprint"])))
    source = _Source(checkpoint, corpus or run["corpus"], Settings(**_OLD_ROWS | settings_of(run)))
    yield SeenText(
        use=f"the scores of {run_id} were measured on",
        name=run["corpus"],
        rows=run["num_sequences"],
        read=partial(source.read_again, f"run {run_id}", "layers may be chosen on", prints),
        load_tokenizer=source.tokenizer,
        skip=skip,
        ask_others="Ask others: with `skip_questions` {}, where the run is of the first questions of the file.",
    )


def texts_of_search(store: Warehouse, evaluation: str | None, checkpoint: Checkpoint) -> Iterator[SeenText]:
    """Yield the text that a set of layers was searched on; empty if the warehouse does not have the evaluation."""
    rows = store.table("evaluations", run_ids=[evaluation]).to_pylist() if evaluation else []
    if not rows:
        return
    options, corpus = settings_of(rows[0]), rows[0]["task"].removeprefix(SEARCH)
    skipped = options.pop("skip_sequences")
    source = _Source(checkpoint, corpus, Settings(**_OLD_ROWS | options), skipped)
    yield SeenText(
        use="the layers of a plan were searched on",
        rows=skipped + rows[0]["num_samples"],
        read=partial(source.read_again, "the search of a plan", "layers may be chosen for"),
        load_tokenizer=source.tokenizer,
        ask_others="",
    )


def texts_of_repair(checkpoint: Checkpoint) -> Iterator[SeenText]:
    """Yield the texts that a checkpoint was repaired or distilled on; empty for a checkpoint without such records.

    Raises:
        ModelError: a record is damaged.
    """
    yield from _texts_of_distillation(checkpoint)
    fit = f"the repair of '{checkpoint.name}'"
    for repair in read_repairs(checkpoint.folder):
        for text in repair.texts:
            source = _Source(checkpoint, text.corpus, repair.reading(), repair.skip_sequences)
            yield SeenText(
                use=f"{fit} was fitted on ({text.corpus})",
                rows=repair.skip_sequences + text.rows,
                read=partial(source.read_again, fit, "it may be fitted to", (text.fingerprint,)),
                load_tokenizer=source.tokenizer,
            )


def _texts_of_distillation(checkpoint: Checkpoint) -> Iterator[SeenText]:
    """Yield the texts that a checkpoint was distilled on, but for text that its teacher wrote."""
    record = read_record(checkpoint.folder)
    training = f"the distillation of '{checkpoint.name}'"
    for text in record.texts if record else ():
        if record is None or not text.trained_rows or text.corpus == SELF:
            continue
        skipped = record.skip_sequences + text.held_out_rows
        settings = replace(record.settings, max_sequences=text.trained_rows)
        source = _Source(checkpoint, text.corpus, settings, skipped)
        yield SeenText(
            use=f"'{checkpoint.name}' was distilled on ({text.corpus})",
            rows=skipped + text.trained_rows,
            read=partial(source.read_again, training, "it is trained on", (text.fingerprint,)),
            load_tokenizer=source.tokenizer,
        )


def text_of_fit(text: CorpusPlan, skipped: int, checkpoint: Checkpoint, *, trust_remote_code: bool) -> SeenText:
    """Return a text that a repair is about to be fitted on, after ``skipped`` rows."""
    return SeenText(
        use=f"the repair is fitted on ({text.source})",
        rows=skipped + text.num_sequences,
        read=lambda: text.shards,
        load_tokenizer=partial(load_tokenizer, checkpoint, trust_remote_code=trust_remote_code),
    )


def as_task(text: CorpusPlan) -> Task:
    """Return a text as a task, which can be compared with other texts."""
    return Task(name=text.source, parts=tuple(map(TextLoss, text.shards)))


@dataclass(frozen=True)
class _Source:
    """The source of rows: a text, the settings to read it with, and the number of skipped rows."""

    checkpoint: Checkpoint
    corpus: str
    settings: Settings
    skipped: int = 0

    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint)

    def read_again(self, user: str, risk: str, prints: Collection[str] = ()) -> Sequence[Shard]:
        """Read the rows again that ``user`` has read.

        Args:
            risk: clause of the hint that names the risk of no comparison, such as ``it may be fitted to``.
            prints: earlier fingerprints of its content or its tokens; the text has changed if it has none of
                them.
        """
        hint = f"Put it back, or set `allow_overlap` and know that {risk} this very text."
        try:
            text = tokenize_corpus(self.corpus, self.tokenizer(), self.settings, skip_sequences=self.skipped)
        except AvssError as error:
            raise ConfigError(f"The text of {user} cannot be read again: {error.message}", hint) from error
        if prints and not {text.corpus_fingerprint, text.tokens_fingerprint} & {*prints}:
            raise ConfigError(f"The text of {user} has changed since it was read: {text.source}.", hint)
        return text.shards


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
