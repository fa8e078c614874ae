"""Tokenized corpora: documents become rows of tokens, and rows become shards.

Shards depend on corpus, tokenizer and settings, never on the workers that measure them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.errors import CorpusError, NoRows, without_secrets
from avss_dist.core.files import Spool
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.corpus.documents import Answer, Document, Tokenizer, chat_template, truthfulqa_choices
from avss_dist.corpus.pairs import Pairing, join, num_whole, paired_rows, rows_of_pairs
from avss_dist.corpus.sources import Source, json_records, open_source
from avss_dist.corpus.tokens import (
    Ids,
    ReadCounts,
    other_row_start,
    rows_of,
    shuffled,
    special_tokens_of_rows,
)

Mask = NDArray[np.bool_]

USUAL_ROWS = 32  # rows of a shard by default


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows of tokens for one forward pass, as wide as the longest of them."""

    input_ids: Ids  # int32[rows, width], padded on the right
    attention_mask: Mask  # bool[rows, width], True where a token is real
    observed: Mask  # bool[rows, width], True where a token counts in the statistics: real, and not skipped
    pairing: Pairing | None = None  # of paired text


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """Consecutive rows of a corpus: the unit of work, retry and resampling."""

    shard_id: int  # its index in the plan, from 0
    input_ids: Ids  # int32[rows, sequence_length], padded on the right
    lengths: Ids  # int32[rows], real tokens of each row, 1 or more
    skip_first_tokens: int  # leading tokens of every row that the statistics leave out
    content_hash: str  # SHA-256 in hex of skip, lengths, real tokens and pairing; padding does not enter
    pairing: Pairing | None = None  # of paired text, whose answers alone count

    @property
    def num_sequences(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that count in the statistics."""
        return int(np.maximum(self.lengths.astype(np.int64) - self.starts, 0).sum())

    @property
    def starts(self) -> Ids:
        """Index of the first token of each row that may count, int32[rows]."""
        skip = np.full(self.num_sequences, self.skip_first_tokens, np.int32)
        if self.pairing is None:
            return skip
        return np.maximum(skip, self.pairing.starts)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield every row once, in order, ``batch_size`` at a time. The caller may change the arrays."""
        starts = self.starts
        for start in range(0, self.num_sequences, batch_size):
            rows = slice(start, start + batch_size)
            positions = np.arange(np.max(self.lengths[rows]))
            is_real = positions < self.lengths[rows, None]
            counts = positions >= starts[rows, None]
            yield Batch(
                input_ids=self.input_ids[rows, : len(positions)].copy(),
                attention_mask=is_real,
                observed=is_real & counts,
                pairing=self.pairing.part(rows) if self.pairing else None,
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class CorpusPlan:
    """A tokenized corpus, cut into shards with ``shards[i].shard_id == i``."""

    source: str  # as the user named it, without keys
    corpus_fingerprint: str
    tokens_fingerprint: str  # SHA-256 in hex of the shards' content hashes and the sequence length
    shards: tuple[Shard, ...]
    num_sequences: int
    num_tokens: int
    chat_template: str | None = None  # SHA-256 in hex of the template that conversations were put in, if there were any

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", str(without_secrets(self.source)))

    def recut(self, rows: int) -> CorpusPlan:
        """Return the same rows in shards of ``rows`` rows. Pairs stay whole."""
        first = self.shards[0]
        sequence_length = first.input_ids.shape[1]
        spool = Spool(sequence_length)
        for shard in self.shards:
            spool.add(shard.input_ids)
        lengths = np.concatenate([shard.lengths for shard in self.shards])
        pairings = [shard.pairing for shard in self.shards if shard.pairing]
        all_rows = _Rows(spool.array(), lengths, join(pairings) if pairings else None)
        shards = _make_shards(all_rows, first.skip_first_tokens, rows)
        return replace(self, shards=shards, tokens_fingerprint=_fingerprint(shards, sequence_length))

    def num_batches(self, batch_size: int) -> int:
        """Return the number of forward passes over all shards. The last one of a shard may have fewer rows."""
        return sum(-(-shard.num_sequences // batch_size) for shard in self.shards)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a corpus before they are cut into shards.

    Attributes:
        input_ids: int32[rows, sequence_length], padded on the right.
        lengths: int32[rows], real tokens of each row.
        pairing: that of the rows of paired text.
    """

    input_ids: Ids
    lengths: Ids
    pairing: Pairing | None = None

    def shard(self, shard_id: int, rows: slice, skip: int) -> Shard:
        """Return some of the rows as a shard."""
        pairing = self.pairing.part(rows) if self.pairing else None
        return _shard(shard_id, self.input_ids[rows], self.lengths[rows], skip, pairing)


def tokenize_corpus(
    source: str,
    tokenizer: Tokenizer,
    settings: Settings,
) -> CorpusPlan:
    """Read, tokenize and shard a corpus by its name. See `tokenize_source`."""
    return tokenize_source(source, open_source(source), tokenizer, settings)


def tokenize_source(source: str, opened: Source, tokenizer: Tokenizer, settings: Settings) -> CorpusPlan:
    """Read, tokenize and shard a source, as far as ``settings.max_sequences`` rows need, or all of it with a seed.

    Rows are skipped in the shuffled order if there is a seed.

    Args:
        source: name of the source.

    Raises:
        CorpusError: the source cannot be read, holds no text, or is too short for one row; or the tokenizer has no
            chat template, and one is requested.
    """
    template = chat_template(tokenizer) if settings.chat_template else None
    counts = ReadCounts()
    if opened.answers:
        rows = _rows_of_answers(opened.answers(), source, tokenizer, settings)
    else:
        rows = _rows_of_documents(opened.documents(), tokenizer, settings, counts)
    shards = _make_shards(rows, settings.skip_first_tokens, _rows_per_shard(settings))
    num_sequences = len(rows.lengths)
    num_tokens = sum(shard.num_tokens for shard in shards)
    if rows.pairing is None:
        _require_enough(source, num_sequences, num_tokens, counts, settings)
    return CorpusPlan(
        source=source,
        corpus_fingerprint=opened.fingerprint(),
        tokens_fingerprint=_fingerprint(shards, settings.sequence_length),
        shards=shards,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        chat_template=template if counts.conversations else None,
    )


def _rows_per_shard(settings: Settings) -> int:
    return settings.sequences_per_shard or USUAL_ROWS


def _rows_of_answers(answers: Iterator[Answer], source: str, tokenizer: Tokenizer, settings: Settings) -> _Rows:
    """Return the rows of paired text, each of which keeps tokens of its answer."""
    if settings.skip_sequences:
        raise CorpusError(f"{source} is paired text.", "Leave `skip_sequences` out: its rows belong together.")
    unpadded, pairing = paired_rows(answers, source, tokenizer, settings)
    ids, lengths = _padded(unpadded, settings.sequence_length, tokenizer)
    shortest = min(lengths)
    if shortest <= settings.skip_first_tokens:
        raise CorpusError(
            f"{source}: `skip_first_tokens` {settings.skip_first_tokens} leaves nothing of an answer.",
            f"Make it smaller than {shortest}.",
        )
    return _Rows(ids, lengths, pairing)


def _rows_of_documents(
    documents: Iterator[Document], tokenizer: Tokenizer, settings: Settings, counts: ReadCounts
) -> _Rows:
    """Return the rows of documents that are neither skipped nor beyond the last one of the settings."""
    around = special_tokens_of_rows(tokenizer, settings)
    rows = rows_of(documents, tokenizer, settings, counts, around)
    first = settings.skip_sequences
    end = None if settings.max_sequences is None else first + settings.max_sequences
    if settings.shuffle_seed is not None:
        rows = shuffled(rows, settings.shuffle_seed, end)
    rows = islice(rows, first, end)
    # The rows of all shards may not fit into memory: they are padded and written shard by shard.
    spool = Spool(settings.sequence_length)
    lengths = [np.zeros(0, np.int32)]
    while block := list(islice(rows, _rows_per_shard(settings))):
        padded, block_lengths = _padded(block, settings.sequence_length, tokenizer)
        spool.add(padded)
        lengths.append(block_lengths)
    return _Rows(spool.array(), np.concatenate(lengths))


def with_other_start(shard: Shard, tokenizer: Tokenizer, settings: Settings, rows: int) -> tuple[Shard, Shard] | None:
    """Return the first rows of packed text as they are, and the same text with the other start of `other_row_start`.

    Returns:
        None if there is no other start, or the text is paired.
    """
    other = other_row_start(tokenizer, settings)
    if other is None or shard.pairing:
        return None
    around = special_tokens_of_rows(tokenizer, settings)
    length = shard.input_ids.shape[1]
    text = slice(len(around.prefix), length - len(around.suffix))
    first_rows = shard.input_ids[:rows]
    enclosed = [other.enclose(row[text])[:length] for row in first_rows]
    ids, lengths = _padded(enclosed, length, tokenizer)
    return _shard(0, first_rows, shard.lengths[:rows], 0), _shard(0, ids, lengths, 0)


def tokenize_choices(
    path: str, tokenizer: Tokenizer, settings: Settings, questions: slice = slice(None)
) -> tuple[Shard, ...]:
    """Return shards with one row for each answer to questions of a TruthfulQA file.

    All answers to a question are in one shard.

    Raises:
        CorpusError: as `tokenize_corpus`, ``questions`` selects none, or the first has more answers than rows are read.
    """
    all_questions = truthfulqa_choices(json_records(path))
    selected = all_questions[questions]
    if not selected:
        raise CorpusError(f"The file has {len(all_questions)} questions, and all are skipped.", "Skip fewer.")
    ends = np.cumsum([len(answers) for answers in selected])
    number = num_whole(ends, settings.max_sequences)
    if not number:
        raise CorpusError(f"The first question has {ends[0]} answers.", f"Make `max_sequences` {ends[0]} or more.")
    rows, pairing = rows_of_pairs(selected[:number], [("", range(number))], tokenizer, settings)
    ids, lengths = _padded(rows, settings.sequence_length, tokenizer)
    return _make_shards(_Rows(ids, lengths, pairing), 0, _rows_per_shard(settings))


def _padded(rows: Sequence[Ids], length: int, tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """Return rows padded to one length, int32[rows, length], and their lengths."""
    input_ids = np.full((len(rows), length), _padding_token(tokenizer), np.int32)
    for target, row in zip(input_ids, rows, strict=True):
        target[: len(row)] = row
    return input_ids, np.array([len(row) for row in rows], np.int32)


def _padding_token(tokenizer: Tokenizer) -> int:
    """Return the token that fills rows up. Any will do: it is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _make_shards(rows: _Rows, skip: int, rows_per_shard: int) -> tuple[Shard, ...]:
    """Return shards of ``rows_per_shard`` rows. Shards of paired text end with a pair and may be somewhat larger."""
    if rows.pairing:
        parts = rows.pairing.parts(rows_per_shard)
    else:
        starts = range(0, len(rows.input_ids), rows_per_shard)
        parts = [slice(start, start + rows_per_shard) for start in starts]
    return tuple(rows.shard(shard_id, part, skip) for shard_id, part in enumerate(parts))


def _shard(shard_id: int, input_ids: Ids, lengths: Ids, skip: int, pairing: Pairing | None = None) -> Shard:
    """Return rows as a shard, with the hash of what decides its statistics."""
    digest = hashlib.sha256(np.array([skip, len(lengths), *lengths], "<i8").tobytes())
    for row, real in zip(input_ids, lengths, strict=True):
        digest.update(row[:real].astype("<i4").tobytes())
    if pairing:
        origins = [pairing.pairs.tolist(), pairing.strata, pairing.starts.tolist()]
        digest.update(json.dumps(origins).encode())
    return Shard(
        shard_id=shard_id,
        input_ids=input_ids,
        lengths=lengths,
        skip_first_tokens=skip,
        content_hash=digest.hexdigest(),
        pairing=pairing,
    )


def _fingerprint(shards: Sequence[Shard], sequence_length: int) -> str:
    return fingerprint(shards=[shard.content_hash for shard in shards], sequence_length=sequence_length)


def _require_enough(source: str, num_sequences: int, num_tokens: int, counts: ReadCounts, settings: Settings) -> None:
    """Raise NoRows unless there is a row with a token that counts."""
    if not counts.has_text:
        raise NoRows(f"{source} holds no text (documents read: {counts.documents}).", "Name one that holds some.")
    if not num_sequences and counts.rows:
        raise NoRows(
            f"{source} has no sequence left: it has {counts.rows:,}, and `skip_sequences` leaves out "
            f"{settings.skip_sequences:,}.",
            "Lower `skip_sequences`, or name a longer text.",
        )
    if not num_sequences and settings.layout == "packed":
        raise NoRows(
            f"{source} is {counts.tokens} tokens long, too short for one sequence of {settings.sequence_length}.",
            "Choose a smaller `sequence_length`, or `layout` padded.",
        )
    if not num_sequences:
        raise NoRows(f"The tokenizer makes no tokens of {source}.", "Name another text.")
    if not num_tokens:
        raise NoRows(
            f"`skip_first_tokens` {settings.skip_first_tokens} leaves no token of {source}: no sequence that was read "
            f"is longer (sequences: {num_sequences:,}).",
            "Lower `skip_first_tokens`, or choose `layout` packed.",
        )
