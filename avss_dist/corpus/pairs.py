"""Paired text as rows of tokens. Each row is a prompt and an answer, of which only the answer counts.

Prompt and answer are tokenized separately, so that an answer has the same tokens after any prompt. Every answer occurs
twice: after its own prompt, and after the prompt of another pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.errors import CorpusError
from avss_dist.core.settings import TextOptions
from avss_dist.corpus.documents import Answer, Tokenizer
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.corpus.tokens import Ids, encode

_SHUFFLE_SEED = 0  # of the order in which answers get the prompts of others


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairing:
    """Origin of each row of paired text.

    Attributes:
        rows: int64[rows], indices of the rows in the corpus.
        pairs: int64[rows], index of the prompt that the answer belongs to.
        strata: label of each row, followed by `AFTER_ANOTHER` if the answer follows another prompt.
        starts: int32[rows], index of the answer's first token.
    """

    rows: NDArray[np.int64]
    pairs: NDArray[np.int64]
    strata: tuple[str, ...]
    starts: Ids

    def part(self, rows: slice) -> Pairing:
        """Return the pairing of some of the rows."""
        return Pairing(rows=self.rows[rows], pairs=self.pairs[rows], strata=self.strata[rows], starts=self.starts[rows])

    def parts(self, rows: int) -> list[slice]:
        """Return slices of whole pairs, each of ``rows`` rows or somewhat more."""
        ends = np.flatnonzero(np.diff(self.pairs, append=-1)) + 1
        cuts = [0]
        for end in ends:
            if end - cuts[-1] >= rows or end == len(self.pairs):
                cuts.append(int(end))
        return [slice(start, end) for start, end in pairwise(cuts)]


def join(pairings: Sequence[Pairing]) -> Pairing:
    """Return the concatenation of pairings."""
    arrays = {name: np.concatenate([getattr(part, name) for part in pairings]) for name in ("rows", "pairs", "starts")}
    return Pairing(strata=tuple(stratum for part in pairings for stratum in part.strata), **arrays)


def paired_rows(
    answers: Iterator[Answer], source: str, tokenizer: Tokenizer, settings: TextOptions
) -> tuple[list[Ids], Pairing]:
    """Return the rows of paired text, pair by pair: its answers after their own prompt, then after another.

    Pairs are whole, and in the order of the text unless it is shuffled.

    Raises:
        CorpusError: the answers do not form pairs (see `group_by_prompt`), or a row is too long. The message
            names the line.
    """
    pairs = group_by_prompt(answers, source)
    if settings.shuffle_seed is not None:
        pairs = [pairs[i] for i in np.random.default_rng(settings.shuffle_seed).permutation(len(pairs))]
    ends = 2 * np.cumsum([len(pair) for pair in pairs])
    number = num_whole(ends, settings.max_sequences)
    if len(pairs) < 2:
        raise CorpusError(f"{pairs[0][0].where}: there is one prompt.", "A contrast takes two prompts at least.")
    if number < 2:
        raise CorpusError(f"Two pairs are {ends[1]} rows.", f"Make `max_sequences` {ends[1]} or more.")
    pairs = pairs[:number]
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(pairs))
    other = np.empty(len(pairs), np.int64)
    other[order] = np.roll(order, 1)  # the next pair in a shuffled circle
    return rows_of_pairs(pairs, [("", range(len(pairs))), (AFTER_ANOTHER, other)], tokenizer, settings)


def num_whole(ends: NDArray[np.int64], maximum: int | None) -> int:
    """Return how many pairs fit into a maximum of rows.

    Args:
        ends: number of rows up to the end of each pair.
    """
    return len(ends) if maximum is None else int(np.searchsorted(ends, maximum, side="right"))


def group_by_prompt(answers: Iterable[Answer], source: str) -> list[list[Answer]]:
    """Return answers grouped by prompt, in the order in which prompts first occur. A repeated answer counts once.

    Raises:
        CorpusError: there are no answers, all answers, or all answers to one prompt, have the same label, or one answer
            to a prompt has two labels.
    """
    pairs: dict[str, list[Answer]] = {}
    first: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        same = first.setdefault((answer.prompt, answer.text), answer)
        if same.label != answer.label:
            raise CorpusError(
                f"{answer.where}: this answer is labelled '{answer.label}', and '{same.label}' at {same.where}.",
                "Give different answers to the labels of a prompt, or leave both lines out.",
            )
        if same is answer:
            pairs.setdefault(answer.prompt, []).append(answer)
    if not pairs:
        raise CorpusError(f"{source} holds no text (documents read: 0).", "Name one that holds some.")
    labels = sorted({answer.label for pair in pairs.values() for answer in pair})
    if len(labels) == 1:
        raise CorpusError(
            f"Every answer of {source} is labelled '{labels[0]}'.",
            "A contrast takes two labels: give both kinds of answers, or name another field.",
        )
    for pair in pairs.values():
        if len({answer.label for answer in pair}) == 1:
            raise CorpusError(
                f"{pair[0].where}: the answers to this prompt are all labelled '{pair[0].label}'.",
                "Give each prompt answers of two labels, or leave it out.",
            )
    return list(pairs.values())


def rows_of_pairs(
    pairs: Sequence[Sequence[Answer]],
    prompts_of: Sequence[tuple[str, Sequence[int] | NDArray[np.int64]]],
    tokenizer: Tokenizer,
    settings: TextOptions,
) -> tuple[list[Ids], Pairing]:
    """Return the rows of every pair. An EOS token after a prompt is left out.

    Args:
        prompts_of: suffixes of labels, each with the index of the prompt that the answers of each pair follow.

    Raises:
        CorpusError: a row is too long.
    """
    prompts = [np.array(ids, np.int32) for ids in encode([pair[0].prompt for pair in pairs], tokenizer, special=True)]
    prompts = [ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_token_id else ids for ids in prompts]
    rows: list[Ids] = []
    places: list[tuple[int, str, int]] = []
    for index, pair in enumerate(pairs):
        texts = [np.array(ids, np.int32) for ids in encode([answer.text for answer in pair], tokenizer, special=False)]
        for after, followed in prompts_of:
            prompt = followed[index]
            for answer, text in zip(pair, texts, strict=True):
                rows.append(np.concatenate([prompts[prompt], text]))
                places.append((index, answer.label + after, len(prompts[prompt])))
                tokens = len(rows[-1])
                if tokens > settings.sequence_length:
                    other = "" if prompt == index else f", after the prompt of {pairs[prompt][0].where},"
                    raise CorpusError(
                        f"{answer.where}: prompt and answer{other} are {tokens} tokens; a row has "
                        f"{settings.sequence_length}.",
                        f"Make `sequence_length` {tokens} or more, or leave the line out.",
                    )
    return rows, Pairing(
        rows=np.arange(len(rows)),
        pairs=np.array([pair for pair, _, _ in places], np.int64),
        strata=tuple(stratum for _, stratum, _ in places),
        starts=np.array([start for _, _, start in places], np.int32),
    )
