"""Damaged warehouses: every command that reads one ends in order, and leaves it as it was."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import files
from support.fuzzing import fuzzed, hold, write_damaged
from support.warehouses import activations, stats_of, write_measured, write_scores

from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

pytestmark = pytest.mark.nightly

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs; one of them evaluated, and with an experiment. Not to be changed."""
    root = tmp_path_factory.mktemp("whole") / "w"
    for seed, name in enumerate(("alpha", "beta")):
        x = activations(seed)
        write_measured(root, f"{name}-0123456789", stats_of(x, before=0.7 * x), 8, revision="r", device="cpu")
    write_scores(root, "gamma-0123456789", [3.0, 1.0, 2.0, 4.0])
    store = Store(root)
    store.write_run({"run_id": "gone-0123456789", "status": "failed", "error": "no", "model": "m", "created_at": NOW})
    run = RunIdentity(run_id="alpha-0123456789", model="org/alpha-0123456789", revision="r", family="llama")
    about = {"task": "ablation:text.txt", "metric": "loss", "drop": [], "created_at": NOW}
    one = {**about, "value": 2.0, "stderr": 0.1, "num_samples": 9, "settings": "{}"}
    removed = [{**one, "drop": [i], "value": 2.0 + i / 8} for i in range(8)]
    of_layers = [{**row, "layer": i, "drop": []} for i, row in enumerate(removed)]
    store.write_evaluations(run, [one, *removed, *of_layers])
    store.write_cell(run, "0" * 20, [{**about, "part": 0, "samples": [1.0], "weights": [1.0]}])
    tried = {**about, "task": "perplexity:t.txt", "value": 3.0, "stderr": 0.1, "share": 0.25}
    kept = {"retention": 0.5, "retention_low": 0.4, "retention_high": 0.6}
    reading = {"site": "block", "recipe": "pooled", "threshold": 1e-5, "threshold_kind": "absolute"}
    methods = [
        {**tried, "method": "whole model", "share": 0.0, "retention": 1.0},
        {**tried, **kept, **reading, "method": "avss", "score": "avss", "drop": [1, 2]},
        {**tried, **kept, "method": "random 0", "score": "random", "seed": 0, "drop": [3, 4]},
    ]
    store.write_rows("experiments", run, "1" * 20, methods)
    return root


COMMANDS: list[list[str]] = [
    ["show", "-w", "W"],
    ["show", "-w", "W", "--run", "alpha"],
    ["show", "-w", "W", "-o", "O.svg", "--run", "*"],
    ["query", "-w", "W", "FROM runs"],
    ["query", "-w", "W", "FROM scores", "--format", "csv"],
    ["query", "-w", "W", "FROM evaluations", "--format", "json"],
    ["query", "-w", "W", "SELECT * FROM experiments JOIN cells USING (run_id)", "--format", "markdown"],
    ["query", "-w", "W", "FROM scores_at(0.1)"],
    ["query", "-w", "W", "@drift"],
    ["query", "-w", "W", "@lowest_quartile"],
    ["query", "-w", "W", "@stability"],
    ["query", "-w", "W", "@cost"],
    ["compare", "-w", "W"],
    ["compare", "-w", "W", "--by", "score"],
    ["compare", "-w", "W", "--by", "recipe", "--allow-mismatch"],
    ["findings", "-w", "W", "--all"],
    ["show", "-w", "W", "--threshold", "0.1rms"],
    ["show", "--quantiles", "-w", "W"],
    *(["show", "-w", "W", "--format", kind] for kind in ("csv", "json")),
    ["report", "-w", "W", "-o", "O.html"],
    ["plan", "-w", "W", "-o", "O.yaml"],
    ["plan", "-w", "W", "-o", "O.yaml", "--by", "avss", "--run", "alpha"],
    ["plan", "-w", "W", "-o", "O.yaml", "--by", "loss", "--run", "alpha"],
    ["findings", "--truth", "-w", "W", "--run", "alpha"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_whole_warehouse_is_read(command: list[str], whole: Path, tmp_path: Path) -> None:
    assert hold(*_filled(command, whole, tmp_path))[0] == 0


@fuzzed(20)
@given(data=st.data())
def test_no_damage_is_a_traceback(data: Any, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    root = Path(shutil.copytree(whole, folder / "w"))
    file = data.draw(st.sampled_from(sorted(file for file in root.rglob("*.parquet"))))
    write_damaged(data.draw, file)
    before = files(root)
    command = data.draw(st.sampled_from(COMMANDS))
    hold(*_filled(command, root, folder))
    assert files(root) == before
    shutil.rmtree(folder)


def _filled(command: list[str], root: Path, out: Path) -> list[str]:
    return [str(root) if arg == "W" else str(out / arg) if arg.startswith("O.") else arg for arg in command]
