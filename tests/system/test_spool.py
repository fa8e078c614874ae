"""Arrays that grow: the same rows in memory, in a file, and where the disk fills up on the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from avss_dist.system import spool

PIECES = np.split(np.arange(400_000, dtype=np.int32).reshape(-1, 4), [0, 1, 5_000, 60_000])


def spooled(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(spool, "KEPT_BYTES", kept_bytes)
    growing = spool.Spool(4)
    for piece in PIECES:
        growing.add(piece)
    return growing.array()


@pytest.mark.parametrize("kept_bytes", [1 << 30, 100_000, 0])
def test_rows_come_back_from_memory_or_from_a_file(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = spooled(kept_bytes, monkeypatch)
    assert np.array_equal(found, np.concatenate(PIECES)) and found.dtype == np.int32
    assert found.flags.writeable == (kept_bytes == 1 << 30), "a file is mapped, and read only"
    assert spool.Spool(4).array().shape == (0, 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_where_the_disk_is_full_the_rest_stays_in_memory(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    found = spooled(100_000, monkeypatch)
    assert np.array_equal(found, np.concatenate(PIECES))
