"""The tutorial notebook runs, from its first cell to its last; of a tiny model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from support.documentation import ROOT, read

from avss_dist.core.results import TabularResult

pytestmark = pytest.mark.nightly

NOTEBOOK = json.loads(read(ROOT / "jobs" / "tutorial.ipynb"))


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression, as a notebook shows it."""
    *before, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        exec(source, names)
        return None
    exec(compile(ast.Module(before, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_tutorial_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = []
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs"), "what is stored runs anew"
        if cell["cell_type"] == "code":
            shown.append(run_cell("".join(cell["source"]), names))
            if "MODEL" in names:  # the first cell says what is read
                names |= {"MODEL": str(tiny_llama), "READ": {"max_sequences": 16, "sequence_length": 32}}
                names["READ"] |= {"executor": "local", "sequences_per_shard": 2}
    results = [value for value in shown if isinstance(value, TabularResult)]
    assert [type(value).__name__ for value in results] == ["Run", "Table", "Ablation", "Evaluations"]
    assert all("<table>" in value._repr_html_() for value in results)
    assert {row["subject"] for row in names["kept"].table().to_pylist()} >= {"damage.yaml", "avss.yaml"}
