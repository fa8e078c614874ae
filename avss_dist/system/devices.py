"""The devices that there are to compute with."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch.torch_version import TorchVersion

from avss_dist.errors import ConfigError
from avss_dist.system.cgroups import memory_left

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before; the older one still works
EXACT_PINNED = "2.13"  # torch's version that has the option for pinned memory; some before it may, too


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that replicas are spread over.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        count: GPUs; 1 on CPUs.
        count_of_largest_node: the most GPUs that one process can use.
        device_bytes: memory of the smallest GPU; what a process may take on a CPU.
        host_bytes: available memory of a host.
        cpus, cpus_of_largest_node: CPUs in all, and those that one process can use.
    """

    kind: str
    count: int
    count_of_largest_node: int
    device_bytes: int
    host_bytes: int
    cpus: int
    cpus_of_largest_node: int


def devices_here(kind: str) -> Devices:
    """The devices of this machine, as far as this process may use them."""
    cpus, host = len(os.sched_getaffinity(0)), available_memory()
    count = torch.cuda.device_count() if kind == "cuda" else 1
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(count)] if kind == "cuda" else [host]
    return Devices(
        kind=kind,
        count=count,
        count_of_largest_node=count,
        device_bytes=min(sizes, default=0),
        host_bytes=host,
        cpus=cpus,
        cpus_of_largest_node=cpus,
    )


def available_memory() -> int:
    """Bytes of memory that a new process can have: what the system has, within what control groups allow."""
    available, left = int(psutil.virtual_memory().available), memory_left()
    return available if left is None else min(available, left)


def sent(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array on a device, of another dtype if need be. A GPU is not waited for: pinned memory is sent."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)


def to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """Send tensors to the host; each device sends all of its own as one block of bytes, through pinned memory.

    Returns:
        What waits until they are there, and gives them in their order. Meanwhile devices can do other work.
    """
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    coming = {device: _block_to_host([t for t in tensors if t.device == device]) for device in devices}
    order = [tensor.device for tensor in tensors]

    def wait() -> list[np.ndarray]:
        arrays = {device: iter(arrived()) for device, arrived in coming.items()}
        return [next(arrays[device]) for device in order]

    return wait


def _block_to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """`to_host` for tensors of one device; those of a CPU are given as they are."""
    if tensors[0].device.type == "cpu":
        return lambda: [tensor.numpy() for tensor in tensors]
    block = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    host = torch.empty(block.shape, dtype=torch.uint8, pin_memory=True).copy_(block, non_blocking=True)
    arrived = torch.cuda.current_stream(block.device).record_event()
    like = [(tensor.nbytes, tensor.dtype, tensor.shape) for tensor in tensors]

    def wait() -> list[np.ndarray]:
        arrived.synchronize()
        parts = host.split([size for size, _, _ in like])
        return [part.clone().view(d).reshape(shape).numpy() for part, (_, d, shape) in zip(parts, like, strict=True)]

    return wait


def reset_peak_device_memory() -> None:
    """Let `peak_device_memory` begin anew."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def peak_device_memory() -> int:
    """The most bytes that torch had on each GPU of this process, added up."""
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def free_device(device: torch.device) -> None:
    """Give a device's memory back that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocator_options(version: str) -> list[str]:
    """Options of the allocators of a version of torch, which refuses those that it does not know."""
    exact = ["pinned_max_round_threshold_mb:1"] if TorchVersion(version) >= EXACT_PINNED else []
    return ["expandable_segments:True", *exact]


def pick_device(name: str) -> torch.device:
    """``cuda`` or ``cpu``; ``auto`` is ``cuda`` where torch sees one.

    Unless the environment configures torch's allocators, that of GPUs grows its segments: batches of several sizes, as
    where rows are halved, would leave memory that no batch fits into. And pinned memory is not rounded up to a power of
    two, which would take up to twice the size of a streamed layer or of an offloaded hidden state.

    Raises:
        ConfigError: ``cuda`` was requested and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` cuda: torch sees no GPU here.", "Run `avss doctor`, or set `device` to cpu.")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if use_cuda and not any(os.environ.get(variable) for variable in ALLOCATOR):
        os.environ[ALLOCATOR[-1]] = ",".join(allocator_options(torch.__version__))
    return torch.device("cuda" if use_cuda else "cpu")
