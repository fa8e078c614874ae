"""Tasks of a checkpoint by name, and the check that their text is held out from its scores, searches and repairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import chain, product
from typing import Any

from avss_dist.core.errors import AvssError, ConfigError, CorpusError
from avss_dist.core.registry import PERPLEXITY, ROW_START, TRUTHFULQA
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.documents import chat_template
from avss_dist.corpus.overlap import MAX_SHARED, SHORTEST, plain_text, shared_text
from avss_dist.corpus.shards import CorpusPlan, Shard, tokenize_choices, tokenize_corpus, with_other_start
from avss_dist.distillation.record import SELF, read_record
from avss_dist.evaluation.session import PlacedModel, PlannedTask
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer
from avss_dist.pruning.repair.registry import read_repairs
from avss_dist.tasks.harness_files import require_task
from avss_dist.tasks.task import Measure, Task
from avss_dist.tasks.text_loss import RowStartLoss, TextLoss, TruthfulChoices
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

_tokenizer = lru_cache(maxsize=2)(load_tokenizer)  # of the texts that tasks are compared with
COMPARED_ROWS = 4  # rows of a text that are read with both starts


def plan_task(
    model: PlacedModel,
    name: str,
    *,
    skip_questions: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> PlannedTask:
    """Return the task with a name for a model, ready to be measured.

    Raises:
        AvssError: no task has this name, or its data cannot be loaded.
    """
    if name.startswith(PERPLEXITY):
        return plan_text_task(model, RedactedURI(name).full.removeprefix(PERPLEXITY))
    settings = model.settings
    if name.startswith(TRUTHFULQA):
        questions = slice(skip_questions, None if limit is None else skip_questions + limit)
        path = RedactedURI(name).full.removeprefix(TRUTHFULQA)
        choices = tokenize_choices(path, load_tokenizer(model.checkpoint), settings, questions)
        return model.plan(Task(name=f"{TRUTHFULQA}{RedactedURI(path)}", parts=tuple(map(TruthfulChoices, choices))))
    require_task(name)
    from avss_dist.tasks.harness import harness_task

    return model.plan(
        harness_task(
            name,
            limit=limit,
            num_fewshot=num_fewshot,
            template=chat_template(load_tokenizer(model.checkpoint)) if settings.chat_template else None,
            trust_remote_code=settings.trust_remote_code,
        )
    )


def plan_text(checkpoint: Checkpoint, corpus: str, settings: Settings) -> CorpusPlan:
    """Read the rows of a corpus in the checkpoint's tokens.

    Raises:
        CorpusError: the corpus cannot be read, is too short, or has no token to predict.
    """
    text = tokenize_corpus(corpus, load_tokenizer(checkpoint), settings)
    if max(int(shard.lengths.max()) for shard in text.shards) <= max(1, settings.skip_first_tokens):
        raise CorpusError(
            f"No row of {RedactedURI(corpus)} has a token that is predicted from others before it and counts.",
            "Make `sequence_length` at least 2, and larger than `skip_first_tokens`; or take longer documents.",
        )
    return text


def plan_text_task(
    model: PlacedModel, corpus: str, measure: Callable[[Shard], Measure] = TextLoss, prefix: str = PERPLEXITY
) -> PlannedTask:
    """Return the task of a measure of a corpus in a model's tokens, by default of the loss.

    Args:
        prefix: start of the name of the task, before that of the corpus.

    Raises:
        CorpusError: the corpus cannot be read, or is too short.
    """
    text = plan_text(model.checkpoint, corpus, model.settings)
    return model.plan(Task(name=f"{prefix}{RedactedURI(corpus)}", parts=tuple(map(measure, text.shards))))


def row_start_task(planned: PlannedTask) -> PlannedTask | None:
    """Return the task of comparing two starts of the first rows of a text, or None if rows have only one."""
    shards = with_other_start(
        _shards(planned.task, TextLoss)[0], load_tokenizer(planned.checkpoint), planned.settings, COMPARED_ROWS
    )
    if shards is None:
        return None
    name = f"{ROW_START}{planned.task.name.removeprefix(PERPLEXITY)}"
    return planned.plan(Task(name=name, parts=(RowStartLoss(shards),)))


@dataclass(frozen=True, eq=False, kw_only=True)
class SeenText:
    """A text that scores, a search or a repair have read, so that it is not held out.

    Attributes:
        use: end of a sentence that begins with the text: ``the scores of RUN were measured on (NAME)``.
        rows: index after its last row, the value of ``skip_option`` that skips all of its rows.
        read: returns its rows, read again if necessary, and raises ConfigError if that is not possible.
        checkpoint: checkpoint whose tokenizer made its rows.
        skip_option: field of the evaluation that skips rows of a text.
        questions_hint: hint for shared questions, with ``{}`` for the number of prompts; "" does not compare questions.
    """

    use: str
    rows: int
    read: Callable[[], Sequence[Shard]]
    checkpoint: Checkpoint
    skip_option: str = "skip_sequences"
    questions_hint: str = "Use other text there, or other questions."


def refuse_overlap(tasks: Iterable[Task], texts: Iterable[SeenText]) -> None:
    """Refuse tasks on text or questions that have been seen. Tasks of lm-evaluation-harness are not compared.

    Raises:
        ConfigError: a task and a text share passages or questions, or cannot be compared, or the text cannot be read
            again.
    """
    comparable = [task for task in tasks if _shards(task, TruthfulChoices) or _shards(task, TextLoss)]
    for task, earlier in product(comparable, texts if comparable else ()):
        if (asked := _shards(task, TruthfulChoices)) and earlier.questions_hint:
            prompts, questions = (
                _prompts(shards, _tokenizer(earlier.checkpoint)) for shards in (earlier.read(), asked)
            )
            if shared := len(prompts & questions):
                raise ConfigError(
                    f"{shared} of the {len(questions)} questions of {task.name} are prompts that {earlier.use}.",
                    earlier.questions_hint.format(len(prompts)),
                )
        if not (text := _shards(task, TextLoss)):
            continue
        share = shared_text(earlier.read(), text, _tokenizer(earlier.checkpoint))
        if share is None:
            raise ConfigError(
                f"{task.name} cannot be compared with the text that {earlier.use}: one of them has no {SHORTEST} "
                "characters in a row, without whitespace.",
                "Read more text, or longer rows (`sequence_length`); or set `allow_overlap` and know that they may be "
                "one.",
            )
        if share > MAX_SHARED:
            raise ConfigError(
                f"{share:.0%} of {task.name} is text that {earlier.use}.",
                f"Use other text: another corpus, or `{earlier.skip_option}` {earlier.rows}.",
            )


def _shards(task: Task, kind: type[TextLoss | TruthfulChoices]) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, kind)]


def texts_of_run(
    store: Warehouse,
    run_id: str | None,
    checkpoint: Checkpoint,
    *,
    corpus: str = "",
) -> Iterator[SeenText]:
    """Yield the text that the scores of a run were measured on, or nothing if the warehouse does not have the run.

    Args:
        corpus: name of the text with the keys of its URI; by default the name in the run's row, which has no keys.
    """
    run = store.run(run_id) if run_id else None
    if run is None:
        return
    settings = Settings.from_stored(settings_of(run))
    yield _stored_text(
        checkpoint,
        corpus or run["corpus"],
        settings,
        reader=f"run {run_id}",
        risk="layers may be chosen on",
        fingerprints=tuple(filter(None, (run["corpus_fingerprint"], run["tokens_fingerprint"]))),
        use=f"the scores of {run_id} were measured on ({run['corpus']})",
        rows=settings.skip_sequences + run["num_sequences"],
        questions_hint="Ask others: with `skip_questions` {}, where the run is of the first questions of the file.",
    )


def texts_of_search(store: Warehouse, evaluation: str | None, checkpoint: Checkpoint) -> Iterator[SeenText]:
    """Yield the text that a plan was searched, predicted or measured on, or nothing without the evaluation."""
    rows = store.table("evaluations", run_ids=[evaluation]).to_pylist() if evaluation else []
    if not rows:
        return
    settings, corpus = Settings.from_stored(settings_of(rows[0])), rows[0]["task"].partition(":")[2]
    yield _stored_text(
        checkpoint,
        corpus,
        settings,
        reader="the search of a plan",
        risk="layers may be chosen for",
        use="a plan was searched or predicted on",
        rows=settings.skip_sequences + max(row["num_samples"] for row in rows),
        questions_hint="",
    )


def texts_of_repair(checkpoint: Checkpoint) -> Iterator[SeenText]:
    """Yield the texts that a checkpoint was repaired or distilled on, or nothing for one without such records.

    Raises:
        ModelError: a record is damaged.
    """
    if record := read_record(checkpoint.folder):
        for distilled in (text for text in record.texts if text.trained_rows and text.corpus != SELF):
            skipped = record.settings.skip_sequences + distilled.held_out_rows
            yield _stored_text(
                checkpoint,
                distilled.corpus,
                replace(record.settings, max_sequences=distilled.trained_rows, skip_sequences=skipped),
                reader=f"the distillation of '{checkpoint.name}'",
                risk="it is trained on",
                fingerprints=(distilled.fingerprint,),
                use=f"'{checkpoint.name}' was distilled on ({distilled.corpus})",
                rows=skipped + distilled.trained_rows,
            )
    fit = f"the repair of '{checkpoint.name}'"
    for repair in read_repairs(checkpoint.folder):
        for text in repair.texts:
            yield _stored_text(
                checkpoint,
                text.corpus,
                repair.reading(),
                reader=fit,
                risk="it may be fitted to",
                fingerprints=(text.fingerprint,),
                use=f"{fit} was fitted on ({text.corpus})",
                rows=repair.skip_sequences + text.rows,
            )


def refuse_overlaps(
    tasks: Sequence[Task],
    texts: Iterable[CorpusPlan],
    model: PlacedModel,
    scored: Iterable[SeenText],
    *,
    skipped: int,
    use: str = "the repair is fitted on",
    skip_option: str = "skip_sequences",
) -> None:
    """Refuse tasks on text that a model was scored, repaired or will be fitted on, and fits on text of its scores.

    Args:
        texts: texts that the model will be fitted on, without their first ``skipped`` rows.
        scored: the text of the scores; see `texts_of_run`.
        use: see `SeenText`.
        skip_option: field that skips rows of the texts.

    Raises:
        ConfigError: see `refuse_overlap`.
    """
    fitted = [
        SeenText(
            use=f"{use} ({text.source})",
            rows=skipped + text.num_sequences,
            read=partial(tuple, text.shards),
            checkpoint=model.checkpoint,
        )
        for text in texts
    ]
    scored_texts = list(scored)
    refuse_overlap(tasks, chain(texts_of_repair(model.checkpoint), scored_texts, fitted))
    refuse_overlap(
        [Task(name=text.source, parts=tuple(map(TextLoss, text.shards))) for text in texts],
        [replace(text, skip_option=skip_option) for text in scored_texts],
    )


def _stored_text(
    checkpoint: Checkpoint,
    corpus: str,
    settings: Settings,
    *,
    reader: str,
    risk: str,
    fingerprints: Collection[str] = (),
    **about: Any,
) -> SeenText:
    """Return a text that was read before, whose rows are read again when they are compared.

    Args:
        reader: noun for what has read it.
        risk: clause of the hint that names the risk of no comparison, such as ``it may be fitted to``.
        fingerprints: earlier fingerprints of its content or its tokens. A text with none of them has changed.
        about: fields of `SeenText`.
    """

    def read() -> Sequence[Shard]:
        hint = f"Put it back, or set `allow_overlap` and know that {risk} this very text."
        try:
            text = tokenize_corpus(corpus, _tokenizer(checkpoint), settings)
        except AvssError as error:
            raise ConfigError(f"The text of {reader} cannot be read again: {error.message}", hint) from error
        if fingerprints and not {text.corpus_fingerprint, text.tokens_fingerprint} & {*fingerprints}:
            raise ConfigError(f"The text of {reader} has changed since it was read: {text.source}.", hint)
        return text.shards

    return SeenText(read=cache(read), checkpoint=checkpoint, **about)


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
