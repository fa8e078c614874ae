"""Texts of a distillation: rows to train on, mixed by weight, rows that are only measured, and text of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from avss_dist.core.errors import ConfigError, NoRows
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI, basename
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.overlap import MAX_SHARED, read_again, shared_text
from avss_dist.corpus.own_text import OwnText
from avss_dist.corpus.seen import SELF, TRAINED_ON, distinct
from avss_dist.corpus.shards import Batch, CorpusPlan, Shard, tokenize_corpus, tokenize_source
from avss_dist.corpus.sources import Source, open_source
from avss_dist.distillation.curve import OnEvent, Preparing
from avss_dist.distillation.loss import NOT_COUNTED
from avss_dist.distillation.pair import ModelPair
from avss_dist.distillation.record import seen_by_checkpoint
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.predictions import predicted
from avss_dist.pruning.repair.registry import split_weight

if TYPE_CHECKING:
    from avss_dist.requests import DistillRequest


MOST_ROWS = 4096
"""Rows of the teacher's text, at most. A longer training draws them again, as writing takes longer than reading."""

Example = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class DistillText:
    """A text, tokenized.

    Attributes:
        name: the corpus, as the user named it, or `SELF`.
        label: short name for tables, distinct from those of other texts.
        weight: share of the mix relative to other texts; 0 for a text that is only watched.
        trained: rows to train on; None for a text that is only watched.
        held_out: rows that are only measured.
    """

    name: str
    label: str
    weight: float
    trained: CorpusPlan | None
    held_out: CorpusPlan


def read_trained(
    corpus: str | Source, name: str, weight: float, tokenizer: Tokenizer, settings: Settings, held_out: int
) -> DistillText:
    """Read a text to train on. Its first ``held_out`` rows are held out.

    Args:
        corpus: the source, or its name.
        name: name of the text.
        settings: ``max_sequences`` is the maximum number of rows, held-out ones included.

    Raises:
        CorpusError: the text cannot be read or has no row to train on.
        ConfigError: it is paired text.
    """
    source = open_source(corpus) if isinstance(corpus, str) else corpus
    maximum = None if settings.max_sequences is None else settings.max_sequences - held_out
    problems = []
    if source.answers:
        message = f"{name} is paired text, which distillation cannot train on."
        problems.append(ConfigError(message, "Name it with `watch`."))
    if maximum is not None and maximum < 1:
        message = f"`max_sequences` {settings.max_sequences} leaves no row to train on beside {held_out} held-out ones."
        problems.append(ConfigError(message, "Raise `max_sequences`, or lower `held_out`."))
    if problems:
        raise ConfigError.combine(problems)
    measured = tokenize_source(name, source, tokenizer, replace(settings, max_sequences=held_out))
    skipped = settings.skip_sequences + measured.num_sequences
    try:
        remaining = replace(settings, max_sequences=maximum, skip_sequences=skipped)
        rows = tokenize_source(name, source, tokenizer, remaining)
    except NoRows as error:
        hint = "Name a longer text, or lower `held_out`."
        if name == SELF:
            hint = "Let the teacher write more with `self_texts`, or lower `held_out`."
        message = f"{name} has no row to train on after {skipped} skipped and held-out rows: {error.message}"
        raise NoRows(message, hint) from error
    return DistillText(name=name, label=name, weight=weight, trained=rows, held_out=measured)


def read_watched(corpus: str, tokenizer: Tokenizer, settings: Settings, held_out: int) -> DistillText:
    """Read ``held_out`` rows of a text that is only measured.

    Rows of paired text are the first ones. Those of other text follow the rows that the settings skip.

    Raises:
        CorpusError: the text cannot be read or is too short.
    """
    skipped = 0 if open_source(corpus).answers else settings.skip_sequences
    rows = tokenize_corpus(corpus, tokenizer, replace(settings, max_sequences=held_out, skip_sequences=skipped))
    return DistillText(name=str(RedactedURI(corpus)), label="", weight=0.0, trained=None, held_out=rows)


def with_labels(texts: Sequence[DistillText]) -> list[DistillText]:
    """Return the texts with a short, distinct label each: the last part of the name, numbered if it occurs twice."""
    labelled: dict[str, DistillText] = {}
    for text in texts:
        name = basename(text.name)
        label = name
        number = 1
        while label in labelled:
            number += 1
            label = f"{name} ({number})"
        labelled[label] = replace(text, label=label)
    return list(labelled.values())


