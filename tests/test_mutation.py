"""The benchmark of mutants at its smallest size: which there are, which are killed, and which survive."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "mutation.py"
CODE = '''
LIMIT = 5

def pick(values: list[int], most: int = 3) -> int:
    """No text is changed."""
    if not values:
        raise ValueError(f"{1 + 1} values")
    total = sum(v for v in values if v > 2)
    total -= 1
    return max(total, -1)

class Kept:
    @property
    def is_known(self) -> bool:
        while self.left is None and True:
            self.wait(strict=False)
            break
        return self.a < self.b[0]
'''
EXPECTED = """
pick `if not values:` -> `if True:`
pick `if not values:` -> `if False:`
pick `not values` -> `values`
pick filter `if v > 2` left out
pick `v > 2` -> `v >= 2`
pick `v > 2` -> `v <= 2`
pick `2` -> `3`
pick `total -= 1` -> `total += 1`
pick `1` -> `2`
pick `return max(total, -1)` -> `return None`
pick `max` -> `min`
pick `-1` -> `1`
pick `1` -> `2`
is_known `while self.left is None and True:` -> `while False:`
is_known `self.left is None and True` -> `self.left is None or True`
is_known `self.left is None` -> `self.left is not None`
is_known `True` -> `False`
is_known `self.wait(strict=False)` -> `pass`
is_known `break` -> `continue`
is_known `return self.a < self.b[0]` -> `return None`
is_known `self.a < self.b[0]` -> `self.a <= self.b[0]`
is_known `self.a < self.b[0]` -> `self.a >= self.b[0]`
is_known `0` -> `1`
"""


def test_mutants_change_what_runs_and_nothing_that_is_read() -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from mutation import mutants_below
    finally:
        sys.path.remove(str(SCRIPT.parent))
    found = [f"{mutant.function.name} {mutant}" for mutant in mutants_below(ast.parse(CODE))]
    assert sorted(found) == sorted(EXPECTED.strip().splitlines())


@pytest.mark.nightly
def test_survivors_are_those_that_no_test_notices() -> None:
    """The tests that are chosen know nothing of the loss."""
    options = ["--tests", "tests/stats/test_retention.py", "-k", "less_is_better"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "avss_dist/stats/retention.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *survivors, _, score = done.stdout.splitlines()
    assert len(survivors) == 2, done.stdout
    assert "retention_of: `if metric == LOSS:` -> `if False:`" in survivors[0]
    assert "retention_of: `before - after` -> `before + after`" in survivors[1]
    assert score.split() == ["avss_dist/stats/retention.py", "12", "10", "2", "0", "83.3%"]
