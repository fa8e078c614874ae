"""The command line in this process, and the files that it leaves."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from avss_dist.cli import app
from avss_dist.cli.declarations import COMMANDS
from avss_dist.cli.program import load_command


@functools.cache
def commands() -> dict[str, Any]:
    """Return every command by the words that call it, built once per process: that takes 0.2 seconds."""
    return {name: load_command(name) for name in COMMANDS}


def as_words(options: Mapping[str, object]) -> list[str]:
    """Return options of the Python interface as words of a command line: ``batch_size=4`` is ``--batch-size 4``."""
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def json_rows(printed: str) -> list[dict[str, Any]]:
    """Return the rows that a command printed with ``--format json``."""
    return [json.loads(line) for line in printed.splitlines()]


def in_one_line(printed: str) -> str:
    """Return what a command printed without its line breaks, which depend on the width."""
    return " ".join(printed.split())


def avss(*args: object) -> Any:
    """Run a command; an unexpected exception is raised, not hidden in the result."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
    finally:
        for number, handler in handlers.items():  # a stopped command ignores both; so would what later tests start
            signal.signal(number, handler)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*args: object) -> Any:
    """Run a command that ends with exit code 0."""
    result = avss(*args)
    assert result.exit_code == 0, result.stderr
    return result


def mistake(*args: object) -> str:
    """Run a command that ends with exit code 2, and return what it said in one line."""
    result = avss(*args)
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return in_one_line(result.stderr)


def files(root: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by path."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> list[str]:
    """Return the names of the files and folders in a folder, in alphabetical order."""
    return sorted(path.name for path in folder.iterdir())
