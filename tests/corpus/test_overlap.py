"""Overlap of texts: what shares passages and what shares boilerplate, whatever cuts the text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.texts import LETTERS, SAME, TEXT, sentences
from transformers import AutoTokenizer

from avss_dist.core.settings import Settings
from avss_dist.corpus import overlap
from avss_dist.corpus.overlap import PASSAGE, SHORTEST, shared_text
from avss_dist.corpus.shards import Shard, tokenize_corpus

Read = Callable[..., Sequence[Shard]]
LICENSE = (
    "Licensed under the terms that stand in the file LICENSE, which comes with this file. You may not use this file "
    "except in compliance with them. Unless required by law or agreed to in writing, all of it is distributed as it "
    "is, without warranties or conditions of any kind, either express or implied.\n"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def shards(tokenizer: Any, tmp_path: Path) -> Read:
    """The rows of a text, or of documents."""

    def read(text: str | Sequence[str], **options: Any) -> Sequence[Shard]:
        file = tmp_path / ("text.txt" if isinstance(text, str) else "documents.jsonl")
        lines = [text] if isinstance(text, str) else [json.dumps({"text": document}) + "\n" for document in text]
        file.write_bytes("".join(lines).encode())
        settings = Settings(**{"sequence_length": 16, "sequences_per_shard": 5, **options})
        return tokenize_corpus(str(file), tokenizer, settings).shards

    return read


@pytest.mark.parametrize("length", [4, 16, 128])
@pytest.mark.parametrize("name", SAME)
def test_the_same_text_is_known_however_it_is_wrapped(name: str, length: int, shards: Read, tokenizer: Any) -> None:
    seen, read = (shards(text, sequence_length=length) for text in (TEXT, SAME[name]))
    shared = shared_text(seen, read, tokenizer)
    assert shared is not None
    assert shared > (0.4 if "reversed" in name else 0.9)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("words", [4, 12])
def test_documents_in_another_order_are_the_same_text(words: int, layout: str, shards: Read, tokenizer: Any) -> None:
    """Those of fewer characters than a passage too, which are compared as a whole."""
    documents = sentences(100, seed=2, words=words)
    length = {"layout": layout, "sequence_length": 96}
    shared = shared_text(shards(documents, **length), shards(documents[::-1], **length), tokenizer)
    assert shared is not None
    assert shared > 0.9


def test_rows_in_another_order_are_the_same_text(shards: Read, tokenizer: Any) -> None:
    for length in (16, 24, 64):
        mixed = shards(TEXT, sequence_length=length, shuffle_seed=3)
        shared = shared_text(shards(TEXT, sequence_length=length), mixed, tokenizer)
        assert shared is not None
        assert shared > 0.1


def test_special_tokens_are_no_text(shards: Read, tokenizer: Any) -> None:
    """Rows that begin with BOS, of which some are cut elsewhere, hold the same text."""
    plain = shards(TEXT, sequence_length=15)
    begun = [
        replace(
            shard,
            input_ids=np.insert(shard.input_ids, 0, tokenizer.bos_token_id, axis=1),
            lengths=(shard.lengths + 1).astype(np.int32),
        )
        for shard in plain
    ]
    assert shared_text(begun, plain, tokenizer) == shared_text(plain, begun, tokenizer) == 1
    assert (shared_text(shards(TEXT, sequence_length=16), begun, tokenizer) or 0) > 0.9


@pytest.mark.parametrize(
    ("seen", "read"),
    [
        pytest.param(TEXT, "\n".join(sentences(60, seed=5)), id="another text"),
        pytest.param(
            [LICENSE + "".join(sentences(9, seed=seed)) for seed in range(10, 20)],
            [LICENSE + "".join(sentences(9, seed=seed)) for seed in range(20, 30)],
            id="license headers",
        ),
        pytest.param(
            [LICENSE + "".join(sentences(9, seed=seed)) for seed in range(10, 20)],
            [LICENSE + "".join(sentences(90, seed=20))],
            id="a license header that one of both has once",
        ),
        pytest.param(
            "".join(f" = = Early life and career = = \n {s} {s[::-1]} \n" for s in sentences(40, seed=6)),
            "".join(f" = = Early life and career = = \n {s} {s[::-1]} \n" for s in sentences(40, seed=7)),
            id="headings",
        ),
        pytest.param(
            [*(f"{s} Thank you very much." for s in sentences(40, seed=8)), *["Yes, of course."] * 20],
            [*(f"{s} Thank you very much." for s in sentences(40, seed=9)), *["Yes, of course."] * 20],
            id="phrases",
        ),
        pytest.param(
            [*sentences(12, seed=8), "This stands in either of these texts, and in many others."],
            [*sentences(12, seed=9), "This stands in either of these texts, and in many others."],
            id="a phrase in little text",
        ),
    ],
)
def test_text_of_one_kind_is_not_the_same_text(seen: Any, read: Any, shards: Read, tokenizer: Any) -> None:
    for length in (16, 128):
        shared = shared_text(shards(seen, sequence_length=length), shards(read, sequence_length=length), tokenizer)
        assert shared is not None
        assert shared < 0.03


def test_a_text_that_repeats_itself_is_known(shards: Read, tokenizer: Any) -> None:
    text = "It was the best of times, it was the worst of times. " * 50
    assert (shared_text(shards(text), shards(text[:1000]), tokenizer) or 0) > 0.9
    assert (shared_text(shards(TEXT + TEXT), shards(TEXT), tokenizer) or 0) > 0.9


def test_every_shared_passage_of_that_length_has_a_fingerprint() -> None:
    rng = random.Random(4)

    def letters(number: int) -> str:
        return "".join(rng.choice(LETTERS) for _ in range(number))

    for _ in range(300):
        passage = letters(PASSAGE)
        one, other = (letters(rng.randint(0, 90)) + passage + letters(rng.randint(0, 90)) for _ in range(2))
        assert np.intersect1d(overlap._winnow(one), overlap._winnow(other)).size
    unlike = [overlap._winnow(letters(200)) for _ in range(50)]
    assert len(np.unique(np.concatenate(unlike))) == sum(map(len, unlike))
    assert sum(map(len, unlike)) < 0.3 * 50 * 200


def test_passages_are_known_across_blocks(shards: Read, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shared_text(shards(TEXT), shards(SAME["wrapped again"]), tokenizer)
    monkeypatch.setattr(overlap, "BLOCK_TOKENS", 1)
    assert len([*overlap._fingerprints(shards(TEXT), tokenizer)]) > 20
    apart = shared_text(shards(TEXT), shards(SAME["wrapped again"]), tokenizer)
    assert whole is not None
    assert apart == pytest.approx(whole, abs=0.05)


def test_what_cannot_be_compared_is_not_called_different(shards: Read, tokenizer: Any) -> None:
    short = shards(["a" * (SHORTEST - 1), "yes"], layout="padded", sequence_length=32)
    long = shards(TEXT)
    assert shared_text(short, long, tokenizer) is None
    assert shared_text(long, short, tokenizer) is None
    assert shared_text(long, [], tokenizer) is None
