"""Limits of control groups, as the kernel writes them, in a folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from avss_dist.system import devices
from avss_dist.system.devices import available_memory
from avss_dist.system.memory import memory_left

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
