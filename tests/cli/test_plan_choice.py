"""The run that a plan is for where none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.command_line import avss

from avss_dist import ablate, plan, score
from avss_dist.core.errors import QueryError

TEXT = "builtin:pydoc"
SIZES: dict[str, Any] = {"max_sequences": 2, "device": "cpu", "executor": "local"}


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A warehouse, a run whose layers are measured, and a newer one of an encoder, which has no loss."""
    warehouse = tmp_path_factory.mktemp("choice") / "w"
    common = {"corpus": TEXT, "warehouse": warehouse, **SIZES, "sequence_length": 32}
    older = score(str(tiny_llama), sites=("block",), **common)
    ablate(str(tiny_llama), **common)
    newer = score(str(tiny_bert), sites=("block",), **common)
    return warehouse, older.run_id, newer.run_id


def test_the_newest_run_that_can_be_planned_for_is_taken(runs: tuple[Path, str, str], tmp_path: Path) -> None:
    warehouse, older, newer = runs
    assert plan(warehouse=warehouse).run_id == plan(warehouse=warehouse, by="loss").run_id == older
    done = avss("plan", "-w", warehouse, "-o", tmp_path / "plan.yaml")
    assert done.exit_code == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "This is the newest of 2 runs that can be planned for; --run names another." in told
    assert f"Run {newer} is newer and was passed over: No score was named" in told
    assert plan(warehouse=warehouse, by="block_influence").run_id == newer
    with pytest.raises(QueryError, match="No score was named"):
        plan(warehouse=warehouse, run=newer)
    with pytest.raises(QueryError, match=r"no measurement 'taylor' of the layers of .*tiny-bert"):
        plan(warehouse=warehouse, by="taylor")
