"""Models, texts, tasks and plans that do not exist are named before torch is imported."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import avss

from avss_dist.core.errors import ModelError
from avss_dist.models.checkpoint.locate import require_checkpoint

WITHOUT_TORCH = """
import json, sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "ray", "numba", "lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Absent())

from typer.testing import CliRunner
from avss_dist.cli import app

for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, line)
    print(json.dumps([done.exit_code, done.stderr or repr(done.exception)]))
"""
NO_MODEL = "There is no folder './absent'."
NO_TEXT = "absent.txt: no such file."
NO_PLAN = "The plan absent.yaml cannot be read"
LINES = {
    "score ./absent --corpus text.txt": NO_MODEL,
    "score model --corpus absent.txt": NO_TEXT,
    "score model other --corpus absent.txt": NO_TEXT,
    "score ./absent ./gone --corpus text.txt": "There is no folder './gone'.",
    "ablate ./absent --corpus text.txt": NO_MODEL,
    "ablate model --corpus absent.txt": NO_TEXT,
    "evaluate ./absent --tasks perplexity:text.txt": NO_MODEL,
    "evaluate absent.yaml --tasks perplexity:text.txt": NO_PLAN,
    "evaluate model --sparse absent.yaml --tasks perplexity:text.txt": NO_PLAN,
    "evaluate model --base ./absent --tasks perplexity:text.txt": NO_MODEL,
    "evaluate model --tasks perplexity:absent.txt": NO_TEXT,
    "evaluate model --tasks truthfulqa:absent.jsonl": "absent.jsonl: no such file.",
    "evaluate model --tasks absent.yaml": "There is no task file absent.yaml.",
    "evaluate model --tasks perplxity:text.txt": "Did you mean 'perplexity'?",
    "evaluate model --tasks text.txt": "Did you mean 'perplexity:text.txt'?",
    "shrink ./absent --corpus text.txt -o out": NO_MODEL,
    "shrink model --corpus absent.txt -o out": NO_TEXT,
    "shrink model --corpus text.txt --repair-corpora absent.txt=2 -o out": NO_TEXT,
    "shrink model --corpus text.txt --tasks perplexity:absent.txt -o out": NO_TEXT,
    "prune ./absent plan.yaml -o out": NO_MODEL,
    "prune model absent.yaml -o out": NO_PLAN,
    "prune model plan.yaml --repair-corpora self --repair-corpora absent.txt -o out": NO_TEXT,
    "distill ./absent --teacher model -o out": NO_MODEL,
    "distill model --teacher ./absent -o out": NO_MODEL,
    "distill model --teacher model --corpora absent.txt -o out": NO_TEXT,
    "distill model --teacher model --watch absent.txt -o out": NO_TEXT,
    "estimate ./absent": NO_MODEL,
    "estimate model --teacher ./absent": NO_MODEL,
    "run absent.yaml": "The job file absent.yaml cannot be read",
    "run models.yaml": f"models.yaml:2: {NO_MODEL}",
    "run texts.yaml": f"texts.yaml:3: {NO_TEXT}",
    "run tasks.yaml": f"tasks.yaml:5: {NO_TEXT}",
    "run repairs.yaml": f"repairs.yaml:7: {NO_TEXT}",
    "plan --by greedy --corpus absent.txt -w absent": NO_TEXT,
    "plan -w absent": "absent is not a warehouse",
    "sparsify 0.5 -w absent": "absent is not a warehouse",
    "quantize --bits 4 -w absent": "absent is not a warehouse",
}
EXPERIMENT = "warehouse: w\nmodels: [model]\ncorpora: [text.txt]\nexperiment:\n"
FILES = {
    "text.txt": "Some text.",
    "plan.yaml": "model: model\n",
    "models.yaml": "warehouse: w\nmodels: [./absent]\ncorpora: [text.txt]\n",
    "texts.yaml": "warehouse: w\nmodels: [model]\ncorpora: [absent.txt]\n",
    "tasks.yaml": f"{EXPERIMENT}  tasks: ['perplexity:absent.txt']\n",
    "repairs.yaml": f"{EXPERIMENT}  tasks: ['perplexity:text.txt']\n  repairs: [refit]\n"
    "  repair_corpora: [absent.txt]\n",
    "model/config.json": "{}",
    "model/model.safetensors": "",
    "other/config.json": "{}",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Return exit code and message of each line, in a process that cannot import torch."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    words = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([shlex.split(line) for line in LINES])]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(LINES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", LINES)
def test_what_does_not_exist_is_named_without_torch(line: str, answers: dict[str, tuple[int, str]]) -> None:
    code, message = answers[line]
    assert LINES[line] in message
    assert code == 2


def test_all_that_does_not_exist_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = avss("ablate", "./absent", "--corpus", "absent.txt")
    assert result.output.startswith(f"Error: 2 problems:\n{NO_MODEL}")
    assert f"\n{NO_TEXT}" in result.output


def test_a_model_that_was_fetched_before_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client cannot reach the hub here, and would say so."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be fetched"):
        require_checkpoint("org/name")
    folder = tmp_path / "models--org--name"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    require_checkpoint("org/name")
