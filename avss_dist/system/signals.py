"""SIGTERM as an exception: a scheduler that ends a command gives it the time to clean up, as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_terminated = False  # whether SIGTERM has been received: Ray turns `Terminated` into a plain KeyboardInterrupt


class Terminated(KeyboardInterrupt):
    """SIGTERM. Whatever handles Ctrl-C handles it too."""


def exit_code(stop: BaseException) -> int:
    """Return the exit code of a command that was stopped, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + stop_signal(type(stop))


def stop_signal(stop: type[BaseException]) -> signal.Signals:
    """Return the signal that an exception of this type was raised for."""
    return signal.SIGTERM if _terminated or issubclass(stop, Terminated) else signal.SIGINT


def raise_on_sigterm() -> None:
    """Have SIGTERM raise `Terminated` in the main thread, once; a second one does not interrupt the cleaning up.

    A process in which SIGTERM is ignored, or has a handler, is left as it is.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        arm()


def arm() -> None:
    """Have the next SIGTERM raise `Terminated` in the main thread of this process."""
    owner = os.getpid()

    def stop(_number: int, _frame: Any) -> None:
        global _terminated
        if os.getpid() != owner:  # a process that was forked since
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _terminated = True
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Keep this process's SIGTERM handler, whatever a library sets inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None and handler is not signal.SIG_DFL:
            signal.signal(signal.SIGTERM, handler)
