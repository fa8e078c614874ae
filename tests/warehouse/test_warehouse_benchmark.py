"""The benchmark of a warehouse of many runs runs, at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.warehouse import main


def test_the_benchmark_of_many_runs_measures_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["ls", "compare --by family", "query @drift"]
    main([str(tmp_path / "many"), "--runs", "24", "--layers", "4", "--rounds", "1", "--only", *wanted])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].strip() for line in lines[2:]] == wanted
    assert all(int(line[65:78].replace(",", "")) > 500 for line in lines[2:]), "each has printed its table"
