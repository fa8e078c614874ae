"""A model and a text from which layers are dropped, repaired and distilled; every test computes with one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama, one_thread
from support.families import lively
from support.skeletons import shared_skeletons
from support.texts import sentences


@pytest.fixture(scope="module", autouse=True)
def same_bytes() -> Iterator[None]:
    """Have equal work give equal bytes, and build the empty models that plans are checked with once."""
    with one_thread(), shared_skeletons():
        yield


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    return save_checkpoint(lively(llama(num_hidden_layers=8)), tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(sentences(600, seed=1)))
    return file
