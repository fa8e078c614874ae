"""Parts that several scripts of `tests/benchmarks` share: time, memory, and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.loading import pin, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the seconds that it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def cpu_timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the CPU seconds of this process that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def open_checkpoint(model: str, settings: Settings) -> tuple[Checkpoint, Settings]:
    """Return the checkpoint of a folder or hub id, and its settings on a CPU without ``auto``."""
    checkpoint = resolve(str(Path(model).resolve()) if Path(model).exists() else model)
    return checkpoint, pin(settings, checkpoint, text_config(checkpoint), "cpu")
