"""Paired text as people send it: repeated lines, one answer under two labels, blanks around labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from corpus.test_corpus import TOKENIZER
from corpus.test_pairs import LINES, SMALL, write

from avss_dist.core.errors import CorpusError
from avss_dist.corpus.shards import tokenize_corpus


def test_a_repeated_answer_counts_once(tmp_path: Path) -> None:
    once = tokenize_corpus(write(tmp_path / "once.jsonl", LINES), TOKENIZER, SMALL)
    twice = tokenize_corpus(write(tmp_path / "twice.jsonl", [*LINES, *LINES]), TOKENIZER, SMALL)
    assert twice.tokens_fingerprint == once.tokens_fingerprint


def test_an_answer_with_two_labels_is_refused_with_both_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [*LINES, {"q": "w3", "a": "w9", "label": "good"}])
    with pytest.raises(CorpusError, match=r"line 6: this answer is labelled 'good', and 'bad' at .*line 4"):
        tokenize_corpus(source, TOKENIZER, SMALL)


def test_blanks_around_a_label_make_no_other_label(tmp_path: Path) -> None:
    lines = [{**line, "label": f"{line['label']}{' ' * (i % 2)}"} for i, line in enumerate(LINES)]
    assert len({json.dumps(line["label"]) for line in lines}) == 4
    blank, plain = (write(tmp_path / name, rows) for name, rows in (("blank.jsonl", lines), ("plain.jsonl", LINES)))
    pairings = [[s.pairing for s in tokenize_corpus(source, TOKENIZER, SMALL).shards] for source in (blank, plain)]
    for read, expected in zip(*pairings, strict=True):
        assert read is not None and expected is not None and read.strata == expected.strata
        assert np.array_equal(read.pairs, expected.pairs)
