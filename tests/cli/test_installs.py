"""What each installation does: the packages for reading alone, and with those for measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.warehouses import write_scores

ROOT = Path(__file__).parents[2]
WITHOUT_EXTRAS = """
import json, sys

from avss_dist.core import extras

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

absent = {module for modules in extras.EXTRAS.values() for module in modules}
sys.meta_path.insert(0, Absent())
find_spec = extras.find_spec
extras.find_spec = lambda name: None if name in absent else find_spec(name)

from typer.testing import CliRunner
from avss_dist.cli import app

for line in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, line)
    print(json.dumps([done.exit_code, done.stderr or repr(done.exception)]))
import avss_dist
print(json.dumps(avss_dist.Warehouse("w").sql("FROM scores").num_rows))
missing = {}
for name in avss_dist.__all__:
    try:
        getattr(avss_dist, name)
    except avss_dist.ConfigError as error:
        missing[name] = str(error)
print(json.dumps(missing))
"""
READING = [
    "ls",
    "show",
    "compare",
    "query FROM~runs",
    "report -o page.html",
    "compact",
    "findings",
    "rm --unused --yes",
]
MEASURING = ["score org/name --corpus text.txt", "ablate org/name --corpus text.txt", "evaluate org/name --tasks t"]


@pytest.mark.nightly
def test_reading_needs_none_of_the_packages_that_measure(tmp_path: Path) -> None:
    """Commands that measure have their help, and say what to type."""
    for name in ("a", "b"):
        write_scores(tmp_path / "w", name, [1.0, 2.0, 3.0])
    (tmp_path / "text.txt").write_text("Some text.")
    reading = []
    for line in READING:
        reading.append([word.replace("~", " ") for word in line.split()] + ["-w", "w"])
    helps = [[line.split()[0], "--help"] for line in MEASURING]
    lines = [*reading, *helps, *(line.split() for line in MEASURING)]
    words = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(lines)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *answers, rows, missing = map(json.loads, done.stdout.splitlines())
    can = len(reading) + len(helps)
    assert [code for code, _ in answers[:can]] == [0] * can, answers
    for code, message in answers[can:]:
        assert code == 2, message
        assert "which is not installed.\n" in message, message
        assert "[run]" in message, message
    assert rows
    for name, message in missing.items():
        assert message.startswith(f"avss_dist.{name} needs ")
        assert ", which is not installed.\n" in message
        assert "[run]" in message
    assert {"Estimate", "Runs", "score"} <= missing.keys()
    assert "Run" not in missing
    assert missing.keys().isdisjoint({"Plan", "Settings", "Warehouse", "ls", "publish", "report"})
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # a slow network, and two installations
def test_fresh_environments_read_and_measure(tiny_llama: Path) -> None:
    """`tests/wheel.sh` has the commands. pip fetches the packages."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "AVSS_WAREHOUSE")}
    words = ["bash", str(ROOT / "tests" / "wheel.sh"), str(tiny_llama)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "== Reading works without torch" in done.stderr
    assert "== Measured" in done.stderr
