"""Shared by the tests of partitions: tiny checkpoints of families, and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import one_thread
from support.families import tiny_model


@pytest.fixture(autouse=True, scope="module")
def same_bytes() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return the folder of a tiny model of a kind and family, which is saved once."""
    root = tmp_path_factory.mktemp("families")

    def folder(kind: str, family: str) -> Path:
        path = root / f"{kind}-{family}"
        if not path.exists():
            tiny_model(kind, family).save_pretrained(path)
        return path

    return folder
