"""Conversations in chat templates, corpora by short names, rows in the order of a seed, and pairs that stay whole."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpus.test_corpus import TOKENIZER, masked_rows, rows_of, texts_of, word_ids
from pyarrow import parquet
from support.command_line import mistake, succeed
from support.documentation import DOCS
from support.json_files import write_json, write_json_lines
from support.rows import only_row
from support.tables import run_rows
from support.word_tokenizers import word_tokenizer as tokenizer_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from avss_dist.core.errors import ConfigError, CorpusError
from avss_dist.core.settings import Settings
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.corpus.sources import NAMED, documents
from avss_dist.corpus.tokens import shuffled
from avss_dist.runs.job_file import read_job

NUMBERED = [f"w{i}" for i in range(60)]
WORDS = ["<eos>", "<user>", "<assistant>", "<end>", *NUMBERED, "26", "Jul"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHATS = [conversation(f"w{i} w{i + 1}", f"w{i + 2}") for i in range(9)]


def word_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    return tokenizer_of(WORDS, unknown="<eos>", eos_token="<eos>", chat_template=template)


def write(path: Path, values: list[Any], column: str = "messages") -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({column: values}), path)
    else:
        write_json_lines(path, [{column: value} for value in values])
    return f"{path}:{column}"


def words(planned: CorpusPlan) -> list[list[str]]:
    """The words of every row, without padding."""
    return [[WORDS[number] for number in row] for row in rows_of(planned)]


CHAT = Settings(sequence_length=12, chat_template=True, layout="padded")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_a_conversation_has_the_tokens_of_its_template_alone(kind: str, tmp_path: Path) -> None:
    ending = "parquet" if kind == "parquet" else "jsonl"
    source = write(tmp_path / f"chats.{ending}", CHATS)
    if kind == "hf":
        source = f"hf:{tmp_path}:::messages"
    tokenizer = word_tokenizer()
    planned = tokenize_corpus(source, tokenizer, CHAT)
    rows = [f"<user> w{i} w{i + 1} <end> <assistant> w{i + 2} <end>".split() for i in range(9)]
    assert words(planned) == rows
    assert planned.chat_template == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    packed = tokenize_corpus(source, tokenizer, Settings(sequence_length=7, chat_template=True))
    assert words(packed) == rows, "no end of text is put after a template's own"


def test_text_beside_conversations_stays_text(tmp_path: Path) -> None:
    source = write(tmp_path / "mixed.jsonl", ["w1 w2", CHATS[0], "w3"])
    planned = tokenize_corpus(source, word_tokenizer(), Settings(sequence_length=12, chat_template=True))
    (row,) = words(planned)
    assert row == ["w1", "w2", "<eos>", "<user>", "w0", "w1", "<end>", "<assistant>", "w2", "<end>", "w3", "<eos>"]


def test_a_template_is_told_the_same_date_every_day(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("{{ strftime_now('%d %b') }} {{ messages[0].content }}")
    source = write(tmp_path / "c.jsonl", CHATS[:1])
    (row,) = words(tokenize_corpus(source, tokenizer, CHAT))
    assert row == ["26", "Jul", "w0", "w1"]


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
    source = f"{tmp_path}/none.jsonl:messages"
    if values is not None:
        source = write(tmp_path / "c.jsonl", values)
    with pytest.raises(CorpusError, match=says):
        tokenize_corpus(source, word_tokenizer(template), Settings(sequence_length=4, **settings))


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
        assert texts_of(name) == ["text"]
        assert texts_of(f"{name}:test") == ["text"]
        where = [repository, config or None, revision]
        *_, of_usual_split, of_test = asked
        assert of_usual_split == [*where, split]
        assert of_test == [*where, "test"]
        assert len(revision) == 40
        described = f"`{config}`" if config else ""
        line = f"| `{name}` | {repository} | {described} | `{split}` | `{column}` | `{revision}` |"
        assert line in page
    with pytest.raises(CorpusError, match=r"'wikitex2' is not a corpus source.*\n.*Did you mean 'wikitext2'"):
        documents("wikitex2")


def test_a_seed_draws_rows_from_the_whole_text_and_each_alike(tmp_path: Path) -> None:
    rows = [np.array([i], np.int32) for i in range(20)]

    def drawn(seed: int, most: int | None) -> list[int]:
        return [int(row[0]) for row in shuffled(iter(rows), seed, most)]

    whole = drawn(0, None)
    assert whole != list(range(20))
    assert sorted(whole) == list(range(20))
    for number in (5, 12, 30):
        assert drawn(0, number) == whole[:number]
    counts: Counter[int] = Counter()
    for seed in range(2000):
        counts.update(drawn(seed, 5))
    expected = 2000 * 5 / 20  # a row's count is binomial; of 20 of them, squared and scaled, the sum is near 19
    deviations = [(counts[row] - expected) ** 2 for row in range(20)]
    assert sum(deviations) / (expected * 0.75) < 43.8  # 1 in 1000 is above


def test_a_seed_changes_the_order_of_rows_and_skipped_ones_are_others(tmp_path: Path) -> None:
    source = write(tmp_path / "t.jsonl", [" ".join(NUMBERED[:40])], "text")

    def planned(**options: Any) -> CorpusPlan:
        return tokenize_corpus(source, word_tokenizer(), Settings(sequence_length=4, **options))

    shuffled_rows = {"max_sequences": 4, "shuffle_seed": 7}
    first = planned(**shuffled_rows)
    assert words(planned(**shuffled_rows)) == words(first)
    for row in words(planned(**shuffled_rows, skip_sequences=4)):
        assert row not in words(first)
    assert planned().tokens_fingerprint != first.tokens_fingerprint


@pytest.mark.nightly
def test_score_puts_conversations_in_the_template_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    out = tmp_path / "w"
    shutil.copytree(tiny_llama, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    source = write(tmp_path / "chats.jsonl", CHATS * 3)
    text = write(tmp_path / "text.jsonl", ["some text"], "text")
    size = ["--sequence-length", 16, "--max-sequences", 4, "--executor", "local", "-w", out]
    without_option = mistake("score", chatty, "--corpus", source, *size)
    assert "--chat-template" in without_option
    without_template = mistake("score", tiny_llama, "--corpus", source, "--chat-template", *size)
    assert "has no chat template of its own" in without_template
    on_text = mistake("score", chatty, "--corpus", text, "--chat-template", *size)
    assert "--chat-template has no effect" in on_text
    succeed("score", chatty, "--corpus", source, "--chat-template", "--shuffle-seed", 3, *size)
    run = only_row(run_rows(out), status="done")
    assert run["chat_template"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert run["shuffle_seed"] == 3
    succeed("evaluate", chatty, "--tasks", f"perplexity:{source}", "--chat-template", *size)


def test_a_job_says_which_corpus_needs_the_template(tmp_path: Path) -> None:
    text = write(tmp_path / "t.jsonl", ["w1"], "text")
    chats = write(tmp_path / "c.jsonl", CHATS)
    job = tmp_path / "job.yaml"

    def told(settings: dict[str, Any], *corpora: str) -> str:
        write_json(job, {"warehouse": "w", "models": ["a"], "corpora": corpora, "settings": settings})
        try:
            return str(len(read_job(job).specs))
        except ConfigError as error:
            return error.message

    assert told({"chat_template": True}, text, chats) == "2", "text stays text"
    assert "line 1 is a conversation, and no text. Set chat_template" in told({}, text, chats)
    assert f"chat_template has no effect: there are no conversations in {text}" in told({"chat_template": True}, text)


# Paired text


SMALL = Settings(sequence_length=8, sequences_per_shard=3)
LINES = [
    {"q": "w0 w1", "a": "w2", "label": "good"},
    {"q": "w3", "a": "w4 w5", "label": "good"},
    {"q": "w0 w1", "a": "w6 w7 w8", "label": "bad"},
    {"q": "w3", "a": "w9", "label": "bad"},
    {"q": "w3", "a": "w10", "label": "bad"},
]


def write_pairs(path: Path, lines: Sequence[Any]) -> str:
    write_json_lines(path, lines)
    return f"{path}:q+a"


def planned_pairs(path: Path, lines: Sequence[Any], settings: Settings = SMALL) -> CorpusPlan:
    """Write pairs, and tokenize them."""
    return tokenize_corpus(write_pairs(path, lines), TOKENIZER, settings)


def test_rows_are_prompts_and_answers_of_which_the_answers_count(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "p.jsonl", LINES)
    made = tokenize_corpus(source, TOKENIZER, SMALL)
    assert texts_of(source)[:2] == ["w0 w1 w2", "w3 w4 w5"]
    first, second = made.shards
    assert first.pairing is not None
    assert second.pairing is not None
    assert first.pairing.strata == ("good", "bad", f"good{AFTER_ANOTHER}", f"bad{AFTER_ANOTHER}")
    pairs = [*first.pairing.pairs, *second.pairing.pairs]
    assert pairs == [0] * 4 + [1] * 6
    (batch, _) = first.batches(3)
    rows = masked_rows(batch.input_ids, batch.attention_mask)
    assert rows == [word_ids("w0 w1 w2"), word_ids("w0 w1 w6 w7 w8"), word_ids("w3 w2")]
    counted = masked_rows(batch.input_ids, batch.observed)
    assert counted == [word_ids("w2"), word_ids("w6 w7 w8"), word_ids("w2")]
    answers = " ".join(line["a"] for line in LINES)
    assert made.num_tokens == 2 * len(answers.split())
    again = made.recut(100)
    (shard,) = again.shards
    assert shard.num_sequences == 10
    assert again.recut(3).tokens_fingerprint == made.tokens_fingerprint


def test_a_table_has_the_fingerprint_of_its_lines_and_labels_count(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["label", "a", "q"])
        table.writeheader()
        table.writerows(LINES)
    opposite = {"good": "bad", "bad": "good"}
    other = [{**line, "label": opposite[line["label"]]} for line in LINES]
    plan = planned_pairs(tmp_path / "p.jsonl", LINES)
    from_table = tokenize_corpus(f"{tmp_path}/p.csv:q+a", TOKENIZER, SMALL)
    swapped = planned_pairs(tmp_path / "other.jsonl", other)
    assert from_table.tokens_fingerprint == plan.tokens_fingerprint
    assert swapped.tokens_fingerprint != plan.tokens_fingerprint


def test_whole_pairs_are_read_up_to_the_most_rows(tmp_path: Path) -> None:
    lines = []
    for number in range(9):
        for label in "ab":
            lines.append({"q": f"w{number}", "a": f"w1{label}", "label": label})
    made = planned_pairs(tmp_path / "p.jsonl", lines, Settings(sequence_length=8, max_sequences=15))
    assert made.num_sequences == 12
    for shard in made.shards:
        assert shard.pairing is not None
        prompts = shard.input_ids[:12, 0].reshape(3, 4)
        assert (prompts[:, 0] != prompts[:, 2]).all()


def test_truthfulqa_draws_an_incorrect_answer_by_its_seed(tmp_path: Path) -> None:
    answers = {"best_answer": "w1.", "correct_answers": [], "incorrect_answers": ["w2", "w3", "w4"]}
    lines = [{"question": f"w{i}", **answers} for i in range(8)]
    pairs_file = tmp_path / "t.jsonl"
    write_pairs(pairs_file, lines)
    source = f"truthfulqa:{pairs_file}"
    texts = texts_of(source)
    assert texts_of(f"{source}:0") == texts
    assert texts_of(f"{source}:1") != texts
    assert texts[0] == "Q: w0\nA: w1."
    lines.reverse()
    write_pairs(pairs_file, lines)
    assert sorted(texts_of(source)) == sorted(texts)


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
    write_pairs(tmp_path / "p.jsonl", lines)
    with pytest.raises(CorpusError) as caught:
        tokenize_corpus("p.jsonl:q+a", TOKENIZER, SMALL)
    assert caught.value.message.replace(f"{tmp_path}/", "") == message
    assert caught.value.hint


def test_a_repeated_answer_counts_once(tmp_path: Path) -> None:
    once = planned_pairs(tmp_path / "once.jsonl", LINES)
    twice = planned_pairs(tmp_path / "twice.jsonl", [*LINES, *LINES])
    assert twice.tokens_fingerprint == once.tokens_fingerprint


def test_blanks_around_a_label_make_no_other_label(tmp_path: Path) -> None:
    lines = [dict(line) for line in LINES]
    for line in lines[1::2]:
        line["label"] += " "
    plain = planned_pairs(tmp_path / "plain.jsonl", LINES)
    blank = planned_pairs(tmp_path / "blank.jsonl", lines)
    assert blank.tokens_fingerprint == plain.tokens_fingerprint  # of which the labels are a part
