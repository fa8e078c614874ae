"""The command line: every command with arguments of all kinds ends in order, and changes nothing that it should not."""

from __future__ import annotations

import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import commands, files
from support.fuzzing import HOSTILE, NUMBERS, fuzzed, hold
from support.warehouses import activations, stats_of, write_measured

from avss_dist.core.sites import SITES
from avss_dist.stats.catalog import FROM_ACTIVATIONS, RECIPES

pytestmark = pytest.mark.nightly

COMMANDS = commands()
SAFE = [text for text in HOSTILE if "\x00" not in text and "\ud800" not in text]  # what a shell can hand over
CLUSTERS = {"address", "gpus_per_replica", "replicas", "executor", "placement_seconds"}  # they start or look for one
NEVER = {"_verbose", *CLUSTERS}  # the former shows tracebacks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a warehouse, a plan, a job, a text. Not to be changed."""
    root = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("alpha", "beta")):
        write_measured(root / "w", f"{name}-0123456789", stats_of(activations(seed)), 8)
    (root / "plan.yaml").write_text("{model: /no/such, num_layers: 8, layers: model.layers, drop: [1]}")
    (root / "job.yaml").write_text("{warehouse: x, models: [/no/such], corpora: [text.txt]}")
    (root / "text.txt").write_text("Some words. " * 100)
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    return root


WORDS = [
    *("w", "plan.yaml", "job.yaml", "text.txt", "model", "absent", "org/absent", "a.gguf", ".", "/", "/dev/null"),
    *("out.html", "out.svg", "out.png", "out.yaml", "out", "no/such/folder/out", "text.txt/out"),
    *("s3://k:s@b/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9", "file:///w", "http://x", "ftp://a"),
    *("alpha", "*", "[", "alpha-0123456789", "perplexity:text.txt", "perplexity:", "first=1,last=1", "first=x"),
    *(
        "FROM runs",
        "SELECT * FROM scores LIMIT 3",
        "SELECT '\x1b[31m\u202e=1' AS \"=x\"",
        "@drift",
        "SELECT",
        ";",
        "--",
    ),
    *("table", "csv", "json", "markdown", "latex", "mergekit", "loss", "random", "0.1rms", "1e-5", "cpu=1GB", "x=1"),
    *SITES,
    *RECIPES,
    *FROM_ACTIVATIONS,
    *map(str, NUMBERS),
    *SAFE,
]


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A command with its arguments and some of its options, each with a value of any kind."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    line = name.split()
    for parameter in COMMANDS[name].params:
        if parameter.name in NEVER or parameter.param_type_name == "argument" or "--help" in parameter.opts:
            continue
        if parameter.required or draw(st.integers(0, 3)) == 0:
            line.append(max(parameter.opts, key=len))
            if not parameter.is_flag:
                own = parameter.name == "warehouse" and draw(st.integers(0, 3))
                line.append("w" if own else draw(st.sampled_from(WORDS)))
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument" and draw(st.integers(0, 9)):
            first = {"job": "job.yaml", "plan": "plan.yaml"}.get(parameter.name)
            line.append(first if first and draw(st.integers(0, 3)) else draw(st.sampled_from(WORDS)))
    if draw(st.integers(0, 9)) == 0:
        line.insert(draw(st.integers(0, len(line))), draw(st.sampled_from(WORDS)))
    return line


@fuzzed(15)
@given(line=command_lines())
def test_every_command_line_ends_in_order(
    line: list[str], place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(place, tmp_path_factory.mktemp("arguments") / "place"))
    before = files(folder)
    with chdir(folder):
        hold(*line)
    after = files(folder)
    written = {name for name in set(before) | set(after) if before.get(name) != after.get(name)}
    assert not {name for name in written if name.startswith("w/")}, line
    shutil.rmtree(folder)
