"""The corpus plan: packing against an oracle, every kind of source, streaming, fingerprints, and error texts."""

from __future__ import annotations

import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyarrow import fs, parquet
from support.json_files import write_json_lines
from support.word_tokenizers import word_tokenizer as tokenizer_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from avss_dist.core.errors import ConfigError, CorpusError
from avss_dist.core.settings import Settings
from avss_dist.corpus import sources, tokens
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.corpus.sources import documents, open_source

WORDS = [f"w{i}" for i in range(20)]
EOS = 1
PAD = 2
BOS = 3
TEXTS = ["w0 w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w10 w11"]


def word_tokenizer(
    *, eos: bool = True, pad: bool = True, add: str = "$A", sep: bool = False
) -> PreTrainedTokenizerFast:
    special = {"unk_token": "<unk>"}
    if eos:
        special["eos_token"] = "<eos>"
    if pad:
        special["pad_token"] = "<pad>"
    if sep:
        special["sep_token"] = "<eos>"
    names = ["<unk>", "<eos>", "<pad>", "<bos>", *WORDS]
    markers = ("<bos>", "<eos>", "<pad>")
    return tokenizer_of(names, unknown="<unk>", added=add, markers=markers, model_max_length=4, **special)


TOKENIZER = word_tokenizer()
SMALL = Settings(sequence_length=4, sequences_per_shard=2)


class Watched:
    """The tokenizer, which keeps what it is given at once."""

    eos_token_id = EOS
    pad_token_id = PAD

    def __init__(self) -> None:
        self.given: list[list[str]] = []

    def __call__(self, text: list[str], **options: Any) -> Any:
        if text != ["a"]:  # which is asked for to see the special tokens around it
            self.given.append(text)
        return TOKENIZER(text, **options)


def word_ids(text: str) -> list[int]:
    return [4 + int(word[1:]) for word in text.split()]


def packed_oracle(texts: list[str], length: int) -> list[list[int]]:
    """The rows of texts, which are cut from one stream of tokens; a rest that fills no row is left out."""
    stream = []
    for text in texts:
        stream += [*word_ids(text), EOS]
    rows = len(stream) // length
    return np.reshape(stream[: rows * length], (rows, length)).tolist()


def rows_of(planned: CorpusPlan) -> list[list[int]]:
    """The tokens of every row, without padding."""
    rows = []
    for shard in planned.shards:
        for row, length in zip(shard.input_ids, shard.lengths, strict=True):
            rows.append(row[:length].tolist())
    return rows


def planned_with(source: str, settings: Settings = SMALL, **options: Any) -> CorpusPlan:
    """Tokenize a source, with options of `word_tokenizer`."""
    return tokenize_corpus(source, word_tokenizer(**options), settings)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    write_json_lines(path, [{field: text} for text in texts])
    return str(path)


def write_parquet(path: Path, texts: list[Any], column: str = "text") -> str:
    table = pa.table({column: texts, "n": range(len(texts))})
    parquet.write_table(table, path, row_group_size=2)
    return str(path)


def fails(call: Any, *parts: str) -> CorpusError:
    """Expect a CorpusError whose text holds every part."""
    with pytest.raises(CorpusError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    return caught.value


def texts_of(source: str | Path) -> list[str]:
    """The texts that a source has."""
    return list(documents(str(source)))


def cannot_be_read(source: str | Path, *parts: str) -> CorpusError:
    """Expect that the texts of a source cannot be read, with a message that holds every part."""
    return fails(lambda: texts_of(source), *parts)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "c.jsonl", TEXTS)


# Layouts


texts_lists = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=12)


