"""Memory limits of control groups (of a container, a batch system), which psutil does not know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = (  # limit, usage, and the field of memory.stat with file cache that the kernel drops first; versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_left(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Return the bytes that the control groups of this process still allow; None without a limit.

    Args:
        root: mount point of control groups.
        membership: file with the groups of this process, a line for each hierarchy: ``number:controllers:path``.
    """
    sizes = (_memory_left_in(group) for group in _groups(root, membership))
    return min((size for size in sizes if size is not None), default=None)


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory groups and of their parents. Each has a limit of its own."""
    yield from (root, root / "memory")  # inside a container, its own group is the root
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "memory" if "memory" in controllers.split(",") else root
        if base != root or not controllers:
            group = base / path.lstrip("/")
            while group != base:
                yield group
                group = group.parent


def _memory_left_in(group: Path) -> int | None:
    for limit, usage, cache in _FILES:
        try:
            maximum, used = ((group / name).read_text(encoding="ascii").strip() for name in (limit, usage))
            fields = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        return None if maximum == "max" else max(0, int(maximum) - int(used) + int(fields.get(cache, 0)))
    return None
