"""Paired text as rows of tokens. Each row is a prompt and an answer, of which only the answer counts.

Prompt and answer are tokenized separately, so that an answer has the same tokens after any prompt. Every answer occurs
twice: after its own prompt, and after the prompt of another pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

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
    return Pairing(
        rows=np.concatenate([part.rows for part in pairings]),
        pairs=np.concatenate([part.pairs for part in pairings]),
        strata=tuple(chain.from_iterable(part.strata for part in pairings)),
        starts=np.concatenate([part.starts for part in pairings]),
    )


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
        shuffled_order = np.random.default_rng(settings.shuffle_seed).permutation(len(pairs))
        pairs = [pairs[index] for index in shuffled_order]
    ends = 2 * np.cumsum([len(pair) for pair in pairs])
    number = num_whole(ends, settings.max_sequences)
    if len(pairs) < 2:
        raise CorpusError(f"{pairs[0][0].where}: there is one prompt.", "A contrast takes two prompts at least.")
    if number < 2:
        raise CorpusError(f"Two pairs are {ends[1]} rows.", f"Make `max_sequences` {ends[1]} or more.")
    pairs = pairs[:number]
    own_prompts = range(len(pairs))
    other_prompts = _other_prompts(len(pairs))
    return rows_of_pairs(pairs, [("", own_prompts), (AFTER_ANOTHER, other_prompts)], tokenizer, settings)


def _other_prompts(number: int) -> NDArray[np.int64]:
    """Return the index of another pair for each pair: its neighbour in a shuffled circle."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(number)
    others = np.empty(number, np.int64)
    others[order] = np.roll(order, 1)
    return others


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
    first_answers: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        first = first_answers.setdefault((answer.prompt, answer.text), answer)
        if first.label != answer.label:
            raise CorpusError(
                f"{answer.where}: this answer is labelled '{answer.label}', and '{first.label}' at {first.where}.",
                "Give different answers to the labels of a prompt, or leave both lines out.",
            )
    if not first_answers:
        raise CorpusError(f"{source} holds no text (documents read: 0).", "Name one that holds some.")
    _require_two_labels(first_answers.values(), source)
    pairs: dict[str, list[Answer]] = {}
    for answer in first_answers.values():
        pairs.setdefault(answer.prompt, []).append(answer)
    for pair in pairs.values():
        if len({answer.label for answer in pair}) == 1:
            raise CorpusError(
                f"{pair[0].where}: the answers to this prompt are all labelled '{pair[0].label}'.",
                "Give each prompt answers of two labels, or leave it out.",
            )
    return list(pairs.values())


def _require_two_labels(answers: Iterable[Answer], source: str) -> None:
    labels = {answer.label for answer in answers}
    if len(labels) == 1:
        raise CorpusError(
            f"Every answer of {source} is labelled '{labels.pop()}'.",
            "A contrast takes two labels: give both kinds of answers, or name another field.",
        )


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
    prompts = _prompt_tokens(pairs, tokenizer)
    rows: list[Ids] = []
    indices: list[int] = []
    strata: list[str] = []
    starts: list[int] = []
    for index, pair in enumerate(pairs):
        texts = encode([answer.text for answer in pair], tokenizer, special=False)
        for suffix, followed in prompts_of:
            followed_index = followed[index]
            prompt = prompts[followed_index]
            for answer, text in zip(pair, texts, strict=True):
                row = np.concatenate([prompt, np.array(text, np.int32)])
                if len(row) > settings.sequence_length:
                    other = "" if followed_index == index else pairs[followed_index][0].where
                    raise _too_long_row(answer, other, len(row), settings.sequence_length)
                rows.append(row)
                indices.append(index)
                strata.append(answer.label + suffix)
                starts.append(len(prompt))
    return rows, Pairing(
        rows=np.arange(len(rows)),
        pairs=np.array(indices, np.int64),
        strata=tuple(strata),
        starts=np.array(starts, np.int32),
    )


def _prompt_tokens(pairs: Sequence[Sequence[Answer]], tokenizer: Tokenizer) -> list[Ids]:
    """Return the tokens of the prompt of each pair, without an EOS token at the end."""
    prompts: list[Ids] = []
    for ids in encode([pair[0].prompt for pair in pairs], tokenizer, special=True):
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        prompts.append(np.array(ids, np.int32))
    return prompts


def _too_long_row(answer: Answer, other_prompt: str, tokens: int, sequence_length: int) -> CorpusError:
    """Return the error for a row that is too long.

    Args:
        other_prompt: file and line of the prompt that the answer follows; empty if it is its own.
    """
    after = f", after the prompt of {other_prompt}," if other_prompt else ""
    return CorpusError(
        f"{answer.where}: prompt and answer{after} are {tokens} tokens; a row has {sequence_length}.",
        f"Make `sequence_length` {tokens} or more, or leave the line out.",
    )
