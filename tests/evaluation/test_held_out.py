"""Text that scores have seen is refused in evaluations, however it is written; other text is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.texts import SAME, TEXT, sentences

from avss_dist import score
from avss_dist.core.errors import ConfigError
from avss_dist.core.settings import Settings
from avss_dist.evaluation.tasks import make_task, refuse_overlap, texts_of_run
from avss_dist.models.checkpoints import resolve
from avss_dist.tasks.task import Task
from avss_dist.warehouse.reader import Warehouse

SHORT: dict[str, Any] = {"sequence_length": 16, "device": "cpu", "sequences_per_shard": 100}


@pytest.fixture(scope="module")
def seen(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A warehouse, a run in it, and the text of that run."""
    folder = tmp_path_factory.mktemp("seen")
    text = folder / "text.txt"
    text.write_text(TEXT)
    run = score(
        str(tiny_llama),
        corpus=str(text),
        warehouse=folder / "w",
        sites=("block",),
        executor="local",
        batch_size=100,
        **SHORT,
    )
    return folder / "w", run.run_id, text


def refuse(seen: tuple[Path, str, Path], model: Path, task: Task) -> None:
    refuse_overlap([task], texts_of_run(Warehouse(seen[0]), seen[1], resolve(str(model))))


def task_on(text: str, model: Path, folder: Path, **changes: Any) -> Task:
    file = folder / "read.txt"
    file.write_bytes(text.encode())
    return make_task(resolve(str(model)), f"perplexity:{file}", Settings(**SHORT | changes))


@pytest.mark.parametrize("name", SAME)
def test_seen_text_in_short_rows_is_refused(
    name: str, seen: tuple[Path, str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"% of perplexity:.* is text that the scores of .* were measured on"):
        refuse(seen, tiny_llama, task_on(SAME[name], tiny_llama, tmp_path))
    refuse(seen, tiny_llama, task_on("\n".join(sentences(60, seed=40)), tiny_llama, tmp_path))


def test_text_that_cannot_be_compared_is_refused(
    seen: tuple[Path, str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("yes", "no", "perhaps")))
    task = make_task(resolve(str(tiny_llama)), f"perplexity:{file}", Settings(**SHORT, layout="padded"))
    with pytest.raises(
        ConfigError, match=r"cannot be compared with the text that the scores of .*: one of them has no 16"
    ):
        refuse(seen, tiny_llama, task)


def test_text_that_has_changed_cannot_be_compared(
    seen: tuple[Path, str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    other = task_on("\n".join(sentences(60, seed=41)), tiny_llama, tmp_path)
    seen[2].write_text("\n".join(sentences(60, seed=42)))
    try:
        with pytest.raises(ConfigError, match=r"text of run .* has changed since it was read: .*text\.txt"):
            refuse(seen, tiny_llama, other)
    finally:
        seen[2].write_text(TEXT)
    refuse(seen, tiny_llama, other)
