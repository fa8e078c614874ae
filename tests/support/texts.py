"""Seeded texts of random words, and one text written in several ways."""

from __future__ import annotations

import random

LETTERS = "abcdefghiklmnoprstuvw"


def sentences(number: int, seed: int, words: int = 12) -> list[str]:
    """Sentences of random words, no two alike."""
    rng = random.Random(seed)
    return [_sentence(rng, words) for _ in range(number)]


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(_word(rng) for _ in range(words)) + "."


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 8)))


TEXT = "\n".join(sentences(60, seed=1))
SAME = {
    "the same": TEXT,
    "wrapped again": "\n".join(word for word in TEXT.split()),
    "doubled newlines": TEXT.replace("\n", "\n\n"),
    "other line ends": TEXT.replace("\n", "\r\n"),
    "indented": TEXT.replace("\n", "\n\t  "),
    "its second half": TEXT[len(TEXT) // 2 :],
    "its lines reversed": "\n".join(reversed(TEXT.split("\n"))),
}
