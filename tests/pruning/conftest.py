"""A model whose linear maps every number format can take, and the tiny one, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.causal_lm import opened
from support.checkpoints import llama
from support.skeletons import shared_skeletons

from avss_dist.models.causal_lm import LanguageModel


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    model = llama(hidden_size=64, intermediate_size=128, initializer_range=0.3)
    return save_checkpoint(model, tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def equal_skeletons() -> Iterator[None]:
    """Build the empty models that plans are checked with once for the tests of a module."""
    with shared_skeletons():
        yield


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return opened(tiny_llama, dtype="float32")