@given(texts=texts_lists, length=st.integers(1, 9), per_shard=st.integers(1, 5), limit=st.none() | st.integers(1, 9))
@hypothesis_settings(max_examples=60)
def test_packing_invariants(texts: list[str], length: int, per_shard: int, limit: int | None) -> None:
    settings = Settings(sequence_length=length, sequences_per_shard=per_shard, max_sequences=limit)
    expected = packed_oracle(texts, length)[:limit]
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "c.jsonl", texts)
        if not expected or not any(texts):
            fails(lambda: planned_with(source, settings))
            return
        try:
            planned = planned_with(source, settings)
        except CorpusError:
            # only blank texts were read
            assert limit
            assert not any(texts[: limit * length])
            return
    assert rows_of(planned) == expected
    *full, _ = planned.shards
    for shard in full:
        assert shard.num_sequences == per_shard
    assert planned.num_tokens == len(expected) * length


@given(texts=texts_lists, length=st.integers(1, 9), skip=st.integers(0, 4), batch_size=st.integers(1, 5))
@hypothesis_settings(max_examples=60)
def test_padded_invariants(texts: list[str], length: int, skip: int, batch_size: int) -> None:
    skip = min(skip, length - 1)
    settings = Settings(sequence_length=length, sequences_per_shard=3, layout="padded", skip_first_tokens=skip)
    expected = [ids[:length] for ids in map(word_ids, texts) if ids]
    observed = [row[skip:] for row in expected]
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "c.jsonl", texts)
        if not any(observed):
            fails(lambda: planned_with(source, settings))
            return
        planned = planned_with(source, settings)
    assert rows_of(planned) == expected
    assert planned.num_tokens == sum(map(len, observed))
    read = []
    counted = []
    for shard in planned.shards:
        for batch in shard.batches(batch_size):
            ids = batch.input_ids
            read += masked_rows(ids, batch.attention_mask)
            counted += masked_rows(ids, batch.observed)
            assert ids.dtype == np.int32
            assert batch.attention_mask.dtype == bool
            assert batch.observed.dtype == bool
            assert batch.attention_mask[:, -1].any()
            assert len(ids) <= batch_size
            assert (ids[~batch.attention_mask] == PAD).all()
    assert read == expected
    assert counted == observed


