"""Parts that several scripts of `tests/benchmarks` share: time, memory, and checkpoints."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import pin, text_config

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the seconds that it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def cpu_timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the CPU seconds of this process that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def status(field: str) -> int:
    """Return a size of this process in bytes, from a field of ``/proc/self/status``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Peak of a field of ``/proc/self/status`` inside a ``with`` block, sampled every 2 ms.

    Attributes:
        peak: in bytes.
    """

    def __init__(self, field: str) -> None:
        self.peak = 0
        self._field, self._over = field, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, status(self._field))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def open_checkpoint(model: str, settings: Settings) -> tuple[Checkpoint, Settings]:
    """Return the checkpoint of a folder or hub id, and its settings on a CPU without ``auto``."""
    checkpoint = resolve(str(Path(model).resolve()) if Path(model).exists() else model)
    return checkpoint, pin(settings, checkpoint, text_config(checkpoint, trust_remote_code=False), "cpu")
