"""Iterator that is advanced in its own thread, one item ahead of its consumer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Items of an iterator, the next one prepared while the last one is used."""

    def __init__(self, items: Iterator[T]) -> None:
        self.exhausted = False
        self._queue: Queue[object] = Queue(maxsize=1)
        self._stopped = False
        self._items = items
        threading.Thread(target=self._fill, daemon=True).start()

    def next(self, *, wait: bool) -> T | None:
        """Return the next item; None at the end or, without ``wait``, if no item is ready.

        Raises:
            BaseException: the error that the iterator raised.
        """
        if self.exhausted:
            return None
        try:
            item = self._queue.get(block=wait)
        except Empty:
            return None
        if isinstance(item, _Raised):
            self.exhausted = True
            raise item.error
        if item is _END:
            self.exhausted = True
            return None
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop preparing items."""
        self._stopped = self.exhausted = True
        with self._queue.mutex:
            self._queue.queue.clear()
            self._queue.not_full.notify_all()

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped:
                    return
        except BaseException as error:
            self._queue.put(_Raised(error))
        else:
            self._queue.put(_END)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
