"""Records of texts that were read: what they keep, and when two of them are of the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.texts import TEXT
from transformers import AutoTokenizer

from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.corpus.overlap import read_again
from avss_dist.corpus.seen import SeenText, distinct, seen_text
from avss_dist.corpus.shards import tokenize_corpus

READ = Settings(sequence_length=16, skip_sequences=2, max_sequences=5, shuffle_seed=3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (path := tmp_path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def seen(file: Path, tokenizer: Any) -> SeenText:
    return seen_text(tokenize_corpus(str(file), tokenizer, READ), READ, "ablation", "a-1")


def test_the_same_rows_are_read_again(seen: SeenText, file: Path, tokenizer: Any) -> None:
    first = tokenize_corpus(str(file), tokenizer, READ)
    assert read_again(seen, tokenizer, str(file)).tokens_fingerprint == first.tokens_fingerprint


def test_its_values_make_it_again(seen: SeenText) -> None:
    assert SeenText(**seen.values()) == seen


def test_the_number_of_rows_is_kept_where_all_were_read(file: Path, tokenizer: Any) -> None:
    """The text may grow."""
    settings = Settings(sequence_length=16)
    text = tokenize_corpus(str(file), tokenizer, settings)
    assert seen_text(text, settings, "scores").max_sequences == text.num_sequences


def test_it_has_no_keys() -> None:
    assert SeenText(use="search", corpus="s3://KEY:SECRET@bucket/a.txt").corpus == "s3://bucket/a.txt"


def test_a_text_that_has_changed_is_told(seen: SeenText, file: Path, tokenizer: Any) -> None:
    file.write_text(TEXT[::-1])
    with pytest.raises(ConfigError, match=r"text of the ablation a-1 has changed since it was read: .*text\.txt"):
        read_again(seen, tokenizer, str(file))


def test_a_text_whose_rows_are_the_same_has_not_changed(seen: SeenText, file: Path, tokenizer: Any) -> None:
    """One in an object store has another hash of its content whenever it is uploaded."""
    assert read_again(replace(seen, corpus_fingerprint="another"), tokenizer, str(file))


def test_a_text_that_is_gone_is_told(seen: SeenText, file: Path, tokenizer: Any) -> None:
    file.unlink()
    with pytest.raises(ConfigError, match="text of the ablation a-1 cannot be read again"):
        read_again(seen, tokenizer, str(file))


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"use": "scores", "by": "b"}, 1),
        ({"skip_sequences": 3}, 2),
        ({"corpus": "other.txt"}, 2),
        ({"corpus_fingerprint": "x"}, 2),
    ],
)
def test_the_same_rows_count_once(changes: dict[str, Any], number: int, seen: SeenText) -> None:
    assert len(distinct([seen, replace(seen, **changes)])) == number
