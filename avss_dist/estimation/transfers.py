"""Rates at which this machine copies memory and unpacks weights, and at which two processes exchange tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.quantization import stored_type
from avss_dist.models.safetensors import DTYPES
from avss_dist.system.cores import computing_threads
from avss_dist.system.devices import pick_device

UNPACKED = 1 << 22  # numbers that are unpacked at once
EXCHANGES = 6  # of which the fastest counts
GATHERED = 32 << 20  # bytes, at most, of one tensor that is put together


def copy_rate() -> float:
    """Return the rate of copies from memory to memory, in bytes per second."""
    source = torch.ones(1 << 25, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    return 4 * source.numel() / (time.perf_counter() - start)


def unpacking_rate(checkpoint: Checkpoint, dtype: torch.dtype, settings: Settings) -> float:
    """Return the rate at which numbers are unpacked, in bytes of the dtype per second.

    Those of a .gguf file are of the type that most of its bytes have, and unpacked by the package ``gguf``. For others,
    numbers of one byte are converted to float32, multiplied by scales, and converted to the dtype.
    """
    device = pick_device(settings.device)

    def unpack() -> None:
        for start in range(0, UNPACKED, UNPACKED // 4):
            part = packed[start : start + UNPACKED // 4].view(-1, 128)
            (part.to(torch.float32) * scales[: len(part), None]).to(dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if checkpoint.gguf and (kind := stored_type(checkpoint)) not in DTYPES:
        from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

        quantization = GGMLQuantizationType[kind]
        blocks = np.zeros(quant_shape_to_byte_shape((UNPACKED,), quantization), np.uint8)
        run: Callable[[], object] = lambda: torch.from_numpy(dequantize(blocks, quantization)).to(dtype)  # noqa: E731
    else:
        packed = torch.zeros(UNPACKED, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        scales, run = torch.ones(UNPACKED // 128, device=device), unpack
    seconds = []
    with computing_threads(settings.threads):
        for _ in range(3):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return UNPACKED * dtype.itemsize / min(seconds)


def sum_seconds(size: int) -> float:
    """Return the seconds in which two ranks sum bfloat16 tensors of ``size`` bytes over gloo."""
    return _exchange_seconds(lambda group, hidden: group.allreduce([hidden]), size)


def gather_rate(size: int) -> float:
    """Return the rate, in bytes per second, at which two ranks gather tensors of ``size`` bytes over gloo."""

    def gather(group: Any, half: torch.Tensor) -> Any:
        return group._allgather_base(half.new_empty(2 * half.numel()), half)

    size = min(size, GATHERED)
    return size / _exchange_seconds(gather, size // 2)


def _exchange_seconds(exchange: Callable[[Any, torch.Tensor], Any], size: int) -> float:
    """Return the seconds of an exchange of ``size`` bytes between two ranks, as two threads of this process."""
    store, seconds = torch.distributed.HashStore(), []

    def rank(number: int) -> None:
        group: Any = torch.distributed.ProcessGroupGloo(store, number, 2, timedelta(seconds=60))
        tensor = torch.zeros(size // 2, dtype=torch.bfloat16)
        for _ in range(EXCHANGES):
            start = time.perf_counter()
            exchange(group, tensor).wait()
            seconds.append(time.perf_counter() - start)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(rank, range(2)))
    return min(seconds)
