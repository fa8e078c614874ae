"""The benchmark of coverage, at its smallest."""

from __future__ import annotations

import pytest
from benchmarks.interval_coverage import METHODS, main


@pytest.mark.nightly
def test_the_benchmark_prints_the_coverage_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--draws", "2", "--sizes", "8", "--population", "lognormal 1"])
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert all(method in first for method in METHODS)
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| AVSS, lognormal 1", "| perplexity kept, lognormal 1"]
    assert all(0 <= float(cell.split()[0]) <= 100 for row in rows[:2] for cell in row.strip("| ").split(" | ")[2:])
    assert "lowest_set_probability" in rows[3]
