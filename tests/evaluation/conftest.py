"""A model and a text from which layers are dropped, repaired and distilled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama
from support.families import lively
from support.texts import sentences


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    return save_checkpoint(lively(llama(num_hidden_layers=6)), tmp_path_factory.mktemp("models") / "deep")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(sentences(600, seed=1)))
    return file
