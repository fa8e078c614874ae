"""Tasks of a checkpoint by name, and the check that their text is held out from its scores, searches and repairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

from avss_dist.core.errors import ConfigError, CorpusError
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.documents import Tokenizer, chat_template
from avss_dist.corpus.overlap import MAX_SHARED, SHORTEST, plain_text, read_again, shared_text
from avss_dist.corpus.seen import SELF, SeenText, distinct, seen_text
from avss_dist.corpus.shards import CorpusPlan, Shard, tokenize_choices, tokenize_corpus, with_other_start
from avss_dist.distillation.record import seen_by_checkpoint
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.plans.map_plans import PrecisionPlan
from avss_dist.plans.plan import ModelPlan
from avss_dist.plans.seen import seen_by_evaluation, seen_by_run
from avss_dist.tasks.harness_files import require_task
from avss_dist.tasks.task import Measure, Task
from avss_dist.tasks.text_loss import RowStartLoss, TextLoss, TruthfulChoices
from avss_dist.warehouse.names import PERPLEXITY, ROW_START, TRUTHFULQA
from avss_dist.warehouse.reader import Warehouse

_tokenizer = lru_cache(maxsize=2)(load_tokenizer)
"""Return the tokenizer of a checkpoint, kept for the texts that a task is compared with."""
COMPARED_ROWS = 4
"""Rows of a text that are read with both starts."""


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
        end = None if limit is None else skip_questions + limit
        path = RedactedURI(name).full.removeprefix(TRUTHFULQA)
        tokenizer = load_tokenizer(model.checkpoint)
        shards = tokenize_choices(path, tokenizer, settings, slice(skip_questions, end))
        parts = tuple(TruthfulChoices(shard) for shard in shards)
        return model.plan(Task(name=f"{TRUTHFULQA}{RedactedURI(path)}", parts=parts))
    require_task(name)
    from avss_dist.tasks.harness import harness_task

    template = None
    if settings.chat_template:
        template = chat_template(load_tokenizer(model.checkpoint))
    task = harness_task(
        name,
        limit=limit,
        num_fewshot=num_fewshot,
        template=template,
        trust_remote_code=settings.trust_remote_code,
    )
    return model.plan(task)


def plan_text(checkpoint: Checkpoint, corpus: str, settings: Settings) -> CorpusPlan:
    """Read the rows of a corpus in the checkpoint's tokens.

    Raises:
        CorpusError: the corpus cannot be read, is too short, or has no token to predict.
    """
    text = tokenize_corpus(corpus, load_tokenizer(checkpoint), settings)
    longest_row = max(int(shard.lengths.max()) for shard in text.shards)
    if longest_row <= max(1, settings.skip_first_tokens):
        raise CorpusError(
            f"No row of {RedactedURI(corpus)} has a token that is predicted from others before it and counts.",
            "Make `sequence_length` at least 2, and larger than `skip_first_tokens`; or take longer documents.",
        )
    return text


def plan_text_task(
    model: PlacedModel,
    corpus: str,
    measure: Callable[[Shard], Measure] = TextLoss,
    prefix: str = PERPLEXITY,
    use: str | None = None,
) -> PlannedTask:
    """Return the task of a measure of a corpus in a model's tokens, by default of the loss.

    Args:
        prefix: start of the name of the task, before that of the corpus.
        use: use of the text if layers are chosen by the measure, see `SeenText`.

    Raises:
        CorpusError: the corpus cannot be read, or is too short.
    """
    text = plan_text(model.checkpoint, corpus, model.settings)
    parts = tuple(measure(shard) for shard in text.shards)
    read: tuple[SeenText, ...] = ()
    if use is not None:
        read = (seen_text(text, model.settings, use),)
    return model.plan(Task(name=f"{prefix}{RedactedURI(corpus)}", parts=parts, read=read))


def row_start_task(planned: PlannedTask) -> PlannedTask | None:
    """Return the task of comparing two starts of the first rows of a text, or None if rows have only one."""
    first_shard = _shards(planned.task, TextLoss)[0]
    tokenizer = load_tokenizer(planned.checkpoint)
    shards = with_other_start(first_shard, tokenizer, planned.settings, COMPARED_ROWS)
    if shards is None:
        return None
    name = f"{ROW_START}{planned.task.name.removeprefix(PERPLEXITY)}"
    return planned.plan(Task(name=name, parts=(RowStartLoss(shards),)))


@dataclass(frozen=True, eq=False, kw_only=True)
class EarlierText:
    """A text that was read or will be, so that it is not held out.

    Attributes:
        use: end of a sentence that begins with the text: ``the scores of RUN were measured on (NAME)``.
        rows_end: index after its last row, the value of ``skip_option`` that skips all of its rows; None if it is not
            known.
        read: returns its rows, read again if necessary, and raises ConfigError if that is not possible.
        checkpoint: checkpoint whose tokenizer made its rows.
        skip_option: field that skips rows of the text; None if there is no such option.
    """

    use: str
    rows_end: int | None
    read: Callable[[], Sequence[Shard]]
    checkpoint: Checkpoint
    skip_option: str | None = "skip_sequences"


def earlier_texts(
    seen: Iterable[SeenText],
    checkpoint: Checkpoint,
    names: Iterable[str] = (),
    *,
    skip_option: str | None = "skip_sequences",
) -> list[EarlierText]:
    """Return texts that were read before, whose rows are read again when they are compared. Equal rows count once.

    Text that the model wrote itself is not among them.

    Args:
        names: corpora that may be among them, with the keys of their URIs, which records do not have.
    """
    with_keys = {}
    for name in names:
        uri = RedactedURI(name)
        with_keys[str(uri)] = uri.full
    earlier = []
    for text in distinct(seen):
        if text.corpus == SELF:
            continue
        corpus = with_keys.get(text.corpus, text.corpus)
        earlier_text = EarlierText(
            use=text.describe(),
            rows_end=text.rows_end,
            read=cache(partial(_read_again, text, corpus, checkpoint)),
            checkpoint=checkpoint,
            skip_option=skip_option,
        )
        earlier.append(earlier_text)
    return earlier


def _read_again(text: SeenText, corpus: str, checkpoint: Checkpoint) -> Sequence[Shard]:
    """Return the rows of a text that was read before, read again.

    Args:
        corpus: the corpus with the keys of its URI, which the record of the text does not have.
    """
    return read_again(text, _tokenizer(checkpoint), corpus).shards


def refuse_overlap(tasks: Iterable[Task], texts: Iterable[EarlierText]) -> None:
    """Refuse tasks on text or questions that have been seen. Tasks of lm-evaluation-harness are not compared.

    Raises:
        ConfigError: a task and a text share passages or questions, or cannot be compared, or the text cannot be read
            again.
    """
    every_text = list(texts)
    for task in tasks:
        asked = _shards(task, TruthfulChoices)
        rows = _shards(task, TextLoss)
        for earlier in every_text:
            if asked:
                _refuse_questions(task.name, asked, earlier)
            if rows:
                _refuse_passages(task.name, rows, earlier)


def _refuse_questions(name: str, asked: Sequence[Shard], earlier: EarlierText) -> None:
    """Raise ConfigError if questions are prompts of an earlier text."""
    prompts = _prompts(earlier.read(), _tokenizer(earlier.checkpoint))
    questions = _prompts(asked, _tokenizer(earlier.checkpoint))
    shared = len(prompts & questions)
    if shared:
        raise ConfigError(
            f"{shared} of the {len(questions)} questions of {name} are prompts that {earlier.use}.",
            f"Ask others: with `skip_questions` {len(prompts)}, where that text is of the first questions of the file.",
        )


def _refuse_passages(name: str, text: Sequence[Shard], earlier: EarlierText) -> None:
    """Raise ConfigError if a text shares more passages with an earlier one than chance, or cannot be compared."""
    share = shared_text(earlier.read(), text, _tokenizer(earlier.checkpoint))
    if share is None:
        raise ConfigError(
            f"{name} cannot be compared with the text that {earlier.use}: one of them has no {SHORTEST} "
            "characters in a row, without whitespace.",
            "Read more text, or longer rows (`sequence_length`); or set `allow_overlap` and know that they may be one.",
        )
    if share > MAX_SHARED:
        hint = "Use other text."
        if earlier.skip_option is not None and earlier.rows_end is not None:
            hint = f"Use other text: another corpus, or `{earlier.skip_option}` {earlier.rows_end}."
        raise ConfigError(f"{share:.0%} of {name} is text that {earlier.use}.", hint)


def _shards(task: Task, kind: type[TextLoss | TruthfulChoices]) -> list[Shard]:
    return [part.shard for part in task.parts if isinstance(part, kind)]


def seen_by_plan(plan: ModelPlan, store: Warehouse) -> tuple[SeenText, ...]:
    """Return the texts that were read on the way to a plan.

    The file of an earlier version names a run and an evaluation, whose texts are returned if the warehouse has them.
    """
    if plan.seen:
        return plan.seen
    seen: list[SeenText] = []
    run = store.run(plan.run_id) if plan.run_id and not isinstance(plan, PrecisionPlan) else None
    if run is not None:
        seen += seen_by_run(run)
    evaluation = getattr(plan, "evaluation", None) or plan.why.get("evaluation")
    if evaluation:
        rows = store.table("evaluations", run_ids=[str(evaluation)]).to_pylist()
        if rows:
            seen += seen_by_evaluation(rows[0])
    return tuple(seen)


def refuse_seen(
    tasks: Sequence[Task], checkpoint: Checkpoint, plans: Iterable[ModelPlan], store: Warehouse, names: Iterable[str]
) -> None:
    """Refuse tasks on text that was read on the way to a checkpoint, or to plans for it.

    Args:
        names: see `earlier_texts`.

    Raises:
        ConfigError: see `refuse_overlap`.
        ModelError: a record of the checkpoint is damaged.
    """
    seen = [*seen_by_checkpoint(checkpoint)]
    for plan in plans:
        seen += seen_by_plan(plan, store)
    refuse_overlap(tasks, earlier_texts(seen, checkpoint, names))


def refuse_overlaps(
    tasks: Sequence[Task],
    texts: Iterable[CorpusPlan],
    model: PlacedModel,
    chosen_on: Sequence[EarlierText],
    *,
    skipped: int,
    use: str = "the repair is fitted on",
    skip_option: str | None = "skip_sequences",
) -> None:
    """Refuse tasks on text that a model was chosen, repaired or will be fitted on, and fits on text it is chosen on.

    Args:
        texts: texts that the model will be fitted on, without their first ``skipped`` rows.
        chosen_on: texts that layers are chosen on.
        use: see `EarlierText`.
        skip_option: field that skips rows of the texts to fit on; None if neither they nor tasks have such an option.

    Raises:
        ConfigError: see `refuse_overlap`.
    """
    task_option = "skip_sequences" if skip_option else None
    fitted = []
    fits = []
    for text in texts:
        if text.source == SELF:
            continue
        earlier = EarlierText(
            use=f"{use} ({text.source})",
            rows_end=skipped + text.num_sequences,
            read=partial(tuple, text.shards),
            checkpoint=model.checkpoint,
            skip_option=task_option,
        )
        fitted.append(earlier)
        fits.append(Task(name=text.source, parts=tuple(TextLoss(shard) for shard in text.shards)))
    before = earlier_texts(seen_by_checkpoint(model.checkpoint), model.checkpoint, skip_option=task_option)
    refuse_overlap(tasks, [*before, *chosen_on, *fitted])
    refuse_overlap(fits, [replace(text, skip_option=skip_option) for text in chosen_on])


def _prompts(shards: Iterable[Shard], tokenizer: Tokenizer) -> set[str]:
    """Return the prompts of paired text, each once, without whitespace."""
    prompts: set[str] = set()
    for shard in shards:
        if shard.pairing is None:
            continue
        ids = [row[:start] for row, start in zip(shard.input_ids, shard.pairing.starts, strict=True)]
        prompts.update(plain_text(ids, tokenizer))
    return prompts
