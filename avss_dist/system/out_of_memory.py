"""What to do where a batch does not fit in memory: less at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from avss_dist.errors import BatchTooLarge

T = TypeVar("T")


def halve_until_it_fits(
    measure: Callable[[int], T], rows: int, too_large: Callable[[int], BatchTooLarge], *, least: int = 1
) -> tuple[T, int]:
    """What ``measure(rows)`` gives, and the rows: half of them, and half again, while they do not fit in memory.

    Args:
        measure: leaves nothing behind when it fails.
        too_large: the error where so many rows do not fit.
        least: rows that are not halved.

    Raises:
        BatchTooLarge: ``least`` rows do not fit.
    """
    while True:
        try:
            return measure(rows), rows
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if rows <= least:
                raise too_large(rows) from None
        rows = (rows + 1) // 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
