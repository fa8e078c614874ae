"""Tokenization: documents become rows of tokens, in their order or in a random one."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.errors import CorpusError
from avss_dist.core.settings import TextOptions
from avss_dist.corpus.documents import Chat, Document, Tokenizer, render

Ids = NDArray[np.int32]

# Documents and characters that are tokenized at once.
GROUP_DOCUMENTS = 64
GROUP_CHARACTERS = 1 << 20
FIRST_DOCUMENTS = 4  # as many as a small corpus may need; then twice as many each time
PIECE_CHARACTERS = 4 << 20  # of a document tokenized at once, which takes over 100 bytes for each
_WORD = re.compile(r"(?= \S)|(?<=\S\n)(?=\S)")
"""Start of a word. Byte-level tokenizers take the one space before a word with it, and a line end alone."""


@dataclass
class ReadCounts:
    """Counts of the text that was read so far."""

    documents: int = 0
    rows: int = 0
    conversations: bool = False
    tokens: int = 0
    has_text: bool = False


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """Special tokens that a tokenizer puts around a text.

    Attributes:
        prefix: int32[any], tokens before the text, such as BOS or CLS.
        suffix: int32[any], tokens after the text, such as SEP.
    """

    prefix: Ids
    suffix: Ids

    def __len__(self) -> int:
        """Return the number of special tokens around a text."""
        return len(self.prefix) + len(self.suffix)

    def enclose(self, ids: Ids) -> Ids:
        """Return ``ids`` between prefix and suffix."""
        return np.concatenate([self.prefix, ids, self.suffix])

    def strip_prefix(self, ids: Ids) -> Ids:
        """Return ``ids`` without a prefix that it begins with."""
        length = len(self.prefix)
        if np.array_equal(ids[:length], self.prefix):
            return ids[length:]
        return ids


NO_SPECIAL_TOKENS = SpecialTokens(np.zeros(0, np.int32), np.zeros(0, np.int32))


def special_tokens_around(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the special tokens that ``tokenizer("a")`` puts around the tokens of the text."""
    text = encode(["a"], tokenizer, special=False)[0]
    enclosed = encode(["a"], tokenizer, special=True)[0]
    start = _place_of(text, enclosed)
    end = start + len(text)
    return SpecialTokens(np.array(enclosed[:start], np.int32), np.array(enclosed[end:], np.int32))


def _place_of(part: list[int], tokens: list[int]) -> int:
    """Return the first index at which tokens go on like a part, or 0 if they never do."""
    for start in range(len(tokens)):
        if tokens[start : start + len(part)] == part:
            return start
    return 0


def special_tokens_of_rows(tokenizer: Tokenizer, settings: TextOptions) -> SpecialTokens:
    """Return the special tokens that each packed row has around its text.

    They are those of `special_tokens_around`, as the model saw them in training, without an EOS behind the text: a row
    ends somewhere in a text, not at its end. An EOS that is also the separator (RoBERTa) stays.

    Raises:
        CorpusError: they leave no room for text in a row.
    """
    if settings.layout != "packed" or settings.row_start == "none":
        return NO_SPECIAL_TOKENS
    around = special_tokens_around(tokenizer)
    eos = tokenizer.eos_token_id
    ends_with_eos = eos is not None and around.suffix[-1:].tolist() == [eos]
    if ends_with_eos and eos != getattr(tokenizer, "sep_token_id", None):
        around = SpecialTokens(around.prefix, around.suffix[:-1])
    if len(around) >= settings.sequence_length:
        raise CorpusError(
            f"`sequence_length` {settings.sequence_length} leaves no room for text (special tokens around it that the "
            f"tokenizer adds: {len(around)}).",
            f"Make `sequence_length` {len(around) + 1} or more, or set `row_start` none.",
        )
    return around


def other_row_start(tokenizer: Tokenizer, settings: TextOptions) -> SpecialTokens | None:
    """Return the start that packed rows could have in place of theirs, or None if there is no other.

    The other start of rows with special tokens is no token. The other start of rows without is the tokenizer's own
    prefix, or its BOS, which some tokenizers define and do not add.
    """
    if settings.layout != "packed":
        return None
    if len(special_tokens_of_rows(tokenizer, settings).prefix):
        return NO_SPECIAL_TOKENS
    prefix = special_tokens_around(tokenizer).prefix
    bos = getattr(tokenizer, "bos_token_id", None)
    if not len(prefix):
        if bos is None:
            return None
        prefix = np.array([bos], np.int32)
    return SpecialTokens(prefix, NO_SPECIAL_TOKENS.suffix)


def rows_of(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    settings: TextOptions,
    counts: ReadCounts,
    around: SpecialTokens,
) -> Iterator[Ids]:
    """Yield rows of tokens, int32[up to sequence_length], of documents in order.

    Args:
        around: result of `special_tokens_of_rows`.

    Raises:
        CorpusError: a document cannot be read, or is a conversation where `TextOptions.chat_template` is not set.
    """
    texts = _document_tokens(documents, tokenizer, settings, around, counts)
    if settings.layout == "packed":
        for ids in _pack(texts, settings.sequence_length - len(around)):
            counts.rows += 1
            yield around.enclose(ids)
        return
    for ids in texts:
        if len(ids):
            counts.rows += 1
            yield ids[: settings.sequence_length].copy()


