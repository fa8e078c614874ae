"""Conversations as text of a distillation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.texts import sentences
from transformers import AutoTokenizer

from avss_dist.core.errors import AvssError, CorpusError, NoRows
from avss_dist.core.settings import Settings
from avss_dist.distillation.texts import read_trained

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
SETTINGS = Settings(sequence_length=32, chat_template=True)


@pytest.fixture
def chats(tmp_path: Path) -> Callable[..., Path]:
    """Write conversations, with other lines between them."""

    def write(count: int, *others: Any) -> Path:
        said = sentences(2 * count, seed=3)
        turns = [[{"role": role, "content": said[2 * i + n]} for n, role in enumerate("ua")] for i in range(count)]
        lines = [{"messages": messages} for messages in turns]
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *others]))
        return tmp_path / "chats.jsonl"

    return write


@pytest.fixture
def tokenizer(teacher: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_rows_of_conversations_are_held_out_and_trained(chats: Callable[..., Path], tokenizer: Any) -> None:
    text = read_trained(f"{chats(40)}:messages", "chats", 1.0, tokenizer, SETTINGS, 4)
    assert text.trained is not None and text.held_out.num_sequences == 4 and text.trained.num_sequences > 20
    assert "<|u|>" in tokenizer.decode(text.held_out.shards[0].input_ids.ravel())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "line 41: 'messages' is not text but"),
        ({"messages": [{"content": "x"}]}, "line 41: 'messages' is not text but"),
        ({}, "line 41: no field 'messages'"),
    ],
)
def test_a_broken_line_behind_the_held_out_rows_is_named(
    line: Any, message: str, chats: Callable[..., Path], tokenizer: Any
) -> None:
    with pytest.raises(CorpusError, match=message) as told:
        read_trained(f"{chats(40, line)}:messages", "chats", 1.0, tokenizer, SETTINGS, 4)
    assert "no row to train on" not in str(told.value) and "longer text" not in str(told.value)


def test_too_few_conversations_are_told_as_such(chats: Callable[..., Path], tokenizer: Any) -> None:
    with pytest.raises(NoRows, match=r"has no row to train on after .* skipped and held-out rows"):
        read_trained(f"{chats(2)}:messages", "chats", 1.0, tokenizer, SETTINGS, 400)
    with pytest.raises(AvssError, match="is a conversation, and no text"):
        read_trained(f"{chats(2)}:messages", "chats", 1.0, tokenizer, Settings(sequence_length=32), 4)
