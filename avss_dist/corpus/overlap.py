"""Passages that two texts share, regardless of line ends, wrapping, rows and order of documents.

Texts are compared without special tokens and without whitespace. Each is reduced to fingerprints by winnowing
(Schleimer, Wilkerson and Aiken, SIGMOD 2003): of every `WINDOW` neighbouring hashes of `GRAM` characters, the least.
Two texts that share `PASSAGE` characters in a row therefore share a fingerprint, wherever the passage begins in each,
while only about 2 of `WINDOW` + 1 hashes are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from avss_dist.core.errors import AvssError, ConfigError
from avss_dist.corpus.documents import Tokenizer
from avss_dist.corpus.seen import SeenText
from avss_dist.corpus.shards import CorpusPlan, Shard, tokenize_corpus
from avss_dist.corpus.tokens import Ids

Hashes = NDArray[np.uint64]

GRAM = 32  # characters in a hash
WINDOW = 8  # hashes in a window
PASSAGE = GRAM + WINDOW - 1  # characters, without whitespace, that two texts share before a fingerprint is the same
SHORTEST = 16  # characters of a document or row that is compared as a whole; a shorter one is too common to tell
FEW = 10  # shared fingerprints, some 80 characters: a phrase that any two texts of one kind may share
BLOCK_TOKENS = 1 << 20  # decoded at once
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(GRAM)], np.uint64)
_END = -1  # in place of the token that ends a document
_NONE: Hashes = np.zeros(0, np.uint64)


MAX_SHARED = 0.03  # share of a text's passages that seen text may have; other rows of the same text repeat fewer


def shared_text(reference: Iterable[Shard], read: Iterable[Shard], tokenizer: Tokenizer) -> float | None:
    """Return the share of the passages of ``read`` that are in ``reference`` too, from 0 to 1.

    Each passage counts once. One that is repeated within either text, such as a license header, does not tell where a
    text is from, and does not count unless most are repeated. `FEW` shared ones do not count unless they are half of
    ``read``. Memory grows with ``read``, by some 20 bytes for each token, and not with ``reference``.

    Args:
        tokenizer: a transformers tokenizer, that of both texts.

    Returns:
        None if one of the two has no passage to compare: no document or row of `SHORTEST` characters.
    """
    read_hashes = np.concatenate([_NONE, *_fingerprints(read, tokenizer)])
    passages, counts = np.unique(read_hashes, return_counts=True)
    if not len(passages):
        return None
    in_reference = np.zeros(len(passages), np.int64)
    is_comparable = False
    for hashes in _fingerprints(reference, tokenizer):
        is_comparable = True
        places = np.searchsorted(passages, hashes).clip(max=len(passages) - 1)
        is_shared = passages[places] == hashes
        np.add.at(in_reference, places[is_shared], 1)
    if not is_comparable:
        return None
    is_distinctive = (counts < 2) & (in_reference < 2)
    if 2 * is_distinctive.sum() < len(passages):
        is_distinctive[:] = True
    shared = in_reference[is_distinctive] > 0
    if shared.sum() <= min(FEW, len(shared) // 2):
        return 0.0
    return float(shared.mean())


def read_again(seen: SeenText, tokenizer: Tokenizer, corpus: str) -> CorpusPlan:
    """Return the rows of a text that was read before.

    Args:
        tokenizer: a transformers tokenizer, that of the earlier reading.
        corpus: name of the text, with the keys of its URI.

    Raises:
        ConfigError: it cannot be read, or has changed.
    """
    hint = "Put it back, or set `allow_overlap` and know that nothing may be held out from it."
    try:
        text = tokenize_corpus(corpus, tokenizer, seen.settings)
    except AvssError as error:
        raise ConfigError(f"The text of {seen.reader} cannot be read again: {error.message}", hint) from error
    if not seen.is_of(text):
        raise ConfigError(f"The text of {seen.reader} has changed since it was read: {text.source}.", hint)
    return text


def plain_text(ids: Iterable[Ids], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each sequence of tokens, without special tokens and whitespace."""
    sequences = [part.tolist() for part in ids]
    decoded = tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ["".join(text.split()) for text in decoded]


def _fingerprints(shards: Iterable[Shard], tokenizer: Tokenizer) -> Iterator[Hashes]:
    """Yield the fingerprints of a text, of many documents at once. Fingerprints of repeated passages repeat."""
    tail = ""
    for rows, width in _blocks(shards):
        documents = plain_text(_documents(rows, width, tokenizer.eos_token_id), tokenizer)
        documents[0] = tail + documents[0]
        tail = documents[-1][-(PASSAGE - 1) :]
        hashes = np.concatenate([_winnow(text) for text in documents])
        # A short row within a longer document may be all that a text has of it.
        short_rows = plain_text([row for row in rows if len(row) < PASSAGE], tokenizer)
        short_hashes = [_winnow(text) for text in short_rows if len(text) < PASSAGE]
        new_hashes = np.setdiff1d(np.concatenate([_NONE, *short_hashes]), hashes)
        block = np.concatenate([hashes, new_hashes])
        if len(block):
            yield block


def _blocks(shards: Iterable[Shard]) -> Iterator[tuple[list[Ids], int]]:
    """Yield rows of tokens, without padding, about `BLOCK_TOKENS` at a time, and their width."""
    rows: list[Ids] = []
    width = 0
    tokens = 0
    for shard in shards:
        width = shard.input_ids.shape[1]
        rows += [row[:length] for row, length in zip(shard.input_ids, shard.lengths, strict=True)]
        tokens += shard.input_ids.size
        if tokens >= BLOCK_TOKENS:
            yield rows, width
            rows = []
            tokens = 0
    if rows:
        yield rows, width


def _documents(rows: Sequence[Ids], width: int, eos: int | None) -> list[Ids]:
    """Return rows joined, and cut where a document ends: at EOS, and after a row that is padded."""
    end = np.array([_END], np.int32)
    parts: list[Ids] = []
    for row in rows:
        parts.append(row)
        if len(row) < width:
            parts.append(end)
    ids = np.concatenate(parts)
    if eos is not None:
        ids = np.where(ids == eos, _END, ids)
    ends = np.flatnonzero(ids == _END)
    return [document[document != _END] for document in np.split(ids, ends)]


def _winnow(text: str) -> Hashes:
    """Return the fingerprints of one document, in order. A document that is too short is one passage."""
    if len(text) < SHORTEST:
        return _NONE
    hashes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(hashes) < PASSAGE:
        hashes = np.resize(hashes, PASSAGE)  # repeats it
    # A polynomial of each `GRAM` characters, modulo 2^64.
    hashes = np.convolve(hashes * _MIX, _POWERS, "valid")
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIX
    # The least of each `WINDOW` neighbours.
    hashes = sliding_window_view(hashes, len(hashes) - WINDOW + 1).min(axis=0)
    differs_from_last = np.append(True, hashes[1:] != hashes[:-1])
    return hashes[differs_from_last]
