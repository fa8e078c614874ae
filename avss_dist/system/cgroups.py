"""What control groups (of a container, a batch system) leave of the machine's memory; psutil does not know them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = (  # limit, usage, and the field of memory.stat with file cache that the kernel drops first; versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_left(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes that the control groups of this process still allow; None where none of them has a limit.

    Args:
        root: where control groups are mounted.
        membership: the groups of this process, a line for each hierarchy: ``number:controllers:path``.
    """
    left = (_left(group) for group in _groups(root, membership))
    return min((size for size in left if size is not None), default=None)


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups for memory, and of those around them: each has a limit of its own."""
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


def _left(group: Path) -> int | None:
    for limit, usage, cache in _FILES:
        try:
            most, used = ((group / name).read_text(encoding="ascii").strip() for name in (limit, usage))
            fields = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        return None if most == "max" else max(0, int(most) - int(used) + int(fields.get(cache, 0)))
    return None
