"""Atomic writes by renaming a staged file or folder: readers see the old content or the new, never a part of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEFTOVER_SECONDS = 3600.0  # nobody writes one file for so long
LEFTOVER_FOLDER_SECONDS = 7 * 24 * 3600.0  # nor a checkpoint, with nothing new in its folder
_STAGED = re.compile(r"\..+\.avss-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.tmp")
_UNKNOWN = "00000000"  # a machine whose processes cannot be told apart


@contextmanager
def staged_file(path: Path, *, folder: Path | None = None, durable: bool = False) -> Iterator[Path]:
    """Yield a fresh path to write to. It replaces ``path`` if the block ends without error, and is deleted otherwise.

    A symbolic link stays one: what it points to is replaced. A pipe or a device is written to as it is.

    Args:
        folder: folder of the fresh path, on the file system of ``path``; the same folder by default.
        durable: make the content reach the disk before the rename.

    Raises:
        OSError: the file cannot be written.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()
    staged = (folder or target.parent) / _fresh(target.name)
    try:
        yield staged
        if durable:
            with staged.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, staged)
        staged.replace(target)
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a fresh, empty folder. It becomes ``path`` if the block ends without an error, and is deleted otherwise.

    Parents are created. ``path`` may be an empty folder. Leftovers of killed writers beside it are deleted.

    Raises:
        OSError: the folder cannot be written, or ``path`` exists and is not an empty folder.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    staged = target.with_name(_fresh(target.name))
    staged.mkdir()
    try:
        yield staged
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the staged files and folders that writers left in a folder when they were killed.

    Whether a writer of this machine has ended is known. One of another machine is taken to have ended after
    an hour without a change to its file, or a week without a change in its folder.
    """
    for path in folder.glob(".*.tmp"):
        name = _STAGED.fullmatch(path.name)
        if not name or path.is_symlink():
            continue
        with suppress(OSError):
            if path.is_dir() and _is_left(name, LEFTOVER_FOLDER_SECONDS, path, *path.rglob("*")):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and _is_left(name, LEFTOVER_SECONDS, path):
                path.unlink()


def _is_left(name: re.Match[str], seconds: float, *paths: Path) -> bool:
    """Whether the writer of these paths has ended, or has not changed them for so long that it must have."""
    ended = _has_ended(name)
    if ended is None:
        return time.time() - max(path.lstat().st_mtime for path in paths) > seconds
    return ended


def _fresh(name: str) -> str:
    owner = f"{_machine()}-{os.getpid()}-{_start(os.getpid()) or 0}"
    return f".{name[:40]}.avss-{owner}-{secrets.token_hex(4)}.tmp"


def _machine() -> str:
    """Return eight hexadecimal digits for this boot of this machine, and for the container that processes count in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        known = [boot, os.readlink("/proc/self/ns/pid"), socket.gethostname()]
    except OSError:
        return _UNKNOWN
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot; None if that cannot be read."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _has_ended(name: re.Match[str]) -> bool | None:
    """Whether the writer of a staged path has ended; None if its process is not visible here."""
    if name["machine"] == _UNKNOWN or name["machine"] != _machine():
        return None
    pid = int(name["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return None
    start = _start(pid)
    return None if start is None else start != int(name["start"])