def masked_rows(ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The tokens of each row at which a mask of the same shape is true."""
    assert ids.shape == mask.shape
    return [row[places].tolist() for row, places in zip(ids, mask, strict=True)]


def test_batches_are_as_wide_as_their_longest_row_and_copies(jsonl: str) -> None:
    (shard,) = planned_with(jsonl, Settings(sequence_length=32, layout="padded")).shards
    assert shard.input_ids.shape == (4, 32)
    narrow, wide = shard.batches(2)
    assert narrow.input_ids.shape == (2, 3)
    assert wide.input_ids.shape == (2, 6)
    (packed, _) = planned_with(jsonl, replace(SMALL, skip_first_tokens=1)).shards
    batch = next(packed.batches(8))
    assert batch.observed.tolist() == [[False, True, True, True]] * 2
    assert packed.num_tokens == 6
    batch.input_ids[:] = 99
    assert not (packed.input_ids == 99).any()


THREE = ["w0 w1 w2", "w3 w4", "w5 w6"]


@pytest.mark.parametrize(
    ("options", "texts", "expected"),
    [
        ({}, ["w0 w1"] * 2, [[4, 5, EOS]] * 2),
        ({"eos": False}, ["w0 w1"] * 2, [[4, 5]] * 2),
        ({"add": "$A <eos>"}, ["w0 w1"] * 2, [[4, 5, EOS]] * 2),
        ({}, ["w0 <eos>"] * 2, [[4, EOS]] * 2),
        ({}, ["w0", "", "w1"], [[4, EOS, EOS, 5, EOS]]),
        ({}, THREE, [[4, 5, 6, EOS], [7, 8, EOS, 9]]),
        ({"add": "<bos> $A"}, THREE, [[BOS, 4, 5, 6], [BOS, EOS, 7, 8], [BOS, EOS, 9, 10]]),
        ({"add": "<bos> $A <eos>"}, THREE, [[BOS, 4, 5, 6], [BOS, EOS, 7, 8], [BOS, EOS, 9, 10]]),
        ({"add": "$A <eos>"}, THREE, [[4, 5, 6, EOS], [7, 8, EOS, 9]]),
        ({"add": "<bos> <pad> $A", "eos": False}, THREE, [[BOS, PAD, 4, 5], [BOS, PAD, 6, 7], [BOS, PAD, 8, 9]]),
        ({"add": "<bos> $A <pad>", "eos": False}, THREE, [[BOS, 4, 5, 6, PAD], [BOS, 7, 8, 9, PAD]]),
        (
            {"add": "<bos> $A <eos>", "sep": True},
            THREE,
            [[BOS, 4, 5, 6, EOS], [BOS, EOS, 7, 8, EOS], [BOS, EOS, 9, 10, EOS]],
        ),
    ],
)
def test_a_packed_row_has_the_special_tokens_of_a_text_around_it(
    options: dict[str, Any], texts: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    """A text ends in one EOS, whether the tokenizer, the text or the package puts it there."""
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    settings = Settings(sequence_length=len(expected[0]))
    assert rows_of(planned_with(source, settings, **options)) == expected


def test_row_start_none_cuts_documents_with_their_special_tokens(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", ["w0 w1 w2", "w3 w4"])
    settings = Settings(sequence_length=4, row_start="none")
    planned = tokenize_corpus(source, word_tokenizer(add="<bos> $A"), settings)
    assert rows_of(planned) == [[BOS, 4, 5, 6], [EOS, BOS, 7, 8]]
    without_specials = planned_with(source, settings)
    auto = planned_with(source, replace(settings, row_start="auto"))
    assert without_specials.tokens_fingerprint == auto.tokens_fingerprint


def test_rows_without_room_for_text_are_refused(jsonl: str) -> None:
    with pytest.raises(CorpusError) as caught:
        tokenize_corpus(jsonl, word_tokenizer(add="<bos> $A"), Settings(sequence_length=1))
    assert caught.value.message.startswith("`sequence_length` 1 leaves no room for text")
    assert caught.value.hint == "Make `sequence_length` 2 or more, or set `row_start` none."


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=6),
    length=st.integers(2, 9),
)
def test_packed_rows_hold_every_token_of_the_text_once(
    texts: list[str], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = ["w0 w1 w2 w3 w4 w5 w6 w7", *texts]
    source = write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", texts)
    planned = planned_with(source, Settings(sequence_length=length), add="<bos> $A")
    rest = []
    for first, *others in rows_of(planned):
        assert first == BOS
        rest.append(others)
    assert rest == packed_oracle(texts, length - 1)


@pytest.mark.parametrize(("options", "pad"), [({}, PAD), ({"pad": False}, EOS), ({"pad": False, "eos": False}, 0)])
def test_pad_id_falls_back_to_eos_then_zero(jsonl: str, options: dict[str, bool], pad: int) -> None:
    (shard,) = planned_with(jsonl, Settings(sequence_length=3, layout="padded"), **options).shards
    assert shard.input_ids[1].tolist() == [7, pad, pad]


def test_content_hash_ignores_padding_and_sees_tokens_lengths_and_skip(jsonl: str, tmp_path: Path) -> None:
    padded = Settings(sequence_length=8, layout="padded")

    def hash_of(source: str, settings: Settings = padded, **options: bool) -> str:
        (shard, *_) = planned_with(source, settings, **options).shards
        return shard.content_hash

    content_hash = hash_of(jsonl)
    assert hash_of(jsonl, pad=False) == content_hash
    assert len(content_hash) == 64
    cut_elsewhere = write_jsonl(tmp_path / "o.jsonl", ["w0 w1", "w2 w3", *TEXTS[2:]])
    other = hash_of(cut_elsewhere)
    skipping = hash_of(jsonl, replace(padded, skip_first_tokens=1))
    assert len({content_hash, other, skipping}) == 3


# Determinism


def corpus_fingerprint(source: str) -> str:
    return open_source(source).fingerprint()


def signature(planned: CorpusPlan) -> tuple[Any, ...]:
    return planned.tokens_fingerprint, planned.corpus_fingerprint, rows_of(planned)


def test_plans_are_deterministic_and_independent_of_grouping(jsonl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = replace(SMALL, max_sequences=2)
    large = planned_with(jsonl)
    small = planned_with(jsonl, limited)
    for plan in (large, small):
        assert plan.corpus_fingerprint == corpus_fingerprint(jsonl)
    assert large.shards[0].content_hash == small.shards[0].content_hash
    assert large.tokens_fingerprint != small.tokens_fingerprint
    whole = signature(large)
    part = signature(small)
    assert signature(planned_with(jsonl)) == whole
    for documents_, characters in [(1, 1 << 20), (2, 1 << 20), (64, 1), (64, 9)]:
        monkeypatch.setattr(tokens, "GROUP_DOCUMENTS", documents_)
        monkeypatch.setattr(tokens, "GROUP_CHARACTERS", characters)
        assert signature(planned_with(jsonl)) == whole
        assert signature(planned_with(jsonl, limited)) == part


def test_a_small_plan_has_few_documents_tokenized(tmp_path: Path) -> None:
    """And a large one has many tokenized at once, which is faster."""
    source = write_jsonl(tmp_path / "many.jsonl", ["w0 w1 w2"] * 500)
    few = Watched()
    many = Watched()
    tokenize_corpus(source, few, replace(SMALL, max_sequences=1))
    assert sum(map(len, few.given)) <= 4
    tokenize_corpus(source, many, replace(SMALL, max_sequences=None))
    assert sum(map(len, many.given)) == 500
    assert max(map(len, many.given)) == tokens.GROUP_DOCUMENTS


def test_a_tokenizer_left_truncating_and_padding_does_not_matter(jsonl: str, caplog: pytest.LogCaptureFixture) -> None:
    """It does not warn of long sequences either, although its model_max_length is 4."""
    configured = word_tokenizer()
    configured(["w0 w1 w2"], truncation=True, max_length=2, padding="max_length")
    assert signature(tokenize_corpus(jsonl, configured, SMALL)) == signature(planned_with(jsonl))
    assert not caplog.records


# Sources


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("glob", [False, True])
def test_files_local_and_by_uri(tmp_path: Path, scheme: str, glob: bool) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    write_jsonl(folder / "b c.jsonl", ["b1", "b2"], "body")
    write_jsonl(folder / "a.jsonl", ["a1"], "body")
    write_jsonl(folder / ".hidden.jsonl", ["no"], "body")
    (folder / "dir.jsonl").mkdir()
    path = f"{folder}/{'*.jsonl' if glob else 'b c.jsonl'}"
    uri = scheme + path.replace(" ", "%20")
    assert texts_of(f"{uri if scheme else path}:body") == (["a1", "b1", "b2"] if glob else ["b1", "b2"])


def test_globs_cross_folders_and_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("z/1.txt", "a/2.txt", "a/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in (f"{tmp_path}/*/?.txt", f"file://{tmp_path}/**/*.txt", "*/*.txt", "~/*/*.txt"):
        assert texts_of(pattern) == ["a/1.txt", "a/2.txt", "z/1.txt"]
    write_jsonl(tmp_path / "c[1].jsonl", ["x"])  # its name looks like a pattern
    for path in (f"{tmp_path}/c[1].jsonl", "c[1].jsonl", "~/c[1].jsonl"):
        assert texts_of(path) == ["x"]


def test_text_is_one_document_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "c.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\xc3\xa9 end")
    assert texts_of(path) == ["one\r\ntwo\n\n\u00e9 end"]


def test_a_long_text_is_read_in_pieces_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXT_PIECE_BYTES", 7)
    path = tmp_path / "c.txt"
    path.write_text("\u00e9\u00e9\u00e9\u00e9 1\nw2\nlong line w3\nw4")
    assert texts_of(path) == ["\u00e9\u00e9\u00e9\u00e9 1\n", "w2\nlong line w3\n", "w4"]
    path.write_bytes(b"line 1\nline 2\nbad \xff\n")
    cannot_be_read(path, f"{path}: byte 18 is not UTF-8.")


def test_a_long_line_is_read_in_pieces_at_whitespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXT_PIECE_BYTES", 7)
    monkeypatch.setattr(sources, "MAX_REST_BYTES", 3)
    path = tmp_path / "c.txt"
    for text, expected in {
        "one two three four\tfive\nsix": ["one two", " three", " four\tfive\n", "six"],
        "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9 b": ["\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9 b"],
        "a 0123456789012345 b\n": ["a", " 0123456789012345 b\n"],
    }.items():
        path.write_text(text)
        assert texts_of(path) == expected
    path.write_bytes(b"word one two bad\xff two")
    cannot_be_read(path, f"{path}: byte 16 is not UTF-8.")


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA_3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def byte_tokenizer(words: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges whatever comes twice, with a token before and one behind a document."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["a b  a b\n\n a 12 a b.  a\n b\t\n  a.b (a\r\n b) 'a b's\n"] * 9, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(GPT_2), byte_tokenizer(LLAMA_3)], ids=["GPT-2", "Llama 3"])
@given(text=st.text("ab12.'( \t\r\n\u00e9\u6f22\u2028", min_size=3, max_size=80), size=st.integers(1, 30))
@hypothesis_settings(max_examples=100)
def test_a_long_document_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerFast, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_CHARACTERS", size)
        pieces = list(tokens._pieces(text))
        encoded = tokens._encode_long(text, tokenizer, special=True).tolist()
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    assert encoded == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_no_tokenizer_gets_more_than_a_piece(
    write: Any, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 MB at once, it takes over 2 GB of memory. Documents no longer than a piece are given whole."""
    texts = ["w0 w1", " ".join(WORDS * 4), "w2 w3 w4 w5", "w6"]
    settings = replace(SMALL, layout=layout)
    kind = write.__name__.removeprefix("write_")
    source = write(tmp_path / f"c.{kind}", texts)
    whole = signature(planned_with(source, settings))
    watched = Watched()
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 11)
    monkeypatch.setattr(tokens, "GROUP_CHARACTERS", 8)
    assert signature(tokenize_corpus(source, watched, settings)) == whole
    given = list(chain(*watched.given))
    assert max(map(len, given)) <= 11 + len(" w10")
    assert {"w0 w1", "w2 w3 w4 w5", "w6"} <= set(given)


