"""This process: SIGTERM as an exception, context variables for as long as a block runs, and versions of packages."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from platform import python_version
from types import FrameType
from typing import TypeVar

_terminated = False  # whether SIGTERM has been received


def exit_code() -> int:
    """Return the exit code of a command that was stopped, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + stop_signal()


def stop_signal() -> signal.Signals:
    """Return the signal that KeyboardInterrupt was raised for."""
    return signal.SIGTERM if _terminated else signal.SIGINT


def raise_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt in the main thread, once. A second SIGTERM does not interrupt the cleanup.

    A process that ignores or handles SIGTERM already is not changed.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        arm()


def arm() -> None:
    """Make the next SIGTERM raise KeyboardInterrupt in the main thread of this process."""
    owner = os.getpid()

    def stop(_number: int, _frame: FrameType | None) -> None:
        global _terminated
        if os.getpid() != owner:  # a process that was forked since
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _terminated = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def preserve_sigterm_handler() -> Iterator[None]:
    """Keep this process's SIGTERM handler, whatever a library sets inside the block."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # No other thread can set a handler.
        if handler not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


T = TypeVar("T")


@contextmanager
def bound(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Set a context variable inside the block, and restore its value after it."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


PACKAGES = (
    "avss_dist",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "ray",
    "numpy",
    "pyarrow",
    "numba",
    "gguf",
    "compressed-tensors",
    "lm_eval",
)


UMASK = "AVSS_UMASK"
"""Environment variable of a submitted job with the umask of the process that submitted it, in octal digits."""


def current_umask() -> int:
    """Return the umask of this process: which rights new files do not have."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")  # `os.umask` would change it
    match = re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE)
    return int(match[1], 8) if match else 0o022


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes a tenth of the time of a help

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change a number or a file."""
    versions = {"python": python_version()}
    for name in PACKAGES:
        number = installed_version(name)
        if number:
            versions[name] = number
    return versions
