"""Devices and cores that models compute on, and transfers to and from devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.torch_version import TorchVersion

from avss_dist.core.errors import ConfigError
from avss_dist.core.memory import memory_left

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # since torch 2.9, and before; the older one still works
CONTEXT_BYTES = 1 << 30  # of a GPU, at most, that a process's CUDA context and the kernels of its libraries take
SPARE_SHARE = 0.9  # of the free memory of a device or host that weights, activations and hidden states may take
EXACT_PINNED = "2.13"  # torch's version that has the option for pinned memory; some before it may, too


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that replicas are spread over.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        count: number of GPUs; 1 on CPUs.
        count_of_largest_node: maximum number of GPUs that one process can use.
        device_bytes: memory of the smallest GPU, without a CUDA context; on a CPU, the memory that a process may take.
        host_bytes: available memory of a host.
        cpus, cpus_of_largest_node: number of CPUs in total, and of those that one process can use.
        cpus_of_nodes: number of CPUs of each node of a cluster; empty without one.
    """

    kind: str
    count: int
    count_of_largest_node: int
    device_bytes: int
    host_bytes: int
    cpus: int
    cpus_of_largest_node: int
    cpus_of_nodes: tuple[int, ...] = ()

    def nodes_with(self, cpus: int) -> int:
        """Return the number of nodes of a cluster that have so many CPUs."""
        return sum(number >= cpus for number in self.cpus_of_nodes)


def devices_here(kind: str) -> Devices:
    """Return the devices of this machine that this process may use."""
    cpus = len(os.sched_getaffinity(0))
    host = available_memory()
    if kind == "cuda":
        count = torch.cuda.device_count()
        sizes = [torch.cuda.get_device_properties(index).total_memory - CONTEXT_BYTES for index in range(count)]
    else:
        count = 1
        sizes = [host]
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
    """Return the bytes of memory that are available to a new process, within the limits of control groups."""
    available = int(psutil.virtual_memory().available)
    limit = memory_left()
    if limit is None:
        return available
    return min(available, limit)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that this process can still allocate on a device."""
    if device.type != "cuda":
        return available_memory()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy an array to a device, converted to a dtype if given. Copies to a GPU are asynchronous and pinned."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)


def to_host(groups: Sequence[Mapping[str, torch.Tensor]]) -> Callable[[], list[dict[str, np.ndarray]]]:
    """Start copying groups of tensors by name to the host. Each device sends all of its tensors as one block of bytes.

    Returns:
        A function that waits for the copies and returns the groups in order. Devices can do other work meanwhile.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    order: list[dict[str, torch.device]] = []
    for group in groups:
        order.append({name: tensor.device for name, tensor in group.items()})
        for tensor in group.values():
            by_device.setdefault(tensor.device, []).append(tensor)
    blocks = {device: _block_to_host(tensors) for device, tensors in by_device.items()}

    def wait() -> list[dict[str, np.ndarray]]:
        arrays = {device: iter(arrived()) for device, arrived in blocks.items()}
        copied = []
        for group in order:
            copied.append({name: next(arrays[device]) for name, device in group.items()})
        return copied

    return wait


def _block_to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """Start copying tensors of one device through pinned memory. Tensors of a CPU are returned without a copy."""
    if tensors[0].device.type == "cpu":
        return lambda: [tensor.numpy() for tensor in tensors]
    block = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    host = torch.empty(block.shape, dtype=torch.uint8, pin_memory=True).copy_(block, non_blocking=True)
    arrived = torch.cuda.current_stream(block.device).record_event()
    # Only what describes the tensors is kept, so that their memory is free meanwhile.
    sizes = [tensor.nbytes for tensor in tensors]
    dtypes = [tensor.dtype for tensor in tensors]
    shapes = [tensor.shape for tensor in tensors]

    def wait() -> list[np.ndarray]:
        arrived.synchronize()
        arrays = []
        for part, dtype, shape in zip(host.split(sizes), dtypes, shapes, strict=True):
            arrays.append(part.clone().view(dtype).reshape(shape).numpy())
        return arrays

    return wait


def reset_peak_device_memory() -> None:
    """Reset `peak_device_memory`."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def peak_device_memory() -> int:
    """Return the peak bytes that torch allocated on each GPU of this process, summed."""
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def allocator_options(version: str) -> list[str]:
    """Return the allocator options that a version of torch knows. It refuses unknown ones."""
    options = ["expandable_segments:True"]
    if TorchVersion(version) >= EXACT_PINNED:
        options.append("pinned_max_round_threshold_mb:1")
    return options


def has_fast_bfloat16(kind: str) -> bool:
    """Whether the devices of a kind multiply bfloat16 matrices in hardware."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def pick_device(name: str) -> torch.device:
    """Return the device of a name. ``auto`` is ``cuda`` if torch sees a GPU.

    Unless the environment configures torch's allocators, the GPU allocator gets expandable segments. Batches of several
    sizes would otherwise leave fragments that no batch fits into. Pinned memory is not rounded up to a power of two,
    which would take up to twice the size of a streamed layer or of an offloaded hidden state.

    Raises:
        ConfigError: ``cuda`` was requested and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` cuda: torch sees no GPU here.", "Run `avss doctor`, or set `device` to cpu.")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if use_cuda and not any(os.environ.get(variable) for variable in ALLOCATOR):
        os.environ[ALLOCATOR[-1]] = ",".join(allocator_options(torch.__version__))
    return torch.device("cuda" if use_cuda else "cpu")


_CGROUP = Path("/sys/fs/cgroup")
SAMPLE_SECONDS = 0.2  # in which the load of others is measured


@contextmanager
def computing_threads(threads: int) -> Iterator[None]:
    """Have torch compute with this number of threads inside the block, and restore the previous number after it.

    OpenMP keeps the number for each Python thread, MKL and torch for the process. Every thread that computes must set
    the same number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_cores() -> int:
    """Return the number of cores that are idle now, within this process's affinity and control group, at least 1."""
    usable = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # a ValueError means no quota: "max"
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        usable = min(usable, int(quota) // int(period))
    total = psutil.cpu_count() or usable
    idle = round(total - total * psutil.cpu_percent(interval=SAMPLE_SECONDS) / 100)
    return max(1, min(usable, idle))
