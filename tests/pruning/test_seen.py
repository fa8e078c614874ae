"""Texts that runs, evaluations and checkpoints have read: from stored rows of this and of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avss_dist.core.errors import ModelError
from avss_dist.corpus.seen import SeenText
from avss_dist.plans.seen import SEEN_FILE, read_seen, seen_by_evaluation, seen_by_run, write_seen

SETTINGS = {"max_sequences": 8, "skip_sequences": 4, "sequence_length": 32, "row_start": "none"}
SEEN = SeenText(use="search", by="m-7", corpus="b.txt", **SETTINGS)


def evaluation(task: str, **settings: Any) -> dict[str, Any]:
    return {"run_id": "m-7", "task": task, "settings": json.dumps(SETTINGS | settings)}


def test_a_run_has_read_its_text() -> None:
    prints = {"corpus_fingerprint": "c", "tokens_fingerprint": "t"}
    settings = json.dumps({**SETTINGS, "max_sequences": None, "sequences_per_shard": 4})
    run = {"run_id": "m-1", "corpus": "a.txt", "num_sequences": 6, "settings": settings, **prints}
    options = SETTINGS | {"max_sequences": 6}
    expected = SeenText(use="scores", by="m-1", corpus="a.txt", sequences_per_shard=4, **prints, **options)
    assert seen_by_run(run) == (expected,)


def test_a_model_that_was_not_scored_has_read_nothing() -> None:
    assert seen_by_run({"run_id": "m-1", "status": "measured"}) == ()


def test_an_evaluation_has_read_what_it_says() -> None:
    text = {**SEEN.values(), "by": "", "corpus_fingerprint": "c"}
    (seen,) = seen_by_evaluation(evaluation("search:b.txt", read=[text]))
    assert seen.by == "m-7"
    assert seen.corpus_fingerprint == "c"


@pytest.mark.parametrize(
    ("task", "use"),
    [
        ("ablation:b.txt", "ablation"),
        ("damage:b.txt", "ablation"),
        ("search:b.txt", "search"),
        ("rounding:b.txt", "precision"),
        ("rounded:int8:b.txt", "precision"),
        ("sparsity:loss:b.txt", "sparsity"),
    ],
)
def test_an_evaluation_of_an_earlier_version_has_read_the_text_of_its_task(task: str, use: str) -> None:
    assert seen_by_evaluation(evaluation(task)) == (SeenText(use=use, by="m-7", corpus="b.txt", **SETTINGS),)


def test_an_evaluation_without_a_text_has_read_nothing() -> None:
    assert seen_by_evaluation(evaluation("sparsity:acttail")) == ()


def test_the_file_beside_the_weights_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_seen(tmp_path, [SEEN, SEEN])
    assert read_seen(tmp_path) == (SEEN,)


def test_a_checkpoint_without_texts_has_no_file(tmp_path: Path) -> None:
    write_seen(tmp_path, [])
    assert not [*tmp_path.iterdir()]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / SEEN_FILE).write_text("seen: [{use: reading, corpus: b.txt}]\n")
    with pytest.raises(ModelError, match=rf"(?s){SEEN_FILE}:1: Unknown use 'reading'.*Copy the checkpoint again"):
        read_seen(tmp_path)
