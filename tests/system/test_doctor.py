"""What `avss doctor` says of checks that work, fail, die and hang; and of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from avss_dist.system.doctor import (
    CHECKS,
    NEEDED,
    OPTIONAL,
    CheckResult,
    check_machine,
    run_checks,
)


def works() -> str:
    print("not for people")
    return f"yes, in {os.getpid()}"


def fails() -> str:
    raise OSError("no such thing\nand more")


def leaves() -> str:
    sys.exit("never mind")


def dies() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "survived"


def hangs() -> str:
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
    return "woke up"


def test_checks_reach_neither_this_process_nor_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    checks = {"works": works, "fails": fails, "leaves": leaves, "dies": dies, "again": works}
    found = {finding.what: finding for finding in run_checks(checks)}
    assert list(found) == list(checks)
    assert found["fails"] == CheckResult("fails", False, "OSError: no such thing")
    assert found["leaves"] == CheckResult("leaves", False, "SystemExit: never mind")
    assert found["dies"] == CheckResult("dies", False, "the process that tried it died")
    processes = [re.fullmatch(r"yes, in (\d+)", found[name].detail) for name in ("works", "again")]
    assert all(processes) and len({match[1] for match in processes if match}) == 2
    assert str(os.getpid()) not in {match[1] for match in processes if match}
    assert capfd.readouterr() == ("", "")


def test_a_check_that_hangs_ends_with_the_processes_it_started() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    (result,) = run_checks({"hangs": hangs}, timeout_seconds=3)
    assert result == CheckResult("hangs", False, "no answer in 3 seconds")
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [
        child.cmdline() for child in left if child.status() != psutil.STATUS_ZOMBIE and "sleep" in child.name()
    ] == []


@pytest.mark.nightly
def test_this_machine() -> None:
    """All that is checked works where these tests run."""
    import torch

    found = list(check_machine())
    checks = [what for group in CHECKS for what in group]
    assert [finding.what for finding in found] == [
        "Python",
        *NEEDED,
        *OPTIONAL,
        "cache folder",
        "shared memory",
        *checks,
    ]
    assert [finding for finding in found if not finding.works] == []
    details = {finding.what: finding.detail for finding in found}
    assert details["CPU kernels compile"] == "yes" and "gloo" in details["torch.distributed"]
    assert details["CUDA kernels compile"] == ("yes" if torch.cuda.is_available() else "not tried: there is no GPU")
    assert re.fullmatch(r"yes, \d+ bytes of PNG", details["pictures"])


def test_a_machine_without_a_home_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    found = next(finding for finding in check_machine() if finding.what == "cache folder")
    assert not found.works and "/proc/nothing" in found.detail
