"""The CUDA kernels: any schedule, what NVRTC makes of them, launches and bytes of a layer.

They run emulated (`support.emulated_cuda`). Only tests marked ``gpu`` run on a GPU.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import llama
from support.emulated_cuda import COMPILER, SHARED, Emulator, libraries
from support.observing import observe

from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.measure import observer as observing
from avss_dist.measure.kernels import cuda as cuda_device
from avss_dist.measure.kernels.cpu import CpuKernels
from avss_dist.measure.kernels.cuda import (
    NUMBERS,
    CudaKernels,
    NotCompiled,
    chunk_of,
    compile_for,
    library,
    shared_bytes,
    window,
)
from avss_dist.measure.kernels.reference import Accumulator, Kernels
from avss_dist.models.checkpoint.loading import forward_function, open_module
from avss_dist.stats.layer_stats import merge_strata

GRID = np.array(THRESHOLDS)
SCHEDULES = ((3, 64, 0), (1, 32, 5), (7, 128, 9))  # blocks, threads, seed of the order
NAN = float("nan")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def memory_that_is_not_empty() -> Iterator[None]:
    """New memory is full of NaN, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, input, mask


def batch_of(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Batch:
    rng = np.random.default_rng(sum(shape))
    x = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    before = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    signed = torch.int32 if dtype == torch.float32 else torch.int16
    if kind == "sizes":
        x *= torch.from_numpy(10.0 ** rng.integers(-12, 6, shape)).to(dtype)
    elif kind == "patterns":
        step = 65537 if dtype == torch.float32 else 1
        x = (torch.arange(x.numel()) * step).to(signed).view(dtype).reshape(shape)
    elif kind == "edges":
        low, span = window(dtype, SHARED)
        edges = [low - 1, low, low + 1, low + span - 1, low + span, 0, 1]
        negative_edges = [edge + (1 << 15) for edge in edges]
        patterns = np.array(edges + negative_edges)
        if dtype == torch.float32:
            patterns <<= 16
        x = torch.from_numpy(rng.choice(patterns, shape)).to(signed).view(dtype)
    elif kind == "nonfinite":
        x[0, 2, shape[2] // 2] = torch.nan
        before[-1, 5, 0] = torch.inf
        x[-1, :3, -1] = -torch.inf
    mask = torch.from_numpy(rng.random(shape[:2]) < 0.9)
    mask[-1, : shape[1] // 2] = False
    return x, before, mask


BATCHES = (
    ("sizes", (3, 70, 512)),
    ("nonfinite", (2, 45, 257)),
    ("patterns", (2, 64, 514)),
    ("edges", (2, 20, 260)),
    ("sizes", (1, 9, 1)),
    ("nonfinite", (5, 7, 130)),
)


def counted(kernels: Any, batch: Batch, times: int = 2) -> dict[str, np.ndarray]:
    """Every tensor of the accumulators of three sites, to which a layer is added some times."""
    x, before, mask = batch
    block = Accumulator(x, GRID, units=True, geometry=True)
    update = Accumulator(x, GRID, units=True, geometry=False)
    plain = Accumulator(x, GRID, units=False, geometry=False)
    for _ in range(times):
        kernels.add(plain, x, mask)
        kernels.add(block, x, mask, before)
        kernels.add_update(update, x, before, mask)
        kernels.finish()
    sites = {"block": block, "update": update, "plain": plain}
    tensors = {}
    for site, into in sites.items():
        for name, tensor in into.tensors.items():
            tensors[f"{site} {name}"] = tensor.numpy()
    return tensors


def without_payloads(patterns: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Counts of patterns with all NaNs as one: subtracting may give any."""
    nan = (np.arange(1 << 16) & 0x7FFF) > (0x7F80 if dtype == torch.bfloat16 else 0x7C00)
    return np.append(np.where(nan, 0, patterns), patterns[nan].sum())


def differences(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: torch.dtype) -> list[str]:
    """The tensors whose integers differ, or whose floats differ by more than 1e-12."""
    wrong = []
    for name, want in expected.items():
        ours = got[name]
        theirs = want
        if name.endswith("patterns"):
            ours = without_payloads(ours, dtype)
            theirs = without_payloads(theirs, dtype)
        if theirs.dtype.kind == "i":
            same = np.array_equal(ours, theirs)
        else:
            largest = np.abs(theirs[np.isfinite(theirs)]).max(initial=0)
            same = np.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * largest)
        if not same:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), BATCHES, ids=str)
def test_whatever_the_schedule_counts_are_equal_and_floats_the_same_bits(
    dtype: torch.dtype, kind: str, shape: tuple[int, int, int]
) -> None:
    batch = batch_of(kind, shape, dtype)
    first, *others = [counted(CudaKernels(Emulator(*schedule), chunk=16), batch) for schedule in SCHEDULES]
    assert differences(first, counted(CpuKernels(), batch), dtype) == []
    for other in others:
        assert [name for name in first if first[name].tobytes() != other[name].tobytes()] == []


def test_layers_of_other_shapes_leave_nothing_behind() -> None:
    kernels = CudaKernels(Emulator())
    batches = [batch_of(kind, shape, torch.bfloat16) for kind, shape in BATCHES]
    for batch in [*batches, *batches[::-1]]:
        assert differences(counted(kernels, batch, 1), counted(CpuKernels(), batch, 1), torch.bfloat16) == []


def test_calls_for_one_accumulator_do_not_meet() -> None:
    """A shared layer, or more sites than one launch finishes: what waits is finished first."""
    x, before, mask = batch_of("sizes", (2, 9, 70), torch.bfloat16)
    ours = Accumulator(x, GRID, units=True, geometry=True)
    theirs = Accumulator(x, GRID, units=True, geometry=True)
    emulator = Emulator()
    kernels = CudaKernels(emulator)
    for _ in range(3):
        kernels.add(ours, x, mask, before)
        CpuKernels().add(theirs, x, mask, before)
    others = [Accumulator(x, GRID, units=False, geometry=False) for _ in range(10)]
    for other in others:
        kernels.add(other, x, mask)
    kernels.finish()
    kernels.finish()
    assert emulator.launches.count("finish") == 4
    for name, tensor in theirs.tensors.items():
        np.testing.assert_allclose(ours.tensors[name], tensor, rtol=1e-12, err_msg=name)
    assert len({other.tensors["pooled"].item() for other in others}) == 1


def test_an_input_of_another_dtype_is_compared_by_torch() -> None:
    x, before, mask = batch_of("sizes", (2, 9, 70), torch.bfloat16)
    emulator = Emulator()
    kernels = CudaKernels(emulator)
    into = Accumulator(x, GRID, units=True, geometry=True)
    kernels.add(into, x, mask, before.float())
    assert emulator.launches == []
    assert into.tensors["tokens"][0] > 0


ARCHITECTURES = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KB of shared memory of a block


def installed(major: int) -> bool:
    try:
        return bool(library(major))
    except NotCompiled:
        return False


NVRTC = cuda_device.cuda_version() or next((major for major in range(20, 11, -1) if installed(major)), 0)
"""CUDA version of the compiler: torch's own; for a torch without CUDA, the newest one that is installed."""

needs_nvrtc = pytest.mark.skipif(not installed(NVRTC), reason="needs NVRTC (nvidia-cuda-nvrtc, of the test extra)")


@needs_nvrtc
def test_nvrtc_compiles_for_every_architecture_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [(architecture, torch.bfloat16) for architecture in ARCHITECTURES]
    cases.append(("sm_90", torch.float32))

    def compiled(case: tuple[str, torch.dtype]) -> str:
        architecture, dtype = case
        return compile_for(dtype, architecture, ARCHITECTURES[architecture] << 10, NVRTC, "--ptxas-options=-v")[1]

    with ThreadPoolExecutor(2) as pool:
        logs = dict(zip(cases, pool.map(compiled, cases), strict=True))
    lines = []
    for (architecture, dtype), log in logs.items():
        kernels = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.DOTALL
        )
        span = window(dtype, ARCHITECTURES[architecture] << 10)[1]
        shared = shared_bytes(dtype, span, len(THRESHOLDS))
        registers = ", ".join(f"{name} {used}" for name, _, used in sorted(kernels))
        lines.append(f"{architecture:6} {str(dtype)[6:]:8} {shared:6} B shared; registers: {registers}")
        assert {name for name, _, _ in kernels} == {"count", "count_squared", "count_update", "compare", "finish"}
        assert {spilled for _, spilled, _ in kernels} == {"0"}, (architecture, dtype)
        for name, _, used in kernels:
            most = 64 if name.startswith("count") else 128
            assert int(used) <= most, name
        assert shared <= ARCHITECTURES[architecture] << 10
    with capsys.disabled():
        print("", *lines, sep="\n")


@needs_nvrtc
def test_what_is_not_cuda_does_not_compile() -> None:
    with pytest.raises(NotCompiled, match=f"NVRTC {NVRTC} fails for sm_1"):
        compile_for(torch.bfloat16, "sm_1", SHARED, NVRTC)
    with pytest.raises(NotCompiled, match=r"libnvrtc\.so\.7 is neither"):
        library(7)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_windows_fit_into_every_card(dtype: torch.dtype) -> None:
    for shared in (64, 99, 163, 227):
        low, span = window(dtype, shared << 10)
        assert shared_bytes(dtype, span, 14) <= shared << 10
        assert low > 0
        assert low + span <= 1 << 15


def moved(shape: tuple[int, int, int], size: int, squared: bool, inputs: int = 1) -> int:
    """Bytes that counting one site moves: what is read, and sums that are written and read again."""
    rows, tokens, units = shape
    parts = rows * -(-tokens // chunk_of(*shape))
    return rows * tokens * units * size * inputs + 2 * parts * units * 8 * (1 + squared)


def layer_moved(rows: int, tokens: int, hidden: int, inner: int, size: int) -> tuple[int, int]:
    """Bytes that a layer moves at five sites, and the bytes of the five tensors."""
    block = (rows, tokens, hidden)
    neuron = (rows, tokens, inner)
    comparison = 2 * rows * tokens * hidden * size + rows * -(-tokens // 8) * 7 * 8
    sites = 2 * moved(block, size, False) + moved(neuron, size, False) + moved(block, size, True)
    return sites + moved(block, size, True, 2) + comparison, rows * tokens * (4 * hidden + inner) * size


def test_launches_and_bytes_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator()
    monkeypatch.setattr(observing, "kernels_for", lambda device: CudaKernels(emulator))
    backbone = open_module(llama().eval().to(torch.bfloat16))
    layers = backbone.layers
    ids = torch.arange(3 * 24).reshape(3, 24) % 32
    everything = np.ones((3, 24), bool)

    def run() -> Any:
        with observe(layers, SITES, THRESHOLDS) as observer, torch.no_grad(), observer.batch(everything):
            forward_function(backbone.module)(ids, None)
        return merge_strata(observer.strata())

    ours = run()
    assert len(emulator.launches) == 7 * len(layers)
    expected = ["compare", *["count"] * 3, "count_squared", "count_update", "finish"]
    assert sorted(emulator.launches[:7]) == expected
    hidden = backbone.columns["hidden_size"]
    inner = backbone.model.config.intermediate_size
    assert emulator.traffic == len(layers) * layer_moved(3, 24, hidden, inner, 2)[0]
    monkeypatch.undo()
    theirs = run()
    for key, stats in ours.items():
        for name in ("near_zero", "abs_value_count", "count", "sequence_count", "token_count"):
            assert np.array_equal(getattr(stats, name), getattr(theirs[key], name)), (key, name)
        assert stats.pooled_variance_sum == pytest.approx(theirs[key].pooled_variance_sum, rel=1e-12)


KERNELS = ("count", "count_squared", "count_update", "compare", "finish")


class EmulatedDriver:
    """The calls of libcuda that `cuda.device` makes, on the emulator."""

    def __init__(self) -> None:
        self.emulator = Emulator()
        self.allowed: dict[str, int] = {}

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:  # noqa: N802
        module._obj.value = 1
        return 0 if image.startswith(b"\x7fELF") else 200

    def cuModuleGetFunction(self, function: Any, _module: Any, name: bytes) -> int:  # noqa: N802
        function._obj.value = 1 + KERNELS.index(name.decode())
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        self.allowed[KERNELS[function.value - 1]] = value
        return 0 if attribute == 8 and value <= 232_448 else 1

    def cuLaunchKernel(self, function: Any, *given: Any) -> int:  # noqa: N802
        grid, grid_y, grid_z, block, block_y, block_z, shared, stream, parameters, extra = given
        kernel = KERNELS[function.value - 1]
        if (grid_y, grid_z, block_y, block_z, stream.value, extra) != (1, 1, 1, 1, 7, None) or block > 1024:
            return 1
        if shared > self.allowed.get(kernel, 48 << 10):
            return 1
        size = libraries()[torch.bfloat16].sizes(kernel == "finish")
        arguments = ctypes.string_at(parameters[0], size)
        self.emulator.launch(torch.bfloat16, kernel, grid, block, shared, arguments)
        return 0

    def cuGetErrorString(self, _code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"invalid argument"
        return 0


@needs_nvrtc
def test_the_launcher_gives_the_driver_what_the_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card of two multiprocessors, whose driver is the emulator."""
    assert library(NVRTC)  # before libraries are the driver
    driver = EmulatedDriver()
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=2, shared_memory_per_block=SHARED)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.version, "cuda", f"{NVRTC}.0")
    monkeypatch.setattr(cuda_device.ctypes, "CDLL", lambda name: driver)
    launcher = cuda_device.Device(torch.device("cpu"))
    launcher.threads = 64
    batch = batch_of("nonfinite", (2, 20, 257), torch.bfloat16)
    assert differences(counted(CudaKernels(launcher), batch), counted(CpuKernels(), batch), torch.bfloat16) == []
    assert {*driver.emulator.launches} == set(KERNELS)
    driver.allowed.clear()
    with pytest.raises(RuntimeError, match=r"CUDA error: invalid argument: the driver could not launch count on cpu"):
        counted(CudaKernels(launcher), batch)


def test_without_a_compiler_torch_counts_and_says_so_once() -> None:
    class WithoutKernels(Emulator):
        def span(self, dtype: torch.dtype) -> int:
            raise NotCompiled("the architecture is not known")

    batch = batch_of("sizes", (2, 9, 70), torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=r"torch counts torch\.bfloat16, which is slower: the arch") as warned:
        got = counted(CudaKernels(WithoutKernels()), batch)
    assert len(warned) == 1
    expected = counted(Kernels(), batch)
    for name in expected:
        assert got[name].tobytes() == expected[name].tobytes()
