"""Notes on how cells were measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.evaluation.events import CellDone, CellsStarted
from avss_dist.report.terminal.progress import CellProgress, StepProgress


@pytest.mark.parametrize("kind", [CellProgress, StepProgress])
def test_each_note_is_printed_once(kind: type[StepProgress], capsys: pytest.CaptureFixture[str]) -> None:
    cell: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(name="org/a"), intervention=NO_INTERVENTION, task="perplexity:a.txt"
    )
    with kind() as progress:
        progress(CellsStarted([cell, cell], 0))
        for _ in range(2):
            progress(CellDone(cell, ["[bold]a[/bold] is slow."]))
    assert capsys.readouterr().err.count("Note: [bold]a[/bold] is slow.") == 1
