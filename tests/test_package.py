"""The wheel that people install: it is whole, and works without the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.pages import write_run

from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "avss_dist", source / "avss_dist", symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", out)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_has_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "avss_dist"
    assert not [path for path in package.glob("**/*") if path.is_symlink()]
    files = {path.relative_to(ROOT).as_posix() for path in package.glob("**/*") if path.is_file()}
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("avss_dist/")}
    assert packed == {name for name in files if "__pycache__" not in name}


def test_it_answers_queries_and_writes_reports_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    """What is installed is whole; `tests/wheel.sh` installs it with its dependencies, and scores a model with it."""
    site = tmp_path / "site"
    ZipFile(wheel).extractall(site)
    write_run(Warehouse(tmp_path / "w"), "alpha", layers=4)
    script = tmp_path / "script.py"
    script.write_text(
        "import avss_dist\n"
        "from avss_dist.reports.page.page import report_page\n"
        "print(avss_dist.__file__)\n"
        "warehouse = avss_dist.Warehouse('w')\n"
        "print(warehouse.sql('@cost').to_pylist())\n"
        "print(report_page(warehouse).strip()[-7:])\n"
    )
    words, environment = [sys.executable, "-P", str(script)], os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    file, answer, end = done.stdout.splitlines()
    assert file.startswith(str(site)) and "alpha" in answer and end == "</html>"
