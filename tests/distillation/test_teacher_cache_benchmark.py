"""The benchmark of the teacher's cache at its smallest size."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.teacher_cache import main

pytestmark = pytest.mark.nightly


def test_the_benchmark_prints_a_row_for_the_teacher_and_for_each_cache(
    student: Path, teacher: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tops = [argument for top in (2, 512) for argument in ("--top", str(top))]
    sizes = ["--steps", "12", "--sequence-length", "32", "--held-out", "4", "--device", "cpu", "--dtype", "float32"]
    main([str(student), str(teacher), str(corpus), *tops, *sizes])
    title, header, beside, *cached = capsys.readouterr().out.splitlines()
    assert "12 steps of 2 x 32 tokens" in title and "tokens/s" in header and beside.startswith("beside")
    rows = [row.split() for row in cached]
    assert [row[1] for row in rows] == ["2", "512"]
    others, missed = ([float(row[i].rstrip("%")) for row in rows] for i in (6, 8))
    assert others[0] > 10 and others[1] == 0
    assert missed[0] > 0.01 and missed[1] == pytest.approx(0, abs=1e-4)
