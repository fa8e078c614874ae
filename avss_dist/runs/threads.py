"""Threads that a driver starts, and what it submits to them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.1  # between two looks at whether a thread has ended


class InterruptibleThread:
    """A thread with the context variables of the thread that starts it.

    Args:
        work: what the thread does. An interrupt ends it.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._work = work
        # A daemon, since a process must be able to end while a download ignores its interrupt.
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(KeyboardInterrupt):
            self._work()

    @property
    def is_alive(self) -> bool:
        """Whether the work goes on."""
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end of the work, at most so many seconds."""
        self._thread.join(seconds)

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the thread, as Ctrl-C does in the main thread: between two steps of Python."""
        if self._thread.ident is not None:
            number = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(KeyboardInterrupt))


class JobThread(InterruptibleThread):
    """A thread that does jobs in the order in which they are given. A job handles its own errors."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        super().__init__(name, self._do_jobs)

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done after those that were given before."""
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread after its last job."""
        self._jobs.put(None)

    def wait_until_idle(self) -> None:
        """Wait until all jobs are done that were given before."""
        is_idle = threading.Event()
        self.submit(is_idle.set)
        while self.is_alive and not is_idle.wait(LOOK_SECONDS):  # A thread that was closed does no further job.
            pass

    def _do_jobs(self) -> None:
        while job := self._jobs.get():
            job()


class Submissions(Generic[T]):
    """Items that one thread submits and another one takes, in order.

    Args:
        on_taken: called with each item in the thread that takes it.

    Attributes:
        is_closed: whether the submitting thread has marked the end.
        exhausted: whether the taking thread has seen the end.
    """

    def __init__(self, on_taken: Callable[[T], None] | None = None) -> None:
        self.is_closed = False
        self.exhausted = False
        self._on_taken = on_taken
        self._items: SimpleQueue[T | None] = SimpleQueue()

    @classmethod
    def of(cls, items: Iterable[T]) -> Submissions[T]:
        """Return submissions of these items, after which none comes."""
        submissions = cls()
        for item in items:
            submissions.submit(item)
        submissions.close()
        return submissions

    def submit(self, item: T) -> None:
        """Submit the next item."""
        self._items.put(item)

    def close(self) -> None:
        """Mark the end: no item comes after those that were submitted."""
        self.is_closed = True
        self._items.put(None)

    def take(self, *, wait: bool) -> T | None:
        """Return the next item. None at the end or, without ``wait``, if no item is ready."""
        if self.exhausted:
            return None
        try:
            item = self._items.get(block=wait)
        except Empty:
            return None
        if item is None:
            self.exhausted = True
        elif self._on_taken is not None:
            self._on_taken(item)
        return item

    def __iter__(self) -> Iterator[T]:
        """Take items to the end. Waits for each."""
        while True:
            item = self.take(wait=True)
            if item is None:
                return
            yield item