def refuse_overlap(
    texts: Sequence[DistillText], used: Iterable[tuple[str, Sequence[Shard]]], tokenizer: Tokenizer
) -> None:
    """Refuse held-out rows that share passages with rows that were used. Text of the teacher is not compared.

    Args:
        used: rows, each after the end of a sentence that begins with the text: ``is trained on (FILE)``.

    Raises:
        ConfigError: a text shares more than `MAX_SHARED` of its passages.
    """
    compared = [text for text in texts if text.name != SELF]
    for (use, rows), text in product(used, compared):
        shared = shared_text(rows, text.held_out.shards, tokenizer)
        if shared is not None and shared > MAX_SHARED:
            raise ConfigError(
                f"{shared:.0%} of the held-out rows of {text.name} is text that {use}.",
                "Use other text or other rows (`skip_sequences`), or set `allow_overlap` and know that its figures "
                "are not of unseen text.",
            )


class Mix(Dataset[Example]):
    """Rows of several texts in a random order, drawn by the texts' weights.

    Every row of a text is drawn once before any is drawn again. The order depends on the seed and the numbers of rows.

    Args:
        texts: texts with rows to train on.
        count: number of rows to draw.
        seed: seed of the draws.
    """

    def __init__(self, texts: Sequence[DistillText], count: int, seed: int) -> None:
        self._texts = [_all_rows(text.trained) for text in texts if text.trained]
        weights = np.array([text.weight for text in texts if text.trained])
        random = np.random.default_rng(seed)
        self._text = random.choice(len(weights), size=count, p=weights / weights.sum()).astype(np.int32)
        self._row = np.zeros(count, np.int64)
        for number, text in enumerate(self._texts):
            is_drawn = self._text == number
            self._row[is_drawn] = _drawn_rows(random, len(text["input_ids"]), int(is_drawn.sum()))

    def __len__(self) -> int:
        """Return the number of drawn rows."""
        return len(self._text)

    def __getitem__(self, index: int) -> Example:
        """Return a drawn row: ``input_ids``, ``attention_mask`` and ``labels``, int64[tokens] each."""
        text = self._texts[self._text[index]]
        row = self._row[index]
        return {name: values[row] for name, values in text.items()}


def _drawn_rows(random: np.random.Generator, rows: int, count: int) -> NDArray[np.int64]:
    """Return the indices of drawn rows of a text, all of them before any is drawn again."""
    drawn = np.zeros(0, np.int64)
    while len(drawn) < count:
        drawn = np.concatenate([drawn, random.permutation(rows)])
    return drawn[:count]


def _all_rows(text: CorpusPlan) -> Example:
    """Return all rows of a text, padded to ``sequence_length``, so that rows of all texts can be stacked."""
    (shard,) = text.recut(text.num_sequences).shards
    (batch,) = shard.batches(shard.num_sequences)
    missing = shard.input_ids.shape[1] - batch.input_ids.shape[1]
    padding = ((0, 0), (0, missing))
    padded = replace(
        batch,
        input_ids=shard.input_ids,
        attention_mask=np.pad(batch.attention_mask, padding),
        observed=np.pad(batch.observed, padding),
    )
    return as_examples(padded)


def as_examples(batch: Batch) -> Example:
    """Return a batch as tensors, int64[rows, tokens]. The labels of tokens that do not count are `NOT_COUNTED`."""
    ids = batch.input_ids.astype(np.int64)
    is_counted = np.pad(predicted(batch), ((0, 0), (1, 0)))
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(batch.attention_mask.astype(np.int64)),
        "labels": torch.from_numpy(np.where(is_counted, ids, NOT_COUNTED)),
    }


class TeacherWriter(Protocol):
    """Writes text of the teacher. See `evaluation.own_text.OwnTextWriter`."""

    def write_texts(self, count: int) -> OwnText:
        """Return so many texts."""
        ...

    def write_rows(self, count: int) -> OwnText:
        """Return texts that have so many rows together."""
        ...


OpenWriter = Callable[[], AbstractContextManager[TeacherWriter]]
"""Function that opens what writes text of the teacher."""


