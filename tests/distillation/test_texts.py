"""The mix of texts, labels of them, and conversations as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.corpora import rows_of
from support.json_files import write_json_lines
from support.texts import sentences
from transformers import AutoTokenizer

from avss_dist.core.errors import AvssError, CorpusError, NoRows
from avss_dist.core.settings import Settings
from avss_dist.distillation.loss import NOT_COUNTED
from avss_dist.distillation.texts import DistillText, Mix, read_trained, read_watched, with_labels

Write = Callable[..., Path]
SETTINGS = Settings(sequence_length=32)


@pytest.fixture(scope="module")
def texts(teacher: Path, corpus: Path, other_corpus: Path) -> list[DistillText]:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    settings = replace(SETTINGS, skip_sequences=1)
    first = str(corpus)
    second = str(other_corpus)
    return [
        read_trained(first, first, 1.0, tokenizer, settings, 4),
        read_trained(second, second, 3.0, tokenizer, settings, 4),
    ]


def test_held_out_rows_come_before_those_to_train_on(teacher: Path, corpus: Path, texts: list[DistillText]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    watched = read_watched(str(corpus), tokenizer, SETTINGS, 10_000)
    rows = rows_of(watched.held_out)
    text, _ = texts
    assert text.trained is not None
    assert np.array_equal(rows[1:5], rows_of(text.held_out))
    assert np.array_equal(rows[5:], rows_of(text.trained))


def test_a_mix_draws_by_weight_and_every_row_before_any_again(texts: list[DistillText]) -> None:
    mix = Mix(texts, 2000, seed=3)
    drawn = [tuple(mix[number]["input_ids"].tolist()) for number in range(len(mix))]
    for text, low, high in zip(texts, (0.2, 0.7), (0.3, 0.8), strict=True):
        assert text.trained is not None
        rows = set(map(tuple, rows_of(text.trained).tolist()))
        order = [row for row in drawn if row in rows]
        assert low < len(order) / len(drawn) < high
        for start in range(0, len(order) - len(rows) + 1, len(rows)):
            round_ = order[start : start + len(rows)]
            assert set(round_) == rows


def test_a_mix_depends_on_its_seed_alone(texts: list[DistillText]) -> None:
    def order(seed: int) -> torch.Tensor:
        mix = Mix(texts, 50, seed)
        return torch.stack([mix[i]["input_ids"] for i in range(50)])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_labels_are_the_tokens_that_count(texts: list[DistillText]) -> None:
    example = Mix(texts, 1, 0)[0]
    assert example["labels"][0] == NOT_COUNTED
    assert torch.equal(example["labels"][1:], example["input_ids"][1:])


def test_padding_and_skipped_tokens_have_no_label(teacher: Path, corpus: Path) -> None:
    settings = Settings(sequence_length=64, layout="padded", skip_first_tokens=3)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = corpus.with_suffix(".jsonl")
    write_json_lines(lines, [{"text": line[:20]} for line in corpus.read_text().split("\n")])
    text = read_trained(f"{lines}:text", "lines", 1.0, tokenizer, settings, 4)
    example = Mix([text], 1, 0)[0]
    real = int(example["attention_mask"].sum())
    assert 3 < real < 64
    labelled = example["labels"] != NOT_COUNTED
    assert labelled.nonzero().flatten().tolist() == list(range(3, real))


def test_labels_of_texts_are_distinct(texts: list[DistillText]) -> None:
    first, second = texts
    labels = [text.label for text in with_labels([first, second, first])]
    assert labels == ["trained.txt", "other.txt", "trained.txt (2)"]


# Conversations


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
CHATS = Settings(sequence_length=32, chat_template=True)


@pytest.fixture
def chats(tmp_path: Path) -> Write:
    """Write conversations, with other lines between them."""

    chats_file = tmp_path / "chats.jsonl"

    def write(count: int, *others: Any) -> Path:
        questions = sentences(count, seed=3)
        answers = sentences(count, seed=4)
        lines = []
        for question, answer in zip(questions, answers, strict=True):
            messages = [{"role": "u", "content": question}, {"role": "a", "content": answer}]
            lines.append({"messages": messages})
        write_json_lines(chats_file, [*lines, *others])
        return chats_file

    return write


@pytest.fixture
def tokenizer(teacher: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_rows_of_conversations_are_held_out_and_trained(chats: Write, tokenizer: Any) -> None:
    text = read_trained(f"{chats(40)}:messages", "chats", 1.0, tokenizer, CHATS, 4)
    assert text.trained is not None
    assert text.held_out.num_sequences == 4
    assert text.trained.num_sequences > 20
    held_out = rows_of(text.held_out)
    assert "<|u|>" in tokenizer.decode(held_out.ravel())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "line 41: 'messages' is not text but"),
        ({"messages": [{"content": "x"}]}, "line 41: 'messages' is not text but"),
        ({}, "line 41: no field 'messages'"),
    ],
)
def test_a_broken_line_behind_the_held_out_rows_is_named(line: Any, message: str, chats: Write, tokenizer: Any) -> None:
    with pytest.raises(CorpusError, match=message) as told:
        read_trained(f"{chats(40, line)}:messages", "chats", 1.0, tokenizer, CHATS, 4)
    assert "no row to train on" not in str(told.value)
    assert "longer text" not in str(told.value)


def test_too_few_conversations_are_told_as_such(chats: Write, tokenizer: Any) -> None:
    with pytest.raises(NoRows, match=r"has no row to train on after .* skipped and held-out rows"):
        read_trained(f"{chats(2)}:messages", "chats", 1.0, tokenizer, CHATS, 400)
    with pytest.raises(AvssError, match="is a conversation, and no text"):
        read_trained(f"{chats(2)}:messages", "chats", 1.0, tokenizer, Settings(sequence_length=32), 4)


def test_text_of_the_teacher_that_is_too_short_is_to_be_written_longer(chats: Write, tokenizer: Any) -> None:
    with pytest.raises(NoRows) as error:
        read_trained(f"{chats(2)}:messages", "self", 1.0, tokenizer, CHATS, 400)
    assert "`self_texts`" in str(error.value.hint)