def shuffled(rows: Iterable[Ids], seed: int, maximum: int | None) -> Iterator[Ids]:
    """Yield the first rows of a random order of all rows. All are read, ``maximum`` are in memory.

    Each row gets a random number as it is read, and rows are sorted by it. Fewer rows are a prefix of more rows.

    Args:
        maximum: number of rows at most; None is all.
    """
    random = np.random.default_rng(seed)
    keyed = ((random.random(), place, row.copy()) for place, row in enumerate(rows))
    if maximum is None:
        in_order = sorted(keyed)
    else:
        in_order = heapq.nsmallest(maximum, keyed)
    return (row for _, _, row in in_order)


def _document_tokens(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    settings: TextOptions,
    around: SpecialTokens,
    counts: ReadCounts,
) -> Iterator[Ids]:
    """Yield the tokens of each document: a chat in its template, a packed text with EOS at its end.

    Args:
        around: special tokens of each row. Documents come without them.
    """
    is_packed = settings.layout == "packed"
    # Packed rows have their special tokens around each row. Others have them around each document.
    special = not is_packed or settings.row_start == "none"
    eos = tokenizer.eos_token_id if is_packed else None
    for are_chats, group in groupby(documents, lambda document: isinstance(document, Chat)):
        texts = (render(document, tokenizer, chats=settings.chat_template) for document in group)
        for ids in _tokenize(texts, tokenizer, counts, special=special and not are_chats):
            if are_chats:
                counts.conversations = True
                yield around.strip_prefix(ids)
            elif eos is None or (len(ids) and ids[-1] == eos):
                yield ids
            else:
                counts.tokens += 1
                yield np.append(ids, np.int32(eos))


def _tokenize(texts: Iterator[str], tokenizer: Tokenizer, counts: ReadCounts, *, special: bool) -> Iterator[Ids]:
    """Yield the tokens of each text, and count them."""
    for group in _groups(texts):
        for text, ids in zip(group, _tokenize_group(group, tokenizer, special=special), strict=True):
            counts.documents += 1
            counts.tokens += len(ids)
            if text and not text.isspace():
                counts.has_text = True
            yield ids


def _tokenize_group(texts: list[str], tokenizer: Tokenizer, *, special: bool) -> list[Ids]:
    """Return the tokens of texts, of which only the last one may be long: a long text ends its group."""
    last = texts[-1]
    is_long = len(last) > PIECE_CHARACTERS
    short = texts[:-1] if is_long else texts
    tokens: list[Ids] = []
    if short:
        tokens += [np.asarray(ids, np.int32) for ids in encode(short, tokenizer, special=special)]
    if is_long:
        tokens.append(_encode_long(last, tokenizer, special=special))
    return tokens


def encode(texts: list[str], tokenizer: Tokenizer, *, special: bool) -> list[list[int]]:
    """Return the tokens of texts, with or without the special tokens that the tokenizer puts around them.

    Args:
        texts: at least one, as tokenizers refuse an empty list.
    """
    return list(
        tokenizer(
            texts,
            add_special_tokens=special,
            truncation=False,
            padding=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
    )


def _encode_long(text: str, tokenizer: Tokenizer, *, special: bool) -> Ids:
    """Return the tokens of a long document, tokenized in pieces to save memory, with its special tokens."""
    parts: list[Ids] = []
    for piece in _pieces(text):
        ids = encode([piece], tokenizer, special=False)[0]
        parts.append(np.asarray(ids, np.int32))
    around = special_tokens_around(tokenizer) if special else NO_SPECIAL_TOKENS
    return around.enclose(np.concatenate(parts))


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that begin with a word, or in one piece if it has no words."""
    start = 0
    while start < len(text):
        word = _WORD.search(text, start + PIECE_CHARACTERS)
        end = word.start() if word else len(text)
        yield text[start:end]
        start = end


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield texts in groups that are tokenized at once: few at first, as a reader may want no more.

    Raises:
        CorpusError: a text cannot be read. The texts before it come first, as they may be all that is wanted.
    """
    group: list[str] = []
    characters = 0
    size = min(FIRST_DOCUMENTS, GROUP_DOCUMENTS)
    failure: CorpusError | None = None
    while True:
        try:
            text = next(texts)
        except StopIteration:
            break
        except CorpusError as error:
            failure = error
            break
        group.append(text)
        characters += len(text)
        if len(group) == size or characters >= GROUP_CHARACTERS:
            yield group
            group = []
            characters = 0
            size = min(2 * size, GROUP_DOCUMENTS)
    if group:
        yield group
    if failure is not None:
        raise failure


def _pack(documents: Iterator[Ids], length: int) -> Iterator[Ids]:
    pending = np.zeros(0, np.int32)
    for ids in documents:
        pending = np.concatenate([pending, ids])
        whole = len(pending) // length * length
        yield from pending[:whole].reshape(-1, length)
        pending = pending[whole:].copy()
