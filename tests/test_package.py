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
    site, script = tmp_path / "site", tmp_path / "script.py"
    options = ("--no-deps", "--no-index", "--quiet", "--target", site)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)
    script.write_text(
        "import avss_dist\n"
        "print(avss_dist.__file__)\n"
        f"options = dict(max_sequences=4, sequence_length=16, sites=['block'], executor='local')\n"
        f"avss_dist.score({str(tiny_llama)!r}, corpus='builtin:pydoc', warehouse='w', **options)\n"
        "print(avss_dist.Warehouse('w').sql('@cost').to_pylist())\n"
    )
    words, environment = [sys.executable, "-P", str(script)], os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    file, answer = done.stdout.splitlines()
    assert file.startswith(str(site)) and "tiny-llama" in answer
