"""Paired text as rows of tokens: a prompt and an answer each, of which only the answer counts.

Prompt and answer become tokens apart, so that an answer has the same ones after any prompt. Every answer is there
twice: after its own prompt, and after that of another pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from avss_dist.corpus.answers import Answer, paired
from avss_dist.errors import CorpusError
from avss_dist.names import AFTER_ANOTHER
from avss_dist.settings import BOOTSTRAP_SEED

Ids = NDArray[np.int32]
Encode = Callable[[list[str], bool], list[list[int]]]
"""Tokens of texts, with or without special tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairing:
    """What rows of paired text are, one entry for each.

    Attributes:
        rows: int64[rows], their places in the corpus, from 0.
        pairs: int64[rows], the index of the prompt that the answer belongs to.
        strata: the labels; of an answer after another prompt, the label and `AFTER_ANOTHER`.
        starts: int32[rows], the place of the answer's first token.
    """

    rows: NDArray[np.int64]
    pairs: NDArray[np.int64]
    strata: tuple[str, ...]
    starts: Ids

    def part(self, rows: slice) -> Pairing:
        """Some of the rows."""
        return Pairing(rows=self.rows[rows], pairs=self.pairs[rows], strata=self.strata[rows], starts=self.starts[rows])

    def encode(self) -> bytes:
        """What of it can change a number, for a hash."""
        return json.dumps([self.pairs.tolist(), self.strata, self.starts.tolist()]).encode()

    def parts(self, rows: int) -> list[slice]:
        """The rows cut after whole pairs, into parts of ``rows`` or somewhat more."""
        ends = np.flatnonzero(np.diff(self.pairs, append=-1)) + 1
        cuts = [0]
        for end in ends:
            if end - cuts[-1] >= rows or end == len(self.pairs):
                cuts.append(int(end))
        return [slice(start, end) for start, end in pairwise(cuts)]


def join(pairings: Sequence[Pairing]) -> Pairing:
    """Pairings one after another."""
    arrays = {name: np.concatenate([getattr(one, name) for one in pairings]) for name in ("rows", "pairs", "starts")}
    return Pairing(strata=tuple(stratum for one in pairings for stratum in one.strata), **arrays)


def paired_rows(
    answers: Iterator[Answer],
    source: str,
    *,
    encode: Encode,
    eos: int | None,
    length: int,
    most: int | None,
    seed: int | None,
) -> tuple[list[Ids], Pairing]:
    """The rows of paired text: pair after pair, its answers after their prompt, then after another.

    Args:
        eos: token that a tokenizer may put after a prompt, and that is left out there.
        length: tokens of a row at most.
        most: rows at most, in whole pairs.
        seed: of the order of pairs; None is that of the text.

    Raises:
        CorpusError: the answers are no pairs (see `answers.paired`), or a row is too long; the message names the line.
    """
    pairs = _first(_ordered(paired(answers, source), seed), most)
    return _rows(pairs, [("", range(len(pairs))), (AFTER_ANOTHER, _other(len(pairs)))], encode, eos, length)


def choice_rows(
    questions: Sequence[Sequence[Answer]], *, encode: Encode, eos: int | None, length: int, most: int | None
) -> tuple[list[Ids], Pairing]:
    """As `paired_rows`, of every answer to questions, after its own prompt alone.

    Raises:
        CorpusError: a row is too long, or ``most`` is less than the first question has.
    """
    ends = np.cumsum([len(answers) for answers in questions])
    kept = len(questions) if most is None else int(np.searchsorted(ends, most, side="right"))
    if not kept:
        raise CorpusError(f"The first question has {ends[0]} answers.", f"Make `max_sequences` {ends[0]} or more.")
    return _rows(questions[:kept], [("", range(kept))], encode, eos, length)


def _rows(
    pairs: Sequence[Sequence[Answer]],
    prompts_of: Sequence[tuple[str, Sequence[int] | NDArray[np.int64]]],
    encode: Encode,
    eos: int | None,
    length: int,
) -> tuple[list[Ids], Pairing]:
    """Rows of every pair; ``prompts_of`` says whose prompts its answers follow, and what that adds to the label."""
    prompts = [np.array(ids, np.int32) for ids in encode([pair[0].prompt for pair in pairs], True)]
    prompts = [ids[:-1] if len(ids) and ids[-1] == eos else ids for ids in prompts]
    rows: list[Ids] = []
    places: list[tuple[int, str, int]] = []
    for index, pair in enumerate(pairs):
        texts = [np.array(ids, np.int32) for ids in encode([answer.text for answer in pair], False)]
        for after, followed in prompts_of:
            prompt = followed[index]
            for answer, text in zip(pair, texts, strict=True):
                rows.append(np.concatenate([prompts[prompt], text]))
                places.append((index, answer.label + after, len(prompts[prompt])))
                _require_room(answer, pairs[prompt][0], len(rows[-1]), length)
    return rows, Pairing(
        rows=np.arange(len(rows)),
        pairs=np.array([pair for pair, _, _ in places], np.int64),
        strata=tuple(stratum for _, stratum, _ in places),
        starts=np.array([start for _, _, start in places], np.int32),
    )


def _ordered(pairs: list[list[Answer]], seed: int | None) -> list[list[Answer]]:
    return pairs if seed is None else [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]


def _first(pairs: list[list[Answer]], most: int | None) -> list[list[Answer]]:
    """The first pairs, whose rows are not more than ``most``."""
    ends = 2 * np.cumsum([len(pair) for pair in pairs])
    kept = len(pairs) if most is None else int(np.searchsorted(ends, most, side="right"))
    if pairs and kept < 2:
        fewest = int(ends[min(1, len(ends) - 1)])
        if len(pairs) < 2:
            raise CorpusError(f"{pairs[0][0].where}: there is one prompt.", "A contrast takes two prompts at least.")
        raise CorpusError(f"Two pairs are {fewest} rows.", f"Make `max_sequences` {fewest} or more.")
    return pairs[:kept]


def _other(count: int) -> NDArray[np.int64]:
    """For each pair another one, each once: the next in a shuffled circle."""
    order = np.random.default_rng(BOOTSTRAP_SEED).permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, 1)
    return other


def _require_room(answer: Answer, prompt: Answer, tokens: int, length: int) -> None:
    if tokens > length:
        before = "" if prompt.prompt == answer.prompt else f", after the prompt of {prompt.where},"
        raise CorpusError(
            f"{answer.where}: prompt and answer{before} are {tokens} tokens; a row has {length}.",
            f"Make `sequence_length` {tokens} or more, or leave the line out.",
        )
