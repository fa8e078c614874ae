"""What type checkers read: the signatures of the public functions, also from an editable installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.documentation import PAGES, ROOT, code_blocks, read
from support.stubs import STUB, stub

CALLS = """
from collections.abc import Mapping
from pathlib import Path

import avss_dist as avss

run = avss.score(Path("folder"), corpus="text.txt", sites=["mlp", "inputs"], thresholds=[1e-3, "1e-2"], replicas="2..4")
avss.ablate("model", corpus=Path("text.txt"), quantize=["int4"], max_memory={"cpu": "20GB", "0": 10**9})
plan = avss.plan(run=run, by={0: 1.0, 1: 0.5}, memory="12GB")
sparse = avss.sparsify(0.5, run="model")
avss.evaluate([plan, "model", Path("plan.yaml")], tasks=("perplexity:text.txt",), sparse=sparse)
avss.compare(run=[run, "another"], threshold="0.1rms", output="map.png")
avss.show(run=run, sparsity=[0.5, 0.9], by=["own.csv:mine"])
runs: list[avss.Run] = avss.score_all(["a", Path("b")], corpus="text.txt", on_event=avss.Progress())
avss.run("job.yaml", replicas=4)
retained: avss.Evaluations = avss.evaluate(["model"], tasks=["hellaswag"], limit=10)
smaller: avss.Shrunk = avss.shrink("model", output="smaller", corpus="text.txt", by="loss")
avss.compare(by="famly")  # type: ignore[arg-type]
avss.evaluate(["model"], task=["hellaswag"])  # type: ignore[call-arg]
"""
"""Calls with each kind of value that is accepted, and two mistakes."""


def test_the_stub_file_is_made_of_the_requests() -> None:
    assert read(STUB) == stub()


def test_an_editable_installation_is_a_path(tmp_path: Path) -> None:
    """Type checkers do not run a finder, which setuptools installs for other layouts."""
    project = tmp_path / "project"
    wheels = tmp_path / "wheels"
    (project / "avss_dist").mkdir(parents=True)
    wheels.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "avss_dist/__init__.py"):
        shutil.copy(ROOT / name, project / name)
    build = f"from setuptools import build_meta; build_meta.build_editable({str(wheels)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = wheels.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        (path,) = [name for name in wheel.namelist() if name.endswith(".pth")]
        assert wheel.read(path).decode().strip() == str(project)


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # mypy reads torch and transformers, too: a minute alone
def test_documented_calls_pass_strict_type_checks(tmp_path: Path) -> None:
    """Functions that people write themselves, such as scores, need no annotations."""
    blocks = [CALLS]
    for page in PAGES:
        blocks += code_blocks(read(page), "python")
    for number, block in enumerate(blocks):
        (tmp_path / f"block_{number}.py").write_text(block)
    words = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--allow-untyped-defs"]
    words += ["--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}", *map(str, tmp_path.glob("*.py"))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
