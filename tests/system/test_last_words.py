"""A process that ends without a word has its last words printed, one that ends as it should has not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = "import os; from avss_dist.system.last_words import LastWords; words = LastWords('It is over: $0 %s.'); {}"


@pytest.mark.parametrize(
    ("end", "code", "printed"),
    [
        ("os._exit(1)", 1, "It is over: $0 %s.\n"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "It is over: $0 %s.\n"),
        ("words.close()", 0, ""),
    ],
)
def test_last_words_are_those_of_who_ends_without_a_word(end: str, code: int, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, printed)
