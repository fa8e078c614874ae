"""Write aside, then rename: readers see the old content or the new, never a part of it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEFTOVER_SECONDS = 3600.0  # nobody writes one file for so long
_STAGED = re.compile(r"\..+\.(avss|\d+)-[0-9a-f]{8}\.tmp")  # with a process id in place of "avss": by older versions


@contextmanager
def staged_file(path: Path, *, folder: Path | None = None, durable: bool = False) -> Iterator[Path]:
    """A fresh path to write to. It replaces ``path`` when the block ends without an error, and is deleted otherwise.

    A symbolic link stays one: what it points to is replaced. A pipe or a device is written to as it is.

    Args:
        folder: where the fresh path is, on the file system of ``path``; beside it by default.
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
    """A fresh, empty folder. It becomes ``path`` when the block ends without an error, and is deleted otherwise.

    Parents are made. ``path`` may be an empty folder.

    Raises:
        OSError: the folder cannot be written, or ``path`` exists and is not an empty folder.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(_fresh(target.name))
    staged.mkdir()
    try:
        yield staged
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the staged files that writers left in a folder when they were killed, an hour ago or more."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):
            old = time.time() - file.stat().st_mtime > LEFTOVER_SECONDS
            if old and _STAGED.fullmatch(file.name) and file.is_file():
                file.unlink()


def _fresh(name: str) -> str:
    return f".{name[:40]}.avss-{secrets.token_hex(4)}.tmp"
