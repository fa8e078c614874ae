"""The mix of texts, labels of them, and conversations as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
    return [
        read_trained(str(file), str(file), weight, tokenizer, replace(SETTINGS, skip_sequences=1), 4)
        for file, weight in ((corpus, 1.0), (other_corpus, 3.0))
    ]


def test_held_out_rows_come_before_those_to_train_on(teacher: Path, corpus: Path, texts: list[DistillText]) -> None:
    everything = read_watched(str(corpus), AutoTokenizer.from_pretrained(teacher), SETTINGS, 10_000).held_out
    rows = np.concatenate([shard.input_ids for shard in everything.shards])
    assert texts[0].trained is not None
    parts = [
        np.concatenate([shard.input_ids for shard in plan.shards]) for plan in (texts[0].held_out, texts[0].trained)
    ]
    assert np.array_equal(rows[1:5], parts[0])
    assert np.array_equal(rows[5:], parts[1])


def test_a_mix_draws_by_weight_and_every_row_before_any_again(texts: list[DistillText]) -> None:
    mix = Mix(texts, 2000, seed=3)
    drawn = [tuple(mix[i]["input_ids"].tolist()) for i in range(len(mix))]
    own = [
        {tuple(row) for shard in text.trained.shards for row in shard.input_ids.tolist()}
        for text in texts
        if text.trained
    ]
    assert 0.7 < np.mean([row in own[1] for row in drawn]) < 0.8
    for rows in own:
        order = [row for row in drawn if row in rows]
        for start in range(0, len(order) - len(rows) + 1, len(rows)):
            assert set(order[start : start + len(rows)]) == rows


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
    lines.write_text("\n".join(f'{{"text": "{line[:20]}"}}' for line in corpus.read_text().split("\n")))
    text = read_trained(f"{lines}:text", "lines", 1.0, tokenizer, settings, 4)
    example = Mix([text], 1, 0)[0]
    real = int(example["attention_mask"].sum())
    assert 3 < real < 64
    labelled = example["labels"] != NOT_COUNTED
    assert labelled.nonzero().flatten().tolist() == list(range(3, real))


def test_labels_of_texts_are_distinct(texts: list[DistillText]) -> None:
    assert [text.label for text in with_labels([*texts, texts[0]])] == ["trained.txt", "other.txt", "trained.txt (2)"]


# Conversations


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
CHATS = Settings(sequence_length=32, chat_template=True)


@pytest.fixture
def chats(tmp_path: Path) -> Write:
    """Write conversations, with other lines between them."""

    chats_file = tmp_path / "chats.jsonl"

    def write(count: int, *others: Any) -> Path:
        said = sentences(2 * count, seed=3)
        turns = [[{"role": role, "content": said[2 * i + n]} for n, role in enumerate("ua")] for i in range(count)]
        lines = [{"messages": messages} for messages in turns]
        chats_file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *others]))
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
    assert "<|u|>" in tokenizer.decode(text.held_out.shards[0].input_ids.ravel())


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
