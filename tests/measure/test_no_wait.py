"""In the measuring path nothing waits for a device. Tensors on ``meta`` stand for those of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama
from support.tiers import nightly
from support.waiting import NoWaiting
from transformers import masking_utils

from avss_dist.core import devices
from avss_dist.core.errors import BatchTooLarge
from avss_dist.core.memory import halve_until_it_fits
from avss_dist.core.sites import EVERY_SITE, SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.corpus.pairs import Pairing
from avss_dist.corpus.shards import Batch
from avss_dist.measure import observer as observing
from avss_dist.measure.kernels.cuda import CudaKernels, window
from avss_dist.measure.kernels.reference import Accumulator, Kernels, limits_on
from avss_dist.measure.observer import ExpertCounter, Observer, attached
from avss_dist.models.checkpoint.loading import forward_function, open_module
from avss_dist.models.structure.layers import Experts, Routing
from avss_dist.partition.replica import run_batch

META = torch.device("meta")
PAIRED = Pairing(rows=np.arange(3), pairs=np.arange(3), strata=("good", "bad", "good"), starts=np.zeros(3, np.int32))


class Launches:
    """See `cuda.Device`: a card that is only told what to do."""

    blocks = 132
    threads = 1024

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def span(self, dtype: torch.dtype) -> int:
        return window(dtype, 227 << 10)[1]

    def launch(self, dtype: torch.dtype, kernel: str, grid: int, block: int, shared: int, arguments: bytes) -> None:
        self.kernels.append(kernel)


@pytest.mark.parametrize(
    ("backend", "dtype", "pairing"),
    [
        ("cuda", torch.bfloat16, None),
        ("cuda", torch.bfloat16, PAIRED),
        *nightly(
            ("torch", torch.float32, None),
            ("torch", torch.float32, PAIRED),
            ("torch", torch.bfloat16, None),
            ("cuda", torch.float32, None),
        ),
    ],
    ids=lambda value: "paired" if value is PAIRED else str(value),
)
def test_a_batch_is_measured_without_waiting(
    backend: str, dtype: torch.dtype, pairing: Pairing | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only token ids and the mask of what counts are sent, and the host never asks for a value."""
    launches = Launches()
    kernels: Any = Kernels() if backend == "torch" else CudaKernels(launches)
    monkeypatch.setattr(observing, "kernels_for", lambda device: kernels)
    # Here transformers itself waits, once a batch, whoever observes.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    limits_on.cache_clear()
    backbone = open_module(llama().eval().to(dtype))
    backbone.module.to(META)
    run = forward_function(backbone.module)
    real = np.ones((3, 10), bool)
    batch = Batch(input_ids=np.zeros((3, 10), np.int32), attention_mask=real, observed=real)
    layers = backbone.layers
    with attached(layers, EVERY_SITE if pairing else SITES) as on_layers:
        observer = Observer(on_layers, THRESHOLDS)
        for first in (True, False):
            with NoWaiting() as guard, observer.batch(batch.observed, pairing):
                run_batch(run, batch, META)
            copies = 1 + (4 + 3 if pairing else 2)  # ids; of strata masks and first tokens; where each row's tokens are
            assert guard.copies == ["_to_copy"] * (copies + (first and dtype == torch.float32))  # and limits
    if backend == "cuda" and not pairing:
        assert len(launches.kernels) == 2 * 7 * len(layers)


def test_experts_are_measured_without_waiting() -> None:
    """What a model's own experts do aside."""
    counter = ExpertCounter()
    experts = Experts(module=torch.nn.Identity(), number=4, router=torch.nn.Identity(), normalized=False)
    index = torch.zeros(5, 2, dtype=torch.int64, device=META)
    gates = torch.zeros(5, 2, device=META)
    routing = Routing(torch.zeros(5, 8, device=META), index, gates)
    with NoWaiting() as guard:
        counter.add(0, experts, routing, [routing.hidden] * 2)
        counter.add_entropy(0, experts, torch.zeros(5, 4, device=META))
    assert guard.copies == []


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory: the driver could not launch count on cuda:0 (error 2)."),
    RuntimeError(
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error ... Last error: Cuda failure 2 'out of memory'"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_every_text_of_short_memory_halves_a_batch(error: Exception) -> None:
    def measure(rows: int) -> int:
        if rows > 2:
            raise error
        return 10 * rows

    assert halve_until_it_fits(measure, 7, lambda rows: BatchTooLarge("", "")) == (20, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_counters_of_a_site_are_one_allocation(dtype: torch.dtype) -> None:
    like = torch.empty((1, 1, 96), dtype=dtype, device=META)
    with NoWaiting() as mode:
        into = Accumulator(like, np.ones(9), units=True, geometry=True)
    assert mode.allocations == ["zeros"]
    assert not mode.copies
    assert len({tensor.untyped_storage()._cdata for tensor in into.tensors.values()}) == 1


def test_another_error_halves_nothing() -> None:
    def measure(rows: int) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        halve_until_it_fits(measure, 7, lambda rows: BatchTooLarge("", ""))


@pytest.mark.parametrize("set_before", [None, *devices.ALLOCATOR])
def test_cuda_memory_grows_unless_the_environment_says_otherwise(
    set_before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for variable in devices.ALLOCATOR:
        monkeypatch.setenv(variable, "backend:native" if variable == set_before else "")
    assert devices.pick_device("cuda").type == "cuda"
    values = [devices.os.environ[variable] for variable in devices.ALLOCATOR]
    ours = ",".join(devices.allocator_options(torch.__version__))
    assert values.count(ours) == (set_before is None)


def test_pinned_memory_is_not_rounded_up_where_torch_has_an_option_for_that() -> None:
    assert devices.allocator_options("2.9.1+cu128") == ["expandable_segments:True"]
    newer = devices.allocator_options("2.13.0+cu130")
    assert newer == ["expandable_segments:True", "pinned_max_round_threshold_mb:1"]
    if torch.__version__ >= devices.EXACT_PINNED:
        library = (Path(torch.__file__).parent / "lib/libc10.so").read_bytes()
        for option in newer:
            assert option.split(":")[0].encode() in library


def test_peak_memory_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 10**index)
    assert devices.peak_device_memory() == 111
