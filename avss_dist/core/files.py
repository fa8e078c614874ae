"""Files: atomic writes, the cache folder, and arrays that grow on disk."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.errors import AvssError, explain_unwritable

LEFTOVER_SECONDS = 3600.0  # nobody writes one file for so long
LEFTOVER_FOLDER_SECONDS = 7 * 24 * 3600.0  # nor a checkpoint, with nothing new in its folder
_PROCESS = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)"  # see `process_mark`
_STAGED = re.compile(rf"\..+\.avss-{_PROCESS}-[0-9a-f]{{8}}\.tmp")
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


def write_file(path: Path, data: str | bytes, *, folder: Path | None = None, durable: bool = False) -> None:
    """Write a file whole, text in UTF-8. If that fails, the old file stays. See `staged_file`."""
    with staged_file(path, folder=folder, durable=durable) as staged:
        content = data.encode() if isinstance(data, str) else data
        staged.write_bytes(content)


def write_output(path: str | Path, data: str | bytes, kind: type[AvssError] = AvssError) -> None:
    """Write the file that a command was asked for, as `write_file` does.

    Args:
        kind: type of the error if it cannot be written.

    Raises:
        AvssError: it cannot be written.
        StorageFull: there is no space left.
    """
    with explain_unwritable(path, "Name another file with `output`.", kind):
        write_file(Path(path), data)


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
    an hour without a change to its file, or a week without a change in its folder, by the clock of the file system.
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
    running = _is_running(name)
    if running is not None:
        return not running
    changed = max(path.lstat().st_mtime for path in paths)
    return _file_system_time(paths[0].parent) - changed > seconds


def _file_system_time(folder: Path) -> float:
    """Return the time in seconds that a file gets which is written to a folder now.

    A file server has a clock of its own, and the times of files that other machines write are by that clock.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".avss-time-") as file:
        file.write(b"x")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _fresh(name: str) -> str:
    return f".{name[:40]}.avss-{process_mark()}-{secrets.token_hex(4)}.tmp"


def process_mark() -> str:
    """Return a text that tells this process from all others: its machine, its number, and when it started."""
    return f"{_machine()}-{os.getpid()}-{_start(os.getpid()) or 0}"


def is_running(mark: str) -> bool | None:
    """Whether the process with a `process_mark` runs. None if that cannot be known, as it is of another machine."""
    process = re.fullmatch(_PROCESS, mark)
    if process is None:
        return None
    return _is_running(process)


def _is_running(process: re.Match[str]) -> bool | None:
    if process["machine"] != _machine() or process["machine"] == _UNKNOWN:
        return None
    pid = int(process["pid"])
    with suppress(PermissionError):  # the process of another user
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    start = _start(pid)
    if start is None:
        return None
    return start == int(process["start"])  # else another process has its number now


def _machine() -> str:
    """Return eight hexadecimal digits for this boot of this machine, and for the container that processes count in."""
    try:
        identity = [
            Path("/proc/sys/kernel/random/boot_id").read_text(),
            os.readlink("/proc/self/ns/pid"),
            socket.gethostname(),
        ]
    except OSError:
        return _UNKNOWN
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot, or None if that cannot be read."""
    try:
        # The name of the program, in brackets, may have spaces. Field 22, the start, is the 20th after it.
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        return int(after_name.split()[19])
    except (OSError, ValueError, IndexError):
        return None


def cache_folder(*parts: str) -> Path:
    """Return a folder in the user's cache, such as ``~/.cache/avss_dist/tables``. It may not exist."""
    folder = os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache"
    return Path(folder).joinpath("avss_dist", *parts)


KEPT_BYTES = 64 << 20  # in memory


class Spool:
    """Growing array, int32[rows, width].

    The file has no name, so it is deleted with the process. If it cannot be written, the rows stay in memory.
    """

    def __init__(self, width: int) -> None:
        self._written = np.zeros((0, width), np.int32)
        self._waiting: list[NDArray[np.int32]] = []
        self._max_waiting_bytes: float = KEPT_BYTES

    def add(self, rows: NDArray[np.int32]) -> None:
        """Append rows."""
        self._waiting.append(rows)
        if sum(waiting.nbytes for waiting in self._waiting) > self._max_waiting_bytes:
            self._write()

    def array(self) -> NDArray[np.int32]:
        """Return all rows. Rows in a file are read-only."""
        if len(self._written):
            self._write()
        if not self._waiting:
            return self._written
        return np.concatenate([self._written, *self._waiting])

    def _write(self) -> None:
        try:
            if not len(self._written):
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the array)
            self._file.seek(self._written.nbytes)
            self._file.writelines(waiting.tobytes() for waiting in self._waiting)
            self._file.flush()
            self._written = np.asarray(np.memmap(self._file, np.int32, "r")).reshape(-1, self._written.shape[1])
            self._waiting.clear()
        except OSError:
            self._max_waiting_bytes = math.inf
