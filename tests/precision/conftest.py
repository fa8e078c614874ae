"""A model whose linear maps every format can take, its warehouse, and its precision plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama
from support.command_line import avss

SMALL = ("--max-sequences", 8, "--sequence-length", 32, "--executor", "local")
FORMATS = ("int4-g32", "int8", "q4_0", "bf16")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    model = llama(hidden_size=64, intermediate_size=128, initializer_range=0.3)
    return save_checkpoint(model, tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def predicted(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warehouse with a run, and with predictions for four formats."""
    folder = tmp_path_factory.mktemp("predicted") / "w"
    formats = [word for name in FORMATS for word in ("--quantize", name)]
    for words in (
        ("score", wide, "--corpus", "builtin:pydoc", *SMALL),
        ("ablate", wide, "--corpus", "builtin:pydoc", *SMALL, *formats, "--no-leave-one-out", "--no-rounded-layers"),
    ):
        done = avss(*words, "-w", folder)
        assert done.exit_code == 0, done.stderr
    return folder
