"""Mistakes in options, which are refused before anything is imported that takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

REFUSED = """
import sys
from avss_dist.cli import app
try:
    app({arguments})
except SystemExit as stop:
    print(stop.code, sorted({{"torch", "transformers", "ray"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "org/a", "--corpus", "a.txt", "--dtype", "q"],
        pytest.param(["distill", "a", "--teacher", "b", "-o", "c", "--dtype", "q"], marks=pytest.mark.nightly),
        pytest.param(["ablate", "org/a", "--corpus", "a.txt", "--dtype", "q"], marks=pytest.mark.nightly),
    ],
)
def test_a_wrong_value_is_refused_without_torch(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(arguments=arguments)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 []\n" and "Unknown --dtype 'q'" in done.stderr
