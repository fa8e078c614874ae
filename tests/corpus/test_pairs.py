"""Paired text: rows, pairs that stay whole, and what is wrong with a file, by its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus.test_corpus import TOKENIZER, word_ids

from avss_dist.core.errors import CorpusError
from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.corpus.sources import documents

SMALL = Settings(sequence_length=8, sequences_per_shard=3)
LINES = [
    {"q": "w0 w1", "a": "w2", "label": "good"},
    {"q": "w3", "a": "w4 w5", "label": "good"},
    {"q": "w0 w1", "a": "w6 w7 w8", "label": "bad"},
    {"q": "w3", "a": "w9", "label": "bad"},
    {"q": "w3", "a": "w10", "label": "bad"},
]


def write(path: Path, lines: Sequence[Any]) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return f"{path}:q+a"


def test_rows_are_prompts_and_answers_of_which_the_answers_count(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", LINES)
    made = tokenize_corpus(source, TOKENIZER, SMALL)
    assert list(documents(source))[:2] == ["w0 w1 w2", "w3 w4 w5"]
    first, second = made.shards
    assert first.pairing is not None and second.pairing is not None
    assert first.pairing.strata == ("good", "bad", f"good{AFTER_ANOTHER}", f"bad{AFTER_ANOTHER}")
    assert (*first.pairing.pairs, *second.pairing.pairs) == (0,) * 4 + (1,) * 6
    (batch, _) = first.batches(3)
    rows = [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert rows == [word_ids("w0 w1 w2"), word_ids("w0 w1 w6 w7 w8"), word_ids("w3 w2")]
    counted = [ids[seen].tolist() for ids, seen in zip(batch.input_ids, batch.observed, strict=True)]
    assert counted == [word_ids("w2"), word_ids("w6 w7 w8"), word_ids("w2")]
    assert made.num_tokens == 2 * sum(len(line["a"].split()) for line in LINES)
    again = made.recut(100)
    assert [shard.num_sequences for shard in again.shards] == [10]
    assert again.recut(3).tokens_fingerprint == made.tokens_fingerprint


def test_a_table_has_the_fingerprint_of_its_lines_and_labels_count(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["label", "a", "q"])
        table.writeheader()
        table.writerows(LINES)
    other = [{**line, "label": {"good": "bad", "bad": "good"}[line["label"]]} for line in LINES]
    sources = [write(tmp_path / "p.jsonl", LINES), f"{tmp_path}/p.csv:q+a", write(tmp_path / "other.jsonl", other)]
    lines, rows, swapped = (tokenize_corpus(source, TOKENIZER, SMALL).tokens_fingerprint for source in sources)
    assert lines == rows != swapped


def test_whole_pairs_are_read_up_to_the_most_rows(tmp_path: Path) -> None:
    lines = [{"q": f"w{i}", "a": f"w1{label}", "label": label} for i in range(9) for label in "ab"]
    source = write(tmp_path / "p.jsonl", lines)
    made = tokenize_corpus(source, TOKENIZER, Settings(sequence_length=8, max_sequences=15))
    assert made.num_sequences == 12
    for shard in made.shards:
        assert shard.pairing is not None
        prompts = shard.input_ids[np.arange(12), 0].reshape(3, 4)
        assert (prompts[:, 0] != prompts[:, 2]).all()


def test_truthfulqa_draws_an_incorrect_answer_by_its_seed(tmp_path: Path) -> None:
    lines = [
        {
            "question": f"w{i}",
            "best_answer": "w1.",
            "correct_answers": [],
            "incorrect_answers": [f"w{j}" for j in "234"],
        }
        for i in range(8)
    ]
    write(tmp_path / "t.jsonl", lines)
    first, same, other = (list(documents(f"truthfulqa:{tmp_path}/t.jsonl{seed}")) for seed in ("", ":0", ":1"))
    assert first == same != other
    assert first[0] == "Q: w0\nA: w1."
    write(tmp_path / "t.jsonl", list(reversed(lines)))
    assert sorted(documents(f"truthfulqa:{tmp_path}/t.jsonl")) == sorted(first)


PAIR = LINES[:1] + LINES[2:3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES[:2], "Every answer of p.jsonl:q+a is labelled 'good'."),
        ([*PAIR, LINES[1]], "p.jsonl, line 3: the answers to this prompt are all labelled 'good'."),
        ([*PAIR, {**LINES[1], "a": " "}], "p.jsonl, line 3: the answer is empty."),
        ([*PAIR * 8, {"q": "w3", "a": "w1"}], "p.jsonl, line 17: no field 'label'."),
        ([*PAIR, {**LINES[1], "label": 1}], "p.jsonl, line 3: 'label' is not text but 1."),
        ([*LINES[:1], {**LINES[2], "a": "w1 " * 9}], "p.jsonl, line 1: there is one prompt."),
        ([*LINES, {**LINES[1], "a": "w1 " * 9}], "p.jsonl, line 6: prompt and answer are 10 tokens; a row has 8."),
        ([*PAIR, "text"], "p.jsonl, line 3 is not a JSON object."),
        ([], "p.jsonl:q+a holds no text (documents read: 0)."),
        (
            [*LINES, {"q": "w3", "a": "w9", "label": "good"}],
            "p.jsonl, line 6: this answer is labelled 'good', and 'bad' at p.jsonl, line 4.",
        ),
    ],
)
def test_a_mistake_in_a_file(
    lines: Sequence[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", lines)
    with pytest.raises(CorpusError) as caught:
        tokenize_corpus("p.jsonl:q+a", TOKENIZER, SMALL)
    assert caught.value.message.replace(f"{tmp_path}/", "") == message
    assert caught.value.hint


def test_a_repeated_answer_counts_once(tmp_path: Path) -> None:
    once = tokenize_corpus(write(tmp_path / "once.jsonl", LINES), TOKENIZER, SMALL)
    twice = tokenize_corpus(write(tmp_path / "twice.jsonl", [*LINES, *LINES]), TOKENIZER, SMALL)
    assert twice.tokens_fingerprint == once.tokens_fingerprint


def test_blanks_around_a_label_make_no_other_label(tmp_path: Path) -> None:
    lines = [{**line, "label": f"{line['label']}{' ' * (i % 2)}"} for i, line in enumerate(LINES)]
    blank, plain = (
        tokenize_corpus(write(tmp_path / f"{i}.jsonl", rows), TOKENIZER, SMALL) for i, rows in enumerate((lines, LINES))
    )
    assert blank.tokens_fingerprint == plain.tokens_fingerprint  # of which the labels are a part