def read_texts(
    request: DistillRequest, models: ModelPair, open_writer: OpenWriter, on_event: OnEvent
) -> list[DistillText]:
    """Read all texts: those to train on, the teacher's own, and those to watch."""
    on_event(Preparing("reading"))
    tokenizer = load_tokenizer(models.student)
    weighted = [split_weight(corpus) for corpus in request.corpora]
    names = {str(corpus) for corpus, _ in weighted}
    if len(names) < len(weighted):
        raise ConfigError("`corpora` names a text twice.", "Name it once, with a weight: CORPUS=2.")
    settings = models.settings
    texts = []
    for corpus, weight in weighted:
        if corpus != SELF:
            texts.append(read_trained(corpus.full, str(corpus), weight, tokenizer, settings, request.held_out))
    watched = [read_watched(corpus, tokenizer, settings, request.held_out) for corpus in request.watch]
    if request.self_texts != 0:
        share = share_of_teacher(request, texts)
        texts.append(_read_teacher_text(request, settings, share, tokenizer, open_writer))
    if not texts:
        raise ConfigError("There is no text to train on.", "Name some with `corpora`, or set `self_texts` above 0.")
    texts = with_labels([*texts, *watched])
    if not request.allow_overlap:
        used = [*_trained_rows(texts), *_earlier_text(models.student, tokenizer)]
        refuse_overlap(texts, used, tokenizer)
    return texts


def _read_teacher_text(
    request: DistillRequest,
    settings: Settings,
    share: float,
    tokenizer: Tokenizer,
    open_writer: OpenWriter,
) -> DistillText:
    """Read the text that the teacher writes: as many texts as are requested, or else as many as training draws rows.

    Args:
        share: share of the mix.
    """
    rows = None
    with open_writer() as writer:
        if request.self_texts is None:
            rows = rows_of_teacher(request, settings, share)
            own = writer.write_rows(rows)
        else:
            own = writer.write_texts(request.self_texts)
    reading = replace(settings, chat_template=False, shuffle_seed=None, max_sequences=rows, skip_sequences=0)
    return read_trained(own.source, SELF, _weight_of_teacher(request), tokenizer, reading, request.held_out)


def _weight_of_teacher(request: DistillRequest) -> float:
    """Return the weight of the teacher's text, which is 1 unless the corpora name it with another."""
    for weighted in request.corpora:
        corpus, weight = split_weight(weighted)
        if corpus == SELF:
            return weight
    return 1.0


def share_of_teacher(request: DistillRequest, texts: Sequence[DistillText]) -> float:
    """Return the share of the teacher's text in the mix.

    Args:
        texts: the other texts.
    """
    weight = _weight_of_teacher(request)
    return weight / (weight + sum(text.weight for text in texts))


def rows_of_teacher(request: DistillRequest, settings: Settings, share: float) -> int:
    """Return the number of rows of the teacher's text: those that are held out, and those that training draws.

    Args:
        share: share of the mix.
    """
    return request.held_out + rows_drawn_of_teacher(share, request.tokens, settings.sequence_length)


def rows_drawn_of_teacher(share: float, tokens: float, length: int) -> int:
    """Return the number of rows of the teacher's text that training draws.

    Args:
        share: share of the mix.
        tokens: tokens to train on.
        length: tokens of a row.
    """
    return min(math.ceil(share * tokens / length), MOST_ROWS)


def _trained_rows(texts: Sequence[DistillText]) -> Iterator[tuple[str, Sequence[Shard]]]:
    """Yield the rows of texts that are trained on, without those of the teacher, which may know any text by heart."""
    for text in texts:
        if text.trained and text.name != SELF:
            yield f"is trained on ({text.name})", text.trained.shards


def _earlier_text(student: Checkpoint, tokenizer: Tokenizer) -> Iterator[tuple[str, Sequence[Shard]]]:
    """Yield the rows that repairs and an earlier distillation of the student have changed its weights for."""
    trained_on = [text for text in seen_by_checkpoint(student) if text.use in TRAINED_ON]
    for text in distinct(trained_on):
        if text.corpus == SELF:
            continue
        yield text.describe(), read_again(text, tokenizer, text.corpus).shards
