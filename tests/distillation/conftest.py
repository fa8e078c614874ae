"""A tiny teacher, a student that lacks one of its layers, and texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama
from support.texts import sentences

from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import prune


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A Llama of 4 layers whose predictions depend on its input."""
    model = llama(seed=5, num_hidden_layers=4, initializer_range=0.3, tie_word_embeddings=True)
    return save_checkpoint(model, tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="session")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher without its layer 2, written by `prune`."""
    plan = Plan(model=str(teacher), num_layers=4, layers="layers", drop=(2,))
    prune(str(teacher), plan, folder := tmp_path_factory.mktemp("student") / "student")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "trained.txt"
    file.write_text("\n".join(sentences(200, seed=1)))
    return file


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "other.txt"
    file.write_text("\n".join(sentences(40, seed=2)))
    return file
