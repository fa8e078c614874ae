"""The wheel that people install: it is whole, and works without the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("avss_dist", "jobs"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", out)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_has_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "avss_dist"
    files = {path.relative_to(ROOT).as_posix() for path in package.glob("**/*") if path.is_file()}
    files |= {f"avss_dist/warehouse/sql/queries/{path.name}" for path in (ROOT / "jobs/queries").iterdir()}
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("avss_dist/")}
    assert packed == {name for name in files if "__pycache__" not in name}


@pytest.mark.slow
def test_it_scores_and_answers_queries_without_the_sources(wheel: Path, tiny_llama: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--quiet", "--target", site)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*command: object) -> str:
        words = [sys.executable, "-P", *map(str, command)]
        return subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    assert run("-c", "import avss_dist; print(avss_dist.__file__)").startswith(str(site))
    small = ("--max-sequences", 4, "--sequence-length", 16, "--executor", "local")
    run("-m", "avss_dist", "score", tiny_llama, "--corpus", "builtin:pydoc", "--out", "w", *small)
    assert "tiny-llama" in run("-m", "avss_dist", "query", "w", "@cost", "--format", "csv")
    run("-m", "avss_dist", "report", "w", "-o", "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
