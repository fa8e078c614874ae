"""Lines in a log while a command works: the rate and the time that is left."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.distillation.events import Preparing
from avss_dist.evaluation.events import CellDone, CellsStarted, CellUnderway
from avss_dist.report.terminal import progress as progress_module
from avss_dist.report.terminal.progress import CellProgress, Pace, StepProgress
from avss_dist.runs.events import RunStarted, ShardMeasured
from avss_dist.system.streams import USUAL, set_verbosity

CELL: Any = SimpleNamespace(
    checkpoint=SimpleNamespace(name="org/a"), intervention=NO_INTERVENTION, task="perplexity:a.txt"
)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute passes between two looks at the clock. An earlier command may have been quiet."""
    set_verbosity(USUAL)
    times = iter(range(0, 10_000_000, 60))
    monkeypatch.setattr("time.monotonic", lambda: float(next(times)))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]


def test_the_rate_and_the_time_left() -> None:
    pace = Pace(0.0, total=1400.0, unit="tokens")
    assert pace.describe() == ""
    for second in range(1, 9):
        pace.advance(50.0, float(second))
    assert re.fullmatch(r", 50 tokens/s, .* left", pace.describe())
    late = Pace(0.0, total=1000.0, unit="tokens")  # the model is opened in 10 s before the first shard
    for second in (12.0, 14.0, 16.0, 18.0, 20.0):
        assert late.rate() is None
        late.advance(100.0, second)
    assert (late.rate(), late.seconds_left(500.0, 20.0)) == (50.0, 10.0)
    slow = Pace(0.0, total=18.0, unit="evaluations")
    for minute in range(1, 9):
        slow.advance(1.0, 60.0 * minute)
    assert re.match(r", 1 evaluations/min, ", slow.describe())


def test_an_evaluation_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with CellProgress() as progress:
        progress(CellsStarted([CELL] * 20, 0))
        progress(CellUnderway(CELL, "Reading text", 0.5))
        for _ in range(10):
            progress(CellDone(CELL))
    said = lines(capsys)
    assert said[0] == "a: Reading text, 50%; 0 of 20 evaluated"
    assert re.fullmatch(r"a: 10 of 20 evaluated, [\d.]+ evaluations/min, .* left", said[-1])


def test_shrinking_tells_how_far_each_step_is(capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress() as progress:
        progress(RunStarted("a", 1000, 0))
        for _ in range(8):
            progress(ShardMeasured("a", 100))
        progress(CellsStarted([CELL] * 10, 0))
        progress(CellUnderway(CELL, "Repairing cut 1 of 2", 0.25))
        progress(CellDone(CELL))
    said = lines(capsys)
    assert any(re.fullmatch(r"scoring layers: 80%, .* left", line) for line in said)
    assert "repairing cut 1 of 2, 25%" in said and "evaluating: 10%" in said


def test_the_teachers_writing_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress() as progress:
        for tenth in range(10):
            progress(Preparing("the teacher writes text", tenth / 10))
    said = lines(capsys)
    assert "the teacher writes text, 10%" in said
    assert re.fullmatch(r"the teacher writes text, 90%, .* left", said[-1])


def test_lines_are_half_a_minute_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(times)))
    with StepProgress() as progress:
        for part in range(100):
            progress(Preparing("the teacher writes text", part / 100))
    assert progress_module.LOG_SECONDS == 30 and 2 <= len(lines(capsys)) <= 10


@pytest.mark.parametrize("kind", [CellProgress, StepProgress])
def test_each_note_is_printed_once(kind: type[StepProgress], capsys: pytest.CaptureFixture[str]) -> None:
    with kind() as progress:
        progress(CellsStarted([CELL, CELL], 0))
        for _ in range(2):
            progress(CellDone(CELL, ["[bold]a[/bold] is slow."]))
    assert capsys.readouterr().err.count("Note: [bold]a[/bold] is slow.") == 1
