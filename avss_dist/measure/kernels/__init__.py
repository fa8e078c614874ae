"""Reductions of activations on the device that holds them: how they are made.

An activation goes in, and small accumulators on its own device grow (`base`). `choose` picks the backend of a device:

- `cpu`: numba loops (`loops`) in the thread that calls them, without Python's lock. A sequence at a time: the counts of
  bit patterns (16 bits) or of the upper halves of patterns (float32), sums over units, and of a block the comparison of
  its input with its output, while its numbers are in the cache. `merging` adds them up in the order of the sequences,
  so that no result depends on what runs beside. `bits` reads bfloat16, which numba does not know, as uint16 patterns.
- `cuda`: CUDA C++, compiled when it is first needed, on NVIDIA's devices.
- `generic`: torch operations, on any other device, and on CUDA where the compiler (NVRTC) is missing.

Cores are used by measuring several shards at once (`executors.local`), not by threads inside a kernel: with one thread
a shard, which is the default, an OpenMP region around the loops, records of addresses that carry arguments into it and
atomic counters that hand out sequences bought nothing. Neither did emitted LLVM: reading bfloat16 through numba's own
``view`` is as fast (1.00 of the time), and prefetching cache lines changed counting by 1 to 3%, and the sums over 1,536
units by -1%.

The loops may reorder sums inside of a token (``fastmath={"reassoc", "contract"}``): vector instructions need that.
"""
