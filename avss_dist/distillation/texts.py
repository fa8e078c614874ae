"""Texts of a distillation: rows to train on, mixed by weight, rows that are only measured, and text of the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avss_dist.core.devices import pick_device
from avss_dist.core.errors import ConfigError, NoRows
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI, basename
from avss_dist.corpus.overlap import MAX_SHARED, read_again, shared_text
from avss_dist.corpus.seen import TRAINED_ON, distinct
from avss_dist.corpus.shards import Batch, CorpusPlan, Shard, tokenize_corpus
from avss_dist.corpus.sources import open_source
from avss_dist.distillation.curve import OnEvent, Preparing
from avss_dist.distillation.loss import NOT_COUNTED
from avss_dist.distillation.pair import ModelPair
from avss_dist.distillation.record import SELF, seen_by_checkpoint
from avss_dist.distillation.teacher_text import teacher_text
from avss_dist.models.causal_lm import predicted
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.pruning.repair.registry import split_weight

if TYPE_CHECKING:
    from avss_dist.requests import DistillRequest


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
    corpus: str, name: str, weight: float, tokenizer: Any, settings: Settings, held_out: int
) -> DistillText:
    """Read a text to train on. Its first ``held_out`` rows are held out.

    Args:
        corpus: the source.
        name: name of the text.
        settings: ``max_sequences`` is the maximum number of rows, held-out ones included.

    Raises:
        CorpusError: the text cannot be read or has no row to train on.
        ConfigError: it is paired text.
    """
    maximum = None if settings.max_sequences is None else settings.max_sequences - held_out
    ConfigError.refuse(
        (
            open_source(corpus).answers,
            f"{name} is paired text, which distillation cannot train on.",
            "Name it with `watch`.",
        ),
        (
            maximum is not None and maximum < 1,
            f"`max_sequences` {settings.max_sequences} leaves no row to train on beside {held_out} held-out ones.",
            "Raise `max_sequences`, or lower `held_out`.",
        ),
    )
    measured = tokenize_corpus(corpus, tokenizer, replace(settings, max_sequences=held_out))
    skipped = settings.skip_sequences + measured.num_sequences
    try:
        rows = tokenize_corpus(corpus, tokenizer, replace(settings, max_sequences=maximum, skip_sequences=skipped))
    except NoRows as error:
        longer = "Let the teacher write more with `self_texts`" if name == SELF else "Name a longer text"
        raise NoRows(
            f"{name} has no row to train on after {skipped} skipped and held-out rows: {error.message}",
            f"{longer}, or lower `held_out`.",
        ) from error
    return DistillText(name=name, label=name, weight=weight, trained=rows, held_out=measured)


def read_watched(corpus: str, tokenizer: Any, settings: Settings, held_out: int) -> DistillText:
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
    labels: list[str] = []
    for text in texts:
        name = basename(text.name)
        candidates = chain([name], (f"{name} ({number})" for number in count(2)))
        labels.append(next(label for label in candidates if label not in labels))
    return [replace(text, label=label) for text, label in zip(texts, labels, strict=True)]


def refuse_overlap(texts: Sequence[DistillText], used: Iterable[tuple[str, Sequence[Shard]]], tokenizer: Any) -> None:
    """Refuse held-out rows that share passages with rows that were used. Text of the teacher is not compared.

    Args:
        used: rows, each after the end of a sentence that begins with the text: ``is trained on (FILE)``.

    Raises:
        ConfigError: a text shares more than `MAX_SHARED` of its passages.
    """
    for (use, rows), text in product(used, texts):
        shared = None if text.name == SELF else shared_text(rows, text.held_out.shards, tokenizer)
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
        weights, random = np.array([text.weight for text in texts if text.trained]), np.random.default_rng(seed)
        self._text = random.choice(len(weights), size=count, p=weights / weights.sum()).astype(np.int32)
        self._row = np.zeros(count, np.int64)
        for number, rows in enumerate(len(text["input_ids"]) for text in self._texts):
            drawn = self._text == number
            passes = [random.permutation(rows) for _ in range(-(-int(drawn.sum()) // rows))]
            self._row[drawn] = np.concatenate([*passes, np.zeros(0, np.int64)])[: drawn.sum()]

    def __len__(self) -> int:
        """Return the number of drawn rows."""
        return len(self._text)

    def __getitem__(self, index: int) -> Example:
        """Return a drawn row: ``input_ids``, ``attention_mask`` and ``labels``, int64[tokens] each."""
        text, row = self._text[index], self._row[index]
        return {name: values[row] for name, values in self._texts[text].items()}


def _all_rows(text: CorpusPlan) -> Example:
    """Return all rows of a text, padded to ``sequence_length``, so that rows of all texts can be stacked."""
    (shard,) = text.recut(text.num_sequences).shards
    (batch,) = shard.batches(shard.num_sequences)
    padding = ((0, 0), (0, shard.input_ids.shape[1] - batch.input_ids.shape[1]))
    masks: dict[str, Any] = {name: np.pad(getattr(batch, name), padding) for name in ("attention_mask", "observed")}
    return as_examples(replace(batch, input_ids=shard.input_ids, **masks))


def as_examples(batch: Batch) -> Example:
    """Return a batch as tensors, int64[rows, tokens]. The labels of tokens that do not count are `NOT_COUNTED`."""
    ids = batch.input_ids.astype(np.int64)
    counted = np.pad(predicted(batch), ((0, 0), (1, 0)))
    values = (ids, batch.attention_mask.astype(np.int64), np.where(counted, ids, NOT_COUNTED))
    return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.from_numpy, values), strict=True))


def read_texts(request: DistillRequest, models: ModelPair, work: Path, on_event: OnEvent) -> list[DistillText]:
    """Read all texts: those to train on, the teacher's own, and those to watch."""
    on_event(Preparing("reading"))
    tokenizer = load_tokenizer(models.student)
    weighted = [split_weight(corpus) for corpus in request.corpora]
    weights = {str(corpus): weight for corpus, weight in weighted}
    if len(weights) < len(weighted):
        raise ConfigError("`corpora` names a text twice.", "Name it once, with a weight: CORPUS=2.")
    how = (tokenizer, models.settings, request.held_out)
    texts = [read_trained(corpus.full, str(corpus), weight, *how) for corpus, weight in weighted if corpus != SELF]
    watched = [read_watched(corpus, *how) for corpus in request.watch]
    if request.self_texts:
        here = replace(models.teacher_settings, device=pick_device(request.settings.device).type)
        count, seed = request.self_texts, request.seed
        file = teacher_text(models.teacher, here, count=count, seed=seed, work=work, on_event=on_event)
        plain = replace(models.settings, chat_template=False, max_sequences=None, skip_sequences=0)
        texts.append(read_trained(f"{file}:text", SELF, weights.get(SELF, 1.0), tokenizer, plain, request.held_out))
    if not texts:
        raise ConfigError("There is no text to train on.", "Name some with `corpora`, or set `self_texts` above 0.")
    texts = with_labels([*texts, *watched])
    if not request.allow_overlap:
        trained = [  # without those of the teacher, which may know any text by heart
            (f"is trained on ({text.name})", text.trained.shards)
            for text in texts
            if text.trained and text.name != SELF
        ]
        refuse_overlap(texts, [*trained, *_earlier_text(models.student, tokenizer)], tokenizer)
    return texts


def _earlier_text(student: Checkpoint, tokenizer: Any) -> Iterator[tuple[str, Sequence[Shard]]]:
    """Yield the rows that repairs and an earlier distillation of the student have changed its weights for."""
    for text in distinct(text for text in seen_by_checkpoint(student) if text.use in TRAINED_ON):
        yield text.describe(), read_again(text, tokenizer, text.corpus).shards
