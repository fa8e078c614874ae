"""What `avss doctor` says of checks that work, fail, die and hang; and of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.machine_checks import dies, fails, hangs, lacks_a_package, leaves, works

from avss_dist.core import devices
from avss_dist.core.devices import available_memory
from avss_dist.core.doctor import (
    CHECKS,
    NEEDED,
    OPTIONAL,
    CheckResult,
    check_machine,
    run_checks,
)
from avss_dist.core.extras import install_hint
from avss_dist.core.memory import memory_left


def test_checks_reach_neither_this_process_nor_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    checks = {"works": works, "fails": fails, "leaves": leaves, "dies": dies, "again": works}
    results = {finding.what: finding for finding in run_checks(checks)}
    assert list(results) == list(checks)
    assert results["fails"] == CheckResult("fails", False, "OSError: no such thing")
    assert results["leaves"] == CheckResult("leaves", False, "SystemExit: never mind")
    assert results["dies"] == CheckResult("dies", False, "the process that tried it died")
    first = re.fullmatch(r"yes, in (\d+)", results["works"].detail)
    second = re.fullmatch(r"yes, in (\d+)", results["again"].detail)
    assert first
    assert second
    assert len({first[1], second[1], str(os.getpid())}) == 3
    assert capfd.readouterr() == ("", "")


def test_a_check_that_hangs_ends_with_the_processes_it_started() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    (result,) = run_checks({"hangs": hangs}, timeout_seconds=1)
    assert result == CheckResult("hangs", False, "no answer in 1 seconds")
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    alive = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    assert [child.cmdline() for child in alive if "sleep" in child.name()] == []


@pytest.mark.nightly
def test_this_machine() -> None:
    """All that is checked works where these tests run."""
    import torch

    results = list(check_machine())
    checks: list[str] = []
    for group in CHECKS:
        checks += group
    assert [finding.what for finding in results] == [
        "Python",
        *NEEDED,
        *OPTIONAL,
        "cache folder",
        "shared memory",
        *checks,
    ]
    assert [finding for finding in results if not finding.works] == []
    details = {finding.what: finding.detail for finding in results}
    assert details["CPU kernels compile"] == "yes"
    assert "gloo" in details["torch.distributed"]
    cuda = "yes" if torch.cuda.is_available() else "not tried: there is no GPU"
    assert details["CUDA kernels compile"] == cuda
    assert re.fullmatch(r"yes, \d+ bytes of PNG", details["pictures"])


def test_a_machine_without_a_home_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    cache_folder = next(finding for finding in check_machine() if finding.what == "cache folder")
    assert not cache_folder.works
    assert "/proc/nothing" in cache_folder.detail


MB = 10**6
UNLIMITED_1 = 9223372036854771712  # what version 1 writes for no limit


def group(folder: Path, limit: object, used: int, cache: int, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n", encoding="ascii")
    stat = f"anon 5\ninactive_file {cache}\n" + (f"total_inactive_file {cache}\n" if version == 1 else "")
    (folder / "memory.stat").write_text(stat, encoding="ascii")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    file = tmp_path / "membership"
    file.write_text("4:cpu,memory:/outer/inner\n1:cpu:/other\n0::/outer/inner\n", encoding="utf-8")
    return file


def test_without_groups_there_is_no_limit(tmp_path: Path, membership: Path) -> None:
    assert memory_left(tmp_path / "cgroup", membership) is None
    assert memory_left(tmp_path / "cgroup", tmp_path / "missing") is None


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_all_groups_counts(version: int, tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "cgroup"
    base = root if version == 2 else root / "memory"
    group(base / "outer" / "inner", 900 * MB, 100 * MB, 0, version=version)
    assert memory_left(root, membership) == 800 * MB
    group(base / "outer", 500 * MB, 450 * MB, 20 * MB, version=version)
    assert memory_left(root, membership) == 70 * MB, "file cache that is dropped first is free"
    group(base, 60 * MB, 50 * MB, 0, version=version)
    assert memory_left(root, membership) == 10 * MB, "inside a container its own group is the root"
    group(base / "other", 10, 10, 0, version=version)
    assert memory_left(root, membership) == 10 * MB, "another process's group is none of ours"


def test_a_group_without_a_limit_or_over_it(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "cgroup"
    group(root / "outer" / "inner", "max", 100 * MB, 0)
    assert memory_left(root, membership) is None
    group(root / "memory", UNLIMITED_1, 100 * MB, 0, version=1)
    assert (memory_left(root, membership) or 0) > 2**60
    group(root / "outer", 100 * MB, 120 * MB, 10 * MB)
    assert memory_left(root, membership) == 0


def test_available_memory_is_the_smaller_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory_left", lambda: 7)
    assert available_memory() == 7
    monkeypatch.setattr(devices, "memory_left", lambda: 1 << 60)
    assert 10**7 < available_memory() <= psutil.virtual_memory().total


def test_a_check_that_lacks_a_package_says_what_installs_it() -> None:
    (result,) = run_checks({"torch": lacks_a_package})
    assert result == CheckResult("torch", False, f"needs torch: {install_hint('torch')}")


def test_the_checks_need_no_package_that_measures() -> None:
    """An installation that reads warehouses has neither torch nor psutil."""
    code = """
import sys

sys.modules |= dict.fromkeys(("torch", "psutil"))
from avss_dist.core.doctor import _cache_folder, run_checks

print(run_checks({"cache folder": _cache_folder})[0].works)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