def test_jsonl_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a\\u2028b\xe2\x80\xa8c"}\r\n\n  \n{"text": "", "other": 1}\n{"text":"last"}'
    )
    assert texts_of(path) == ["a\u2028b\u2028c", "", "last"]
    assert texts_of(f"{path}:") == texts_of(f"{path}:text")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(TEXTS, pa.string()).cast(kind)
    source = write_parquet(tmp_path / "c.parquet", column, "body")
    assert texts_of(f"{source}:body") == TEXTS
    assert texts_of(f"file://{source}:body") == TEXTS


def test_builtin_pydoc() -> None:
    texts = texts_of("builtin:pydoc")
    assert len(texts) > 50
    assert all(texts)
    assert texts == texts_of("builtin:pydoc")
    assert corpus_fingerprint("builtin:pydoc") == corpus_fingerprint("builtin:pydoc")
    assert tokenize_corpus("builtin:pydoc", TOKENIZER, Settings(max_sequences=3)).num_sequences == 3


@pytest.fixture
def hub(tmp_path: Path) -> str:
    pytest.importorskip("datasets")
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS)
    write_jsonl(folder / "test.jsonl", ["t1", "t2"])
    return str(folder)


def test_hf_streams_a_dataset(hub: str) -> None:
    assert texts_of(f"hf:{hub}") == TEXTS
    assert texts_of(f"hf:{hub}::test") == texts_of(f"hf:{hub}:default:test:text") == ["t1", "t2"]
    assert rows_of(planned_with(f"hf:{hub}")) == packed_oracle(TEXTS, 4)


