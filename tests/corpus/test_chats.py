"""Conversations in chat templates, corpora by short names, and rows in the order of a seed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.command_line import avss
from support.documentation import DOCS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from avss_dist.core.errors import CorpusError
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.corpus.sources import NAMED, documents
from avss_dist.corpus.tokens import shuffled
from avss_dist.runs.job_file import JobError, read_job
from avss_dist.warehouse.reader import Warehouse

WORDS = ["<eos>", "<user>", "<assistant>", "<end>", *(f"w{i}" for i in range(60)), "26", "Jul"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
CHATS = [
    [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2}"}] for i in range(9)
]


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", chat_template=template)


def write(path: Path, values: list[Any], column: str = "messages") -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({column: values}), path)
    else:
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return f"{path}:{column}"


def words(planned: CorpusPlan) -> list[list[str]]:
    return [[WORDS[i] for i in row[:n]] for s in planned.shards for row, n in zip(s.input_ids, s.lengths, strict=True)]


CHAT = Settings(sequence_length=12, chat_template=True, layout="padded")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_a_conversation_has_the_tokens_of_its_template_alone(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"chats.{'jsonl' if kind == 'hf' else kind}", CHATS)
    source = f"hf:{tmp_path}:::messages" if kind == "hf" else source
    tokenizer = word_tokenizer()
    planned = tokenize_corpus(source, tokenizer, CHAT)
    rows = [["<user>", f"w{i}", f"w{i + 1}", "<end>", "<assistant>", f"w{i + 2}", "<end>"] for i in range(9)]
    assert words(planned) == rows
    assert planned.chat_template == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    packed = tokenize_corpus(source, tokenizer, Settings(sequence_length=7, chat_template=True))
    assert words(packed) == rows, "no end of text is put after a template's own"


def test_text_beside_conversations_stays_text(tmp_path: Path) -> None:
    source = write(tmp_path / "mixed.jsonl", ["w1 w2", CHATS[0], "w3"])
    (row,) = words(tokenize_corpus(source, word_tokenizer(), Settings(sequence_length=12, chat_template=True)))
    assert row == ["w1", "w2", "<eos>", "<user>", "w0", "w1", "<end>", "<assistant>", "w2", "<end>", "w3", "<eos>"]


def test_a_template_is_told_the_same_date_every_day(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("{{ strftime_now('%d %b') }} {{ messages[0].content }}")
    assert words(tokenize_corpus(write(tmp_path / "c.jsonl", CHATS[:1]), tokenizer, CHAT)) == [
        ["26", "Jul", "w0", "w1"]
    ]


@pytest.mark.parametrize(
    ("values", "template", "settings", "says"),
    [
        ([CHATS[0]], TEMPLATE, {}, r"line 1 is a conversation, and no text\.\nSet `chat_template`"),
        (None, None, {"chat_template": True}, "has no chat template of its own"),  # before the file, which is missing
        ([CHATS[0]], "{{ raise_exception('Begin with a system') }}", {"chat_template": True}, "line 1: .*Begin with a"),
        ([CHATS[0]], "{{ messages[0].content + 1 }}", {"chat_template": True}, "line 1: .*does not take"),
        ([[{"from": "human"}]], TEMPLATE, {"chat_template": True}, "line 1: 'messages' is not text but"),
        ([[]], TEMPLATE, {"chat_template": True}, r"line 1: 'messages' is not text but \[\]"),
    ],
)
def test_conversations_that_cannot_be_read(
    values: Any, template: str | None, settings: dict[str, bool], says: str, tmp_path: Path
) -> None:
    source = f"{tmp_path}/none.jsonl:messages" if values is None else write(tmp_path / "c.jsonl", values)
    with pytest.raises(CorpusError, match=says):
        tokenize_corpus(source, word_tokenizer(template), Settings(sequence_length=4, **settings))


# Short names


def test_short_names_are_data_sets_at_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Builder:
        hash = "0"

        def as_streaming_dataset(self, split: str) -> list[dict[str, str]]:
            asked[-1].append(split)
            return [{column: "text"}]

    def load(name: str, config: str | None, revision: str | None) -> Builder:
        asked.append([name, config, revision])
        return Builder()

    monkeypatch.setattr("datasets.load_dataset_builder", load)
    page = (DOCS / "reference/inputs.md").read_text(encoding="utf-8")
    for name, (place, config, split, column) in NAMED.items():
        repository, _, revision = place.partition("@")
        assert list(documents(name)) == list(documents(f"{name}:test")) == ["text"]
        where = [repository, config or None, revision]
        assert asked[-2:] == [[*where, split], [*where, "test"]] and len(revision) == 40
        described = f"`{config}`" if config else ""
        assert f"| `{name}` | {repository} | {described} | `{split}` | `{column}` | `{revision}` |" in page
    with pytest.raises(CorpusError, match=r"'wikitex2' is not a corpus source.*\n.*Did you mean 'wikitext2'"):
        documents("wikitex2")


# The order of a seed


def test_a_seed_draws_rows_from_the_whole_text_and_each_alike(tmp_path: Path) -> None:
    rows = [np.array([i], np.int32) for i in range(20)]

    def drawn(seed: int, most: int | None) -> list[int]:
        return [int(row[0]) for row in shuffled(iter(rows), seed, most)]

    whole = drawn(0, None)
    assert sorted(whole) == list(range(20)) != whole
    assert [drawn(0, n) for n in (5, 12, 30)] == [whole[:5], whole[:12], whole]
    counts = Counter(row for seed in range(2000) for row in drawn(seed, 5))
    expected = 2000 * 5 / 20  # a row's count is binomial; of 20 of them, squared and scaled, the sum is near 19
    assert sum((counts[row] - expected) ** 2 for row in range(20)) / (expected * 0.75) < 43.8  # 1 in 1000 is above
    source = write(tmp_path / "t.jsonl", [" ".join(f"w{i}" for i in range(40))], "text")
    settings = Settings(sequence_length=4, max_sequences=4, shuffle_seed=7)
    plans = [tokenize_corpus(source, word_tokenizer(), replace(settings, skip_sequences=skip)) for skip in (0, 0, 4)]
    first, again, others = map(words, plans)
    assert first == again and not any(row in first for row in others)
    assert (
        plans[0].tokens_fingerprint
        != tokenize_corpus(source, word_tokenizer(), Settings(sequence_length=4)).tokens_fingerprint
    )


# Commands


def test_score_puts_conversations_in_the_template_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    chatty, out = tmp_path / "chatty", tmp_path / "w"
    shutil.copytree(tiny_llama, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    source = write(tmp_path / "chats.jsonl", CHATS * 3)
    text = write(tmp_path / "text.jsonl", ["some text"], "text")
    size = ["--sequence-length", 16, "--max-sequences", 4, "--executor", "local", "-w", out]
    refused = {
        "--chat-template": avss("score", chatty, "--corpus", source, *size),
        "has no chat template of its own": avss("score", tiny_llama, "--corpus", source, "--chat-template", *size),
        "--chat-template has no effect": avss("score", chatty, "--corpus", text, "--chat-template", *size),
    }
    for says, done in refused.items():
        assert done.exit_code == 2 and says in done.stderr, done.stderr
    done = avss("score", chatty, "--corpus", source, "--chat-template", "--shuffle-seed", 3, *size)
    assert done.exit_code == 0, done.stderr
    (run,) = (row for row in Warehouse(out).runs().to_pylist() if row["status"] == "done")
    assert run["chat_template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest() and run["shuffle_seed"] == 3
    again = avss("evaluate", chatty, "--tasks", f"perplexity:{source}", "--chat-template", *size)
    assert again.exit_code == 0, again.stderr


def test_a_job_says_which_corpus_needs_the_template(tmp_path: Path) -> None:
    text, chats = write(tmp_path / "t.jsonl", ["w1"], "text"), write(tmp_path / "c.jsonl", CHATS)
    job = tmp_path / "job.yaml"

    def told(settings: dict[str, Any], *corpora: str) -> str:
        job.write_text(json.dumps({"warehouse": "w", "models": ["a"], "corpora": corpora, "settings": settings}))
        try:
            return str(len(read_job(job).specs))
        except JobError as error:
            return error.message

    assert told({"chat_template": True}, text, chats) == "2", "text stays text"
    assert "line 1 is a conversation, and no text. Set chat_template" in told({}, text, chats)
    assert f"chat_template has no effect: there are no conversations in {text}" in told({"chat_template": True}, text)
