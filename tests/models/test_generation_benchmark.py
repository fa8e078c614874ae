"""The benchmark of generation, at its smallest."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.generation import main

pytestmark = pytest.mark.nightly


def test_the_benchmark_prints_both_times_of_the_same_tokens(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tiny_llama), "--drop", "1", "--new", "4", "--prompt", "8", "--rows", "1", "2", "--rounds", "1"])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(", ")[:2] for row in rows] == [["1", "True"], ["2", "True"]]
    assert all(float(cell) >= 0 for row in rows for cell in row.split(", ")[2:])
