"""The command line and its streams: closed, full, of another encoding; Ctrl-C; text that a terminal would obey."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text
from support.command_line import avss
from support.warehouses import write_scores

import avss_dist
from avss_dist.__main__ import main
from avss_dist.core.text import printable
from avss_dist.system import streams

COMMAND = [sys.executable, "-m", "avss_dist"]
CROSS_JOIN = "SELECT count(*) FROM range(10000000) a, range(10000000) b, range(100) c WHERE a.range + b.range = c.range"


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the streams buffered, as Python does unless it is told otherwise, which some container images do."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def shell(line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    line = line.replace("AVSS", f"{sys.executable} -m avss_dist")
    return subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, **env}, check=False)


def test_a_full_output_is_an_error_without_a_traceback() -> None:
    done = shell("AVSS query --schema > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"Error: standard output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("command", ["--help", "--version", "run --schema", "show --help"])
def test_what_ends_before_a_command_runs_needs_an_output_too(command: str) -> None:
    done = shell(f"AVSS {command} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"Error: standard output cannot be written: No space left on device.\n"


def test_a_closed_output_is_an_error_where_something_is_to_be_written() -> None:
    done = shell("AVSS query --schema >&-")
    assert (done.returncode, done.stderr) == (1, b"Error: standard output cannot be written: it is closed.\n")
    assert shell("AVSS query --schema >&- 2>&- <&-").returncode == 1
    assert shell("AVSS show -w '' >&- 2>&-").returncode == 2


def test_errors_that_cannot_be_written_change_no_exit_code() -> None:
    assert shell("AVSS show -w '' 2>/dev/full").returncode == 2
    assert shell("AVSS query --schema | true; exit ${PIPESTATUS[0]}").returncode == 0


@pytest.mark.parametrize("command", ["--help", "score --help", "--version", "run --schema", "show -w W"])
def test_a_reader_that_has_had_enough_is_no_error(command: str, tmp_path: Path) -> None:
    write_scores(tmp_path / "w", "a-0123456789", [1.0, 2.0, 3.0])
    command = command.replace("W", f"{tmp_path}/w")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([*COMMAND, *command.split()], stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_one_place_writes_what_people_see() -> None:
    """No other file of the package prints, or has a stream or a console of its own."""
    package = Path(avss_dist.__file__).parent
    writes = re.compile(r"(?<![\w.])print\(|sys\.(stdout|stderr)(?!\.isatty\(\))|\bConsole\(|\.echo\(|sys\.__std")
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if any(writes.search(line.partition("#")[0]) for line in file.read_text().splitlines() if '"""' not in line)
    }
    # `group` sends what libraries log to standard error; `__main__` speaks while nothing is imported.
    assert found == {"system/streams.py", "partition/group.py", "__main__.py"}


@pytest.mark.parametrize(("encoding", "command"), [("ascii", "show"), ("latin-1", "query \"SELECT 'é─█' AS a\"")])
def test_what_an_encoding_lacks_is_replaced(encoding: str, command: str, tmp_path: Path) -> None:
    write_scores(tmp_path / "w", "a-0123456789", [1.0, 2.0, 3.0])
    done = shell(f"AVSS {command} -w {tmp_path}/w", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a\xffb"
    os.mkdir(folder)
    done = subprocess.run([*COMMAND, "show", "-w", folder], capture_output=True, check=False)
    expected = b"Error: --warehouse: the name is not UTF-8 text.\nRename the folder.\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_ctrl_c_ends_a_query_at_once(tmp_path: Path) -> None:
    write_scores(tmp_path / "w", "a-0123456789", [1.0, 2.0, 3.0])
    process = subprocess.Popen(
        [*COMMAND, "query", "-w", str(tmp_path / "w"), CROSS_JOIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while "duckdb" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.1)
    time.sleep(2)  # the query itself has no sign that it has begun
    process.send_signal(signal.SIGINT)
    try:
        output, errors = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (130, "", "Stopped.\n")


def test_no_warehouse_has_an_empty_name() -> None:
    for args in (["show", "-w", ""], ["score", "m", "--corpus", "builtin:pydoc", "-w", ""]):
        done = avss(*args)
        assert done.exit_code == 2 and " is empty.\nName a folder" in done.stderr


def test_a_terminal_obeys_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "m\x1b]0;owned\x07\x1b[31m\u202eabc\n"
    assert (
        printable(hostile)
        == "m\N{REPLACEMENT CHARACTER}]0;owned" + "\N{REPLACEMENT CHARACTER}" * 2 + "[31m\N{REPLACEMENT CHARACTER}abc\n"
    )
    file = io.StringIO()
    console = streams.console()
    console.file = file
    table = Table(title=Text(hostile))
    table.add_column(Text(hostile))
    table.add_row(Text(hostile))
    console.print(table)
    assert not set("\x1b\x07\u202e") & set(file.getvalue()) and "owned" in file.getvalue()


class Interrupted(ModuleType):
    """A module during whose import Ctrl-C comes."""

    def __getattr__(self, name: str) -> Any:
        raise KeyboardInterrupt


def test_ctrl_c_before_there_are_commands_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "avss_dist.cli", Interrupted("avss_dist.cli"))
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (130, "Stopped.\n")
