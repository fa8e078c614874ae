"""Retry of batches that do not fit in memory, with fewer rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from avss_dist.core.errors import BatchTooLarge

T = TypeVar("T")

OUT_OF_MEMORY = (
    "out of memory",  # "CUDA error: out of memory", "HIP out of memory"; of NCCL "Cuda failure 2 'out of memory'"
    "_STATUS_ALLOC_FAILED",  # CUBLAS, CUSOLVER, CUSPARSE, CUDNN
    "not enough memory",  # torch's allocator on a CPU
    "can't allocate memory",
)


def halve_until_it_fits(
    measure: Callable[[int], T], rows: int, too_large: Callable[[int], BatchTooLarge], *, least: int = 1
) -> tuple[T, int]:
    """Call ``measure(rows)``, with half the rows again and again while they do not fit in memory.

    Args:
        measure: must leave no state behind when it fails.
        too_large: returns the error for a number of rows that does not fit.
        least: minimum number of rows.

    Returns:
        The result, and the number of rows that fitted.

    Raises:
        BatchTooLarge: ``least`` rows do not fit.
    """
    while True:
        try:
            return measure(rows), rows
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if rows <= least:
                raise too_large(rows) from None
        rows = (rows + 1) // 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: by its type, or by a text of CUDA, ROCm, NCCL, cuBLAS or the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
