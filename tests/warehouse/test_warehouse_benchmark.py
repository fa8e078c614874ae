"""The benchmark of a warehouse of many runs runs, at a small size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks.warehouse import main

pytestmark = pytest.mark.nightly


def test_the_benchmark_of_many_runs_measures_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["ls", "compare --by family", "query @drift"]
    main([str(tmp_path / "many"), "--runs", "24", "--layers", "4", "--rounds", "1", "--only", *wanted])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28].strip() for line in lines[2:]] == wanted
    assert all(int(line[28:].split()[4].replace(",", "")) > 500 for line in lines[2:]), "each has printed its table"


def test_the_benchmark_counts_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.warehouse.os.environ", dict(os.environ))
    main([str(tmp_path / "many"), "--runs", "3", "--layers", "2", "--rounds", "2", "--s3", "--only", "ls", "compact"])
    lines = capsys.readouterr().out.splitlines()[2:]
    first, again = (int(number.strip(",")) for number in lines[0].split()[-2:])
    assert first >= again + 3, "the files of three runs are requested once"
    assert lines[1].startswith("compact ")