def test_hf_fingerprint_follows_content_and_split(hub: str) -> None:
    before = corpus_fingerprint(f"hf:{hub}")
    assert corpus_fingerprint(f"hf:{hub}") == before != corpus_fingerprint(f"hf:{hub}::test")
    write_jsonl(Path(hub) / "train.jsonl", ["other"])
    assert corpus_fingerprint(f"hf:{hub}") != before


def test_hf_errors(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_be_read(f"hf:{hub}::dev", "Bad split: dev", "'train'", "Check the name")
    cannot_be_read(f"hf:{hub}:nope", "'nope' not found. Available: ['default']")
    cannot_be_read(f"hf:{hub}:::txt", "row 1: no field 'txt'.", "Did you mean 'text'?")
    write_jsonl(Path(hub) / "train.jsonl", [5])  # type: ignore[list-item]
    cannot_be_read(f"hf:{hub}", "row 1: 'text' is not text but 5.")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", offline)
    fails(lambda: corpus_fingerprint("hf:name"), "hf:name cannot be read: no network", "hf auth login")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="hf:name needs datasets, which is not installed"):
        next(documents("hf:name"))


# Fingerprints


def test_fingerprint_is_the_content_and_the_field(jsonl: str, tmp_path: Path) -> None:
    first = corpus_fingerprint(jsonl)
    copy = shutil.copy(jsonl, str(tmp_path / "another name.jsonl"))
    assert {corpus_fingerprint(source) for source in (copy, f"file://{jsonl}", f"{jsonl}:text")} == {first}
    assert corpus_fingerprint(f"{jsonl}:other") != first
    assert len(first) == 64
    write_jsonl(Path(jsonl), [*TEXTS, "more"])
    assert corpus_fingerprint(jsonl) != first


