"""The command line and its streams: closed, full, of another encoding; Ctrl-C; text that a terminal would obey."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.processes import wait_until
from support.tiers import nightly
from support.warehouses import write_scores

import avss_dist
from avss_dist.core.text import printable

COMMAND = [sys.executable, "-m", "avss_dist"]
FULL = "Error: standard output cannot be written: No space left on device.\n"
CLOSED = "Error: standard output cannot be written: it is closed.\n"
NOT_UTF8 = "Error: --warehouse: the name is not UTF-8 text.\nRename the folder.\n"
UNKNOWN = "Error: Unknown run 'absent'.\nValid: a-0123456789.\n"
CROSS_JOIN = "SELECT count(*) FROM range(10000000) a, range(10000000) b, range(100) c WHERE a.range + b.range = c.range"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a warehouse. Streams are buffered, which some container images switch off."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "w", "a-0123456789", [1.0, 2.0, 3.0])
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "code", "errors"),
    [
        ("AVSS query --schema >/dev/full", 1, FULL),
        ("AVSS --help >/dev/full", 1, FULL),
        ("AVSS query --schema >&-", 1, CLOSED),
        *nightly(("AVSS query --schema >&- 2>&- <&-", 1, ""), ("AVSS show -w '' >&- 2>&-", 2, "")),
        ("AVSS show -w '' 2>/dev/full", 2, ""),
        ("AVSS show -w $'a\\xffb'", 2, NOT_UTF8),
        ("AVSS show -w w --run absent >out; code=$?; [ -s out ] || exit $code", 2, UNKNOWN),
        ("AVSS query -w w 'FROM scores, range(9999)' --format csv | head -1 >out; exit ${PIPESTATUS[0]}", 0, ""),
        *nightly(
            ("AVSS --help | true; exit ${PIPESTATUS[0]}", 0, ""),
            ("AVSS show -w w | true; exit ${PIPESTATUS[0]}", 0, ""),
        ),
        ("PYTHONIOENCODING=ascii AVSS show -w w | grep -q '?'", 0, ""),
    ],
)
def test_the_streams_of_a_process(line: str, code: int, errors: str) -> None:
    """Full, closed, of another encoding, or with a reader that has had enough."""
    words = line.replace("AVSS", f"{sys.executable} -m avss_dist")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, errors)


def test_ctrl_c_ends_a_query_at_once(folder: Path) -> None:
    """A command takes a second of a processor before the query begins, and uses more only while the query runs."""
    process = subprocess.Popen(
        [*COMMAND, "query", "-w", str(folder / "w"), CROSS_JOIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        wait_until(lambda: sum(psutil.Process(process.pid).cpu_times()[:2]) > 3 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (130, "", "Stopped.\n")


def test_one_place_writes_what_people_see() -> None:
    """No other file of the package prints, or has a stream or a console of its own."""
    package = Path(avss_dist.__file__).parent
    writes = re.compile(r"(?<![\w.])print\(|sys\.(stdout|stderr)(?!\.isatty\(\))|\bConsole\(|\.echo\(|sys\.__std")
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if any(writes.search(line.partition("#")[0]) for line in file.read_text().splitlines() if '"""' not in line)
    }
    # `group` sends what libraries log to standard error; `__main__` speaks while nothing is imported; `store` has
    # examples for others.
    assert found == {"system/streams.py", "partition/group.py", "__main__.py", "warehouse/store.py"}


def test_a_terminal_obeys_no_text() -> None:
    shown = printable("m\x1b]0;owned\x07\x1b[31m\u202eabc\n, é漢\t")
    assert shown == "m\ufffd]0;owned\ufffd\ufffd[31m\ufffdabc\n, é漢\t"
