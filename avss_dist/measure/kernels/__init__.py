"""Kernels: reductions of activations on the device that holds them.

An activation goes in, and small accumulators on its own device grow (`reference`). `kernels_for` picks the backend of a
device:

- `cpu`: numba loops in the thread that calls them, without Python's lock. A sequence at a time: the counts of bit
  patterns (16 bits) or of the upper halves of patterns (float32), sums over units, and of a block the comparison of its
  input with its output, while its numbers are in the cache. They are added up in the order of the sequences, so that no
  result depends on concurrent work. numba does not know bfloat16, which is read as uint16 patterns.
- `cuda`: CUDA C++, compiled when it is first needed, on NVIDIA's devices.
- `reference`: torch operations, on any other device, and on CUDA where the compiler (NVRTC) is missing.

Concurrent shards use the cores (`runs.local`), rather than threads inside a kernel: with the default of one thread
per shard, an OpenMP region around the loops is no faster. Emitted LLVM is no faster either: reading bfloat16 through
numba's own ``view`` takes 1.00 of its time, and prefetching cache lines changed counting by 1 to 3% and the sums over
1,536 units by -1%.

The loops may reorder sums within a token (``fastmath={"reassoc", "contract"}``), which vector instructions require.
"""

from __future__ import annotations

import warnings

import torch

from avss_dist.measure.kernels.reference import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """Return the fastest backend for a device.

    CUDA without NVRTC falls back to torch operations with a warning. ROCm and other devices always use them.
    """
    if device.type == "cpu":
        from avss_dist.measure.kernels.cpu import CpuKernels

        return CpuKernels()
    if device.type == "cuda" and torch.version.hip is None:
        from avss_dist.measure.kernels.cuda import CudaKernels, NotCompiled, launcher_of

        try:
            return CudaKernels(launcher_of(device))
        except NotCompiled as error:
            warnings.warn(f"torch counts on {device}, which is slower: {error}.", RuntimeWarning, stacklevel=2)
    return Kernels()
