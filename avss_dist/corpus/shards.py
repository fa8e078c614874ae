"""Documents -> rows of tokens -> shards. A plan depends on corpus, tokenizer and settings, never on workers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avss_dist.corpus.answers import truthfulqa_choices
from avss_dist.corpus.pairs import Pairing, choice_rows, join, paired_rows
from avss_dist.corpus.sources import Source, json_records, open_source
from avss_dist.errors import CorpusError, without_secrets
from avss_dist.settings import Settings, fingerprint
from avss_dist.system.spool import Spool

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

USUAL_ROWS = 32  # of a shard where settings do not say how many
GROUP_DOCUMENTS, GROUP_CHARACTERS = 64, 1 << 20  # that are tokenized at once
FIRST_DOCUMENTS = 4  # as many as a small plan may need; then twice as many each time
PIECE_CHARACTERS = 4 << 20  # of a document that are tokenized at once: that takes over 100 bytes for each
_WORD = re.compile(r"(?= \S)|(?<=\S\n)(?=\S)")
"""Where a word begins: byte-level tokenizers take the one space before it with it, and a line end alone."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer. A call gives a mapping whose ``input_ids`` is a list[list[int]]."""

    eos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows for one forward pass, as wide as the longest of them."""

    input_ids: Ids  # int32[rows, width], padded on the right
    attention_mask: Mask  # bool[rows, width], True where a token is real
    observed: Mask  # bool[rows, width], True where a token counts in the statistics: real, and not skipped
    pairing: Pairing | None = None  # of paired text, what its rows are


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard:
    """Consecutive rows of the corpus: the unit of work, retry and resampling."""

    shard_id: int  # its index in the plan, from 0
    input_ids: Ids  # int32[rows, sequence_length], padded on the right
    lengths: Ids  # int32[rows], real tokens of each row, 1 or more
    skip_first_tokens: int  # leading tokens of every row that the statistics leave out
    content_hash: str  # SHA-256 in hex of skip, lengths, real tokens and pairing; padding does not enter
    pairing: Pairing | None = None  # of paired text, what its rows are: only their answers count

    @property
    def num_sequences(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def num_strata(self) -> int:
        """What is counted apart; 1 of text that is not paired."""
        return len(set(self.pairing.strata)) if self.pairing else 1

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the statistics."""
        return int(np.maximum(self.lengths.astype(np.int64) - self.starts, 0).sum())

    @property
    def starts(self) -> Ids:
        """int32[rows]: the first token of each row that may count."""
        skip = np.full(self.num_sequences, self.skip_first_tokens, np.int32)
        return skip if self.pairing is None else np.maximum(skip, self.pairing.starts)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in order, ``batch_size`` at a time, in arrays that are the caller's own."""
        starts = self.starts
        for start in range(0, self.num_sequences, batch_size):
            rows = slice(start, start + batch_size)
            positions = np.arange(np.max(self.lengths[rows]))
            real = positions < self.lengths[rows, None]
            yield Batch(
                input_ids=self.input_ids[rows, : len(positions)].copy(),
                attention_mask=real,
                observed=real & (positions >= starts[rows, None]),
                pairing=self.pairing and self.pairing.part(rows),
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class CorpusPlan:
    """A corpus cut into shards, ``shards[i].shard_id == i``, and two sums over them."""

    source: str  # as the user named it
    corpus_fingerprint: str
    tokens_fingerprint: str  # SHA-256 in hex of the shards' content hashes and the sequence length
    shards: tuple[Shard, ...]
    num_sequences: int
    num_tokens: int

    def recut(self, rows: int) -> CorpusPlan:
        """The same rows in shards of another size; pairs stay whole."""
        spool = Spool(self.shards[0].input_ids.shape[1])
        for shard in self.shards:
            spool.add(shard.input_ids)
        ids, lengths = spool.array(), np.concatenate([shard.lengths for shard in self.shards])
        skip = self.shards[0].skip_first_tokens
        pairings = [shard.pairing for shard in self.shards if shard.pairing]
        shards = _cut(ids, lengths, skip, join(pairings) if pairings else None, rows)
        return replace(self, shards=shards, tokens_fingerprint=_fingerprint(shards, ids.shape[1]))

    def num_batches(self, batch_size: int) -> int:
        """Forward passes over all shards, each of so many rows or, at the end of a shard, fewer."""
        return sum(-(-shard.num_sequences // batch_size) for shard in self.shards)


def plan(
    source: str,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    skip_sequences: int = 0,
    progress: Callable[[int], None] | None = None,
) -> CorpusPlan:
    """Read, tokenize and cut a corpus, no further than ``settings.max_sequences`` rows need.

    Args:
        skip_sequences: rows at the start that are left out.
        progress: called after each shard with the number of sequences so far.

    Raises:
        CorpusError: the source cannot be read, holds no text, or is too short for one sequence.
    """
    opened, tally, length = open_source(source), _Tally(), settings.sequence_length
    if opened.answers:
        return _plan_pairs(source, opened, tokenizer, settings, skip_sequences)
    eos = tokenizer.eos_token_id
    ids = _tokenize(opened.documents(), tokenizer, tally)
    rows = _pack(ids, eos, length, tally) if settings.layout == "packed" else _truncate(ids, length)
    most = settings.max_sequences
    rows = islice(rows, skip_sequences, None if most is None else skip_sequences + most)
    spool, lengths = Spool(length), [np.zeros(0, np.int32)]
    num_sequences = 0
    per_shard = settings.sequences_per_shard or USUAL_ROWS
    while block := list(islice(rows, per_shard)):
        input_ids, of_block = _padded(block, length, tokenizer)
        spool.add(input_ids)
        lengths.append(of_block)
        num_sequences += len(block)
        if progress:
            progress(num_sequences)
    shards = _cut(spool.array(), np.concatenate(lengths), settings.skip_first_tokens, None, per_shard)
    num_tokens = sum(shard.num_tokens for shard in shards)
    _require_enough(source, num_sequences, num_tokens, tally, settings)
    return CorpusPlan(
        source=without_secrets(source),
        corpus_fingerprint=opened.fingerprint(),
        tokens_fingerprint=_fingerprint(shards, length),
        shards=shards,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
    )


def _plan_pairs(source: str, opened: Source, tokenizer: Tokenizer, settings: Settings, skip: int) -> CorpusPlan:
    """As `plan`, of paired text."""
    assert opened.answers is not None
    if skip:
        raise CorpusError(f"{source} is paired text.", "Leave `skip_sequences` out: its rows belong together.")
    rows, pairing = paired_rows(opened.answers(), source, **_rows_of(tokenizer, settings))
    ids, lengths = _padded(rows, settings.sequence_length, tokenizer)
    if min(lengths) <= settings.skip_first_tokens:
        message = f"{source}: `skip_first_tokens` {settings.skip_first_tokens} leaves nothing of an answer."
        raise CorpusError(message, f"Make it smaller than {min(lengths)}.")
    shards = _cut(ids, lengths, settings.skip_first_tokens, pairing, settings.sequences_per_shard or USUAL_ROWS)
    return CorpusPlan(
        source=without_secrets(source),
        corpus_fingerprint=opened.fingerprint(),
        tokens_fingerprint=_fingerprint(shards, settings.sequence_length),
        shards=shards,
        num_sequences=len(rows),
        num_tokens=sum(shard.num_tokens for shard in shards),
    )


def plan_choices(
    path: str, tokenizer: Tokenizer, settings: Settings, questions: slice = slice(None)
) -> tuple[Shard, ...]:
    """Every answer to questions of a file of TruthfulQA, a row each; the answers to a question are in one shard.

    Raises:
        CorpusError: as `plan`, or there are no such questions.
    """
    every = truthfulqa_choices(json_records(path))
    wanted = every[questions]
    if not wanted:
        raise CorpusError(f"The file has {len(every)} questions, and all are skipped.", "Skip fewer.")
    rows, pairing = choice_rows(wanted, **_rows_of(tokenizer, settings))
    ids, lengths = _padded(rows, settings.sequence_length, tokenizer)
    return _cut(ids, lengths, 0, pairing, settings.sequences_per_shard or USUAL_ROWS)


def _rows_of(tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """How answers become rows: see `pairs.paired_rows`."""
    return {
        "encode": lambda texts, special: _encode(texts, tokenizer, special=special),
        "eos": tokenizer.eos_token_id,
        "length": settings.sequence_length,
        "most": settings.max_sequences,
    }


@dataclass
class _Tally:
    documents: int = 0
    tokens: int = 0
    has_text: bool = False


def _tokenize(texts: Iterator[str], tokenizer: Tokenizer, tally: _Tally) -> Iterator[Ids]:
    for group in _groups(texts):
        short = group if len(group[-1]) <= PIECE_CHARACTERS else group[:-1]  # a long one ends its group
        encoded: list[Any] = _encode(short, tokenizer) if short else []
        encoded += [_encode_long(text, tokenizer) for text in group[len(short) :]]
        for text, ids in zip(group, encoded, strict=True):
            tally.documents += 1
            tally.tokens += len(ids)
            tally.has_text |= bool(text) and not text.isspace()
            yield np.asarray(ids, np.int32)


def _encode(texts: list[str], tokenizer: Tokenizer, *, special: bool = True) -> list[list[int]]:
    options = {"truncation": False, "padding": False, "verbose": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=special, **options)["input_ids"]
    return encoded


def _encode_long(text: str, tokenizer: Tokenizer) -> Ids:
    """Tokens of a document that would take too much memory at once: those of its pieces, with its special tokens."""
    (probe,), (bare,) = (_encode(["a"], tokenizer, special=special) for special in (True, False))
    start = next((i for i in range(len(probe)) if probe[i : i + len(bare)] == bare), 0)
    parts = [np.asarray(_encode([piece], tokenizer, special=False)[0], np.int32) for piece in _pieces(text)]
    return np.concatenate([np.array(probe[:start], np.int32), *parts, np.array(probe[start + len(bare) :], np.int32)])


def _pieces(text: str) -> Iterator[str]:
    """A text cut before words; where no word begins, it is not cut."""
    start = 0
    while start < len(text):
        word = _WORD.search(text, start + PIECE_CHARACTERS)
        end = word.start() if word else len(text)
        yield text[start:end]
        start = end


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = min(FIRST_DOCUMENTS, GROUP_DOCUMENTS)
    failure: Exception | None = None
    while not failure:
        try:
            group.append(next(texts))
        except (StopIteration, CorpusError) as error:
            failure = error  # raised below: the texts before a bad line may be all that is wanted
        if group and (failure or len(group) == size or sum(map(len, group)) >= GROUP_CHARACTERS):
            yield group
            group, size = [], min(2 * size, GROUP_DOCUMENTS)
    if isinstance(failure, CorpusError):
        raise failure


def _pack(documents: Iterator[Ids], eos: int | None, length: int, tally: _Tally) -> Iterator[Ids]:
    rest = np.zeros(0, np.int32)
    for ids in documents:
        end = [] if eos is None or (len(ids) and ids[-1] == eos) else [eos]
        tally.tokens += len(end)
        rest = np.concatenate([rest, ids, np.array(end, np.int32)])
        whole = len(rest) // length * length
        yield from rest[:whole].reshape(-1, length)
        rest = rest[whole:].copy()


def _truncate(documents: Iterator[Ids], length: int) -> Iterator[Ids]:
    return (ids[:length].copy() for ids in documents if len(ids))


def _padded(rows: Sequence[Ids], length: int, tokenizer: Tokenizer) -> tuple[Ids, Ids]:
    """Rows side by side, int32[rows, length], and their lengths."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids = np.full((len(rows), length), pad, np.int32)
    for target, row in zip(input_ids, rows, strict=True):
        target[: len(row)] = row
    return input_ids, np.array([len(row) for row in rows], np.int32)


def _cut(ids: Ids, lengths: Ids, skip: int, pairing: Pairing | None, rows: int) -> tuple[Shard, ...]:
    """Rows in shards of ``rows``; of paired text somewhat more, where a pair ends."""
    parts = pairing.parts(rows) if pairing else [slice(i, i + rows) for i in range(0, len(ids), rows)]
    return tuple(
        _shard(i, ids[part], lengths[part], skip, pairing and pairing.part(part)) for i, part in enumerate(parts)
    )


def _shard(shard_id: int, input_ids: Ids, lengths: Ids, skip: int, pairing: Pairing | None = None) -> Shard:
    digest = hashlib.sha256(np.array([skip, len(lengths), *lengths], "<i8").tobytes())
    for row, real in zip(input_ids, lengths, strict=True):
        digest.update(row[:real].astype("<i4").tobytes())
    if pairing:
        digest.update(pairing.encode())
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


def _require_enough(source: str, num_sequences: int, num_tokens: int, tally: _Tally, settings: Settings) -> None:
    length, skip = settings.sequence_length, settings.skip_first_tokens
    if not tally.has_text:
        raise CorpusError(f"{source} holds no text (documents read: {tally.documents}).", "Name one that holds some.")
    if not num_sequences and tally.tokens >= length:
        message = f"{source} has no sequence left after those that are skipped."
        raise CorpusError(message, "Lower `skip_sequences`, or name a longer text.")
    if not num_sequences and settings.layout == "packed":
        message = f"{source} is {tally.tokens} tokens long, too short for one sequence of {length}."
        raise CorpusError(message, "Choose a smaller `sequence_length`, or `layout` padded.")
    if not num_tokens:
        message = f"No document of {source} is longer than `skip_first_tokens`, {skip} (tokens in all: {tally.tokens})."
        raise CorpusError(message, "Lower `skip_first_tokens`, or choose `layout` packed.")