def test_fingerprint_knows_where_files_end(tmp_path: Path) -> None:
    prints = set()
    for texts in (("a\n", "b"), ("a", "\nb"), ("b", "a\n")):
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        prints.add(corpus_fingerprint(f"{tmp_path}/*.txt"))
    assert len(prints) == 3


def test_remote_fingerprint_is_path_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bytes are read: the mock file system is given other bytes of the same size and time."""

    def mock(data: bytes, hour: int) -> fs.FileSystem:
        remote = fs._MockFileSystem(datetime.datetime(2025, 1, 1, hour))
        remote.create_dir("bucket")
        for name in ("a", "b"):
            with remote.open_output_stream(f"bucket/{name}.txt") as stream:
                stream.write(data)
        return remote

    def fingerprint_of(data: bytes, hour: int, source: str = "s3://bucket/*.txt") -> str:
        monkeypatch.setattr(sources, "_filesystem", lambda path: (mock(data, hour), path.removeprefix("s3://")))
        assert set(documents(source)) == {data.decode()}
        return corpus_fingerprint(source)

    first = fingerprint_of(b"one", 1)
    assert fingerprint_of(b"two", 1) == first
    others = [fingerprint_of(b"three", 1), fingerprint_of(b"one", 2), fingerprint_of(b"one", 1, "s3://bucket/a.txt")]
    assert len({first, *others}) == 4


# Streaming


@pytest.mark.parametrize("group", [1, 64])
def test_a_bad_tail_is_not_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(tokens, "GROUP_DOCUMENTS", group)
    path = tmp_path / "c.jsonl"
    write_jsonl(path, TEXTS)
    with path.open("a") as file:
        file.write("{broken\n")
    planned = tokenize_corpus(str(path), TOKENIZER, replace(SMALL, max_sequences=4))
    assert rows_of(planned) == packed_oracle(TEXTS, 4)
    fails(lambda: tokenize_corpus(str(path), TOKENIZER, replace(SMALL, max_sequences=5)), f"{path}, line 5 is not JSON")


@pytest.mark.nightly
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """200 MB of text are streamed and fingerprinted in a process that may grow by less than a third of it."""
    (tmp_path / "c.jsonl").write_bytes((json.dumps({"text": "x" * 9980}).encode() + b"\n") * 20_000)
    code = (
        "import sys; from avss_dist.corpus.sources import open_source\n"
        "from avss_dist.core.memory import peak_memory as peak\n"
        "source = open_source(sys.argv[1]); next(source.documents()); before = peak()\n"
        "n = sum(1 for _ in source.documents()); source.fingerprint()\n"
        "print(n, peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    count, grown = map(int, result.stdout.split())
    assert count == 20_000
    assert grown < 60e6


# Errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "is not JSON: Expecting property name enclosed in double quotes: column 2 (char 1)."),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1]", 'is not a JSON object.\nWrite it as {"text": "..."}.'),
        (b'{"txt": "x", "id": 1}', ": no field 'text'.\nDid you mean 'txt'? Valid: txt, id."),
        (b'{"text": 5}', ": 'text' is not text but 5."),
        (b'{"text": null}', ": 'text' is not text but None."),
        (b'{"text": [1, 2]}', ": 'text' has numbers, and a corpus is text.\nDecode token ids into text first: "),
        (b'{"text": "\\ud800"}', ": 'text' is not text but '\\ud800'."),
        (b'{"text": "\xff"}', ": byte 10 is not UTF-8."),
    ],
)
def test_bad_jsonl_lines(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    cannot_be_read(path, f"{path}, line 3{'' if message.startswith(':') else ' '}{message}")


def test_packed_files_and_tables_have_the_same_texts(tmp_path: Path) -> None:
    texts = ["One, two.", 'He said "no"\nand left.', "Größe"]
    plain = write_jsonl(tmp_path / "c.jsonl", texts)
    table = tmp_path / "c.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("n", "text"), *enumerate(texts)])
    assert texts_of(table) == texts_of(plain) == texts
    for path in (Path(plain), table):
        for ending, codec in (("gz", "gzip"), ("zst", "zstd")):
            with pa.output_stream(f"{path}.{ending}", compression=codec) as stream:
                stream.write(path.read_bytes())
            assert texts_of(f"{path}.{ending}:text") == texts
    cannot_be_read(f"{table}:txt", f"{table}, line 2: no field 'txt'.", "Did you mean 'text'?")
    table.write_text("text,n\na\nb,1,2\n")
    cannot_be_read(f"{table}:n", f"{table}, line 2: 'n' is not text but None.")
    Path(f"{plain}.gz").write_bytes(b"not packed")
    cannot_be_read(f"{plain}.gz", f"{plain}.gz cannot be read: ", "Check that the file exists")


def test_bad_parquet(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "c.parquet", ["a", None])
    cannot_be_read(f"{source}:txt", f"{source}: no column 'txt'.", "Did you mean 'text'? Valid: text, n.")
    cannot_be_read(source, f"{source}, row 2: 'text' is not text but None.")
    cannot_be_read(f"{source}:n", f"{source}, row 1: 'n' is not text but 0.")
    Path(source).write_bytes(b"not parquet at all")
    cannot_be_read(source, f"{source} cannot be read: ", "Check that the file exists, is complete")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("data.json:body", ["'data.json:body' is not a corpus source.", "Did you mean '.jsonl'?", "hf:NAME"]),
        ("data.xls", ["Valid: .txt, .jsonl, .csv, .parquet.", "builtin:pydoc"]),
        ("wikitext", ["'wikitext' is not a corpus source.\nDid you mean 'wikitext2'?", "Sources: file.txt, "]),
        ("", ["'' is not a corpus source."]),
        ("builtin:pydocs", ["Unknown builtin corpus 'pydocs'.", "Did you mean 'pydoc'?"]),
        ("ftp://host/a.txt", ["ftp://host/a.txt cannot be read: Unrecognized filesystem type"]),
        ("missing.jsonl", ["missing.jsonl: no such file.", "working directory"]),
        ("missing/*.jsonl:body", ["missing/*.jsonl: no such file."]),
        ("file:///missing.txt", ["file:///missing.txt: no such file."]),
        ("folder.parquet", ["folder.parquet is a directory.", "folder.parquet/*.parquet'"]),
        ("c.txt:body", ["'c.txt:body': a text file has no field.", "Write c.txt alone."]),
        ("hf:", ["'hf:' is not a corpus source."]),
        ("hf:a:b:c:d:e", ["'hf:a:b:c:d:e' is not a corpus source."]),
    ],
)
def test_unknown_sources(source: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.parquet").mkdir()
    for call in (documents, corpus_fingerprint, lambda s: tokenize_corpus(s, TOKENIZER, SMALL)):
        fails(lambda call=call: call(source), *parts)  # type: ignore[misc]


def test_a_file_that_cannot_be_read(jsonl: str) -> None:
    os.chmod(jsonl, 0)
    if not os.access(jsonl, os.R_OK):  # of root, it can be read all the same
        cannot_be_read(jsonl, f"{jsonl} cannot be read: ", "Permission denied", "readable")
    os.chmod(jsonl, 0o600)
    reading = documents(jsonl)
    os.remove(jsonl)
    fails(lambda: next(reading), f"{jsonl} cannot be read: ", "Check that the file exists")


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        (["w0 w1", "w2"], {}, ["c.jsonl is 5 tokens long, too short for one sequence of 6.", "padded"]),
        (
            ["w0 w1", "w2"],
            {"layout": "padded", "skip_first_tokens": 2},
            ["`skip_first_tokens` 2 leaves no token of ", "no sequence that was read is longer (sequences: 2)."],
        ),
        (["w0 w1", "w2"], {"layout": "padded", "skip_sequences": 2}, ["it has 2, and `skip_sequences` leaves out 2."]),
        (["w0 w1", "w2"], {"layout": "padded", "skip_sequences": 9, "shuffle_seed": 0}, ["it has 2, and"]),
        (["w0 w1 w2 w3 w4 w5"], {"skip_sequences": 3}, ["it has 1, and `skip_sequences` leaves out 3."]),
        ([], {}, ["c.jsonl holds no text (documents read: 0)."]),
        (["", " \n"], {}, ["c.jsonl holds no text (documents read: 2)."]),
        (["", " \n"], {"layout": "padded"}, ["c.jsonl holds no text (documents read: 2)."]),
    ],
)
def test_too_little_text(texts: list[str], options: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    fails(lambda: planned_with(source, Settings(sequence_length=6, **options)), *says)


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt", "c.parquet"])
def test_a_line_without_an_end_is_refused_before_it_takes_the_memory(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    size = 32 << 20
    if name == "c.parquet":
        parquet.write_table(pa.table({"text": ["short", "x" * size]}), file)
    else:
        first, rest = (b'{"text": "short"}\n{"text": "', b'"}\n') if name == "c.jsonl" else (b"short\n", b"")
        file.write_bytes(first + b"x" * size + rest)
    with pytest.raises(CorpusError, match=f"{name}, .*is longer than") as caught:
        texts_of(file)
    assert caught.value.hint == "Split it into several documents."
    if name == "c.jsonl":
        assert next(documents(str(file))) == "short"
        assert "line 2" in caught.value.message
