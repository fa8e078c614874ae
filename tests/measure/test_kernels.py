"""The fused reductions: every backend, three dtypes, against plain float64 numpy. CUDA is emulated, nightly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numba.core.caching import CompileResultCacheImpl
from support.emulated_cuda import COMPILER, Emulator
from support.oracle import Float64, assert_close, counted_by, oracle_stats
from support.waiting import NoWaiting

from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.measure.kernels import kernels_for, reference
from avss_dist.measure.kernels.cpu import CpuKernels, compiled
from avss_dist.measure.kernels.cuda import CudaKernels
from avss_dist.measure.kernels.reference import Accumulator, Kernels, float32_limits, to_stats
from avss_dist.stats.layer_stats import LayerStats

GRID = np.array(THRESHOLDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("full", "random", "left padded", "one sequence empty", "all empty")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # signalling NaN patterns


@dataclass(frozen=True)
class Batch:
    """A block's output and input, [sequences, tokens, units], and which tokens count."""

    x: torch.Tensor
    before: torch.Tensor
    mask: torch.Tensor


def emulated() -> Kernels:
    return CudaKernels(Emulator(), chunk=3)


BACKENDS = [
    CpuKernels,
    Kernels,
    pytest.param(
        emulated, marks=[pytest.mark.nightly, pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")]
    ),
]


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return request.param()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def accumulate(kernels: Kernels, batches: Sequence[Batch], thresholds: Float64, device: str = "cpu") -> Accumulator:
    into = Accumulator(batches[0].x.to(device), thresholds, units=True, geometry=True)
    for batch in batches:
        kernels.add(into, batch.x.to(device), batch.mask.to(device), batch.before.to(device))
    kernels.finish()
    return into


def whole_batch(x: torch.Tensor, before: torch.Tensor) -> Batch:
    """A batch whose tokens all count."""
    return Batch(x, before, torch.ones(x.shape[:2], dtype=torch.bool))


def normal(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, spread: float = 1.0
) -> torch.Tensor:
    """Random values of a normal distribution."""
    values = np.random.default_rng(seed).normal(mean, spread, shape)
    return torch.from_numpy(values).to(dtype)


def measured(kernels: Kernels, *batches: Batch, thresholds: Float64 = GRID, device: str = "cpu") -> LayerStats:
    return stats_of(accumulate(kernels, batches, thresholds, device))


def stats_of(into: Accumulator) -> LayerStats:
    arrays = {name: tensor.cpu().numpy() for name, tensor in into.tensors.items()}
    return to_stats(arrays, into.dtype, into.thresholds)


def expected(batch: Batch, thresholds: Float64 = GRID) -> LayerStats:
    x = batch.x.double().numpy()
    before = batch.before.double().numpy()
    mask = batch.mask.numpy()
    return oracle_stats(x, mask, thresholds, units=True, by=counted_by(batch.x.dtype), before=before)


def from_patterns(patterns: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    signed = np.int32 if dtype == torch.float32 else np.int16
    return torch.from_numpy(np.ascontiguousarray(patterns).astype(signed)).view(dtype)


def patterns_of(values: torch.Tensor) -> np.ndarray:
    signed = torch.int32 if values.dtype == torch.float32 else torch.int16
    return values.view(signed).numpy().astype(np.int64)


def any_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, oddities: float) -> torch.Tensor:
    """Values of many sizes, with a share of oddities: any bit pattern, and those around zero, thresholds and inf."""
    values = rng.normal(size=shape) * 10.0 ** rng.integers(-7, 4, shape)
    patterns = patterns_of(torch.from_numpy(values).to(dtype))
    special = torch.tensor([0.0, -0.0, np.inf, -np.inf, *THRESHOLDS], dtype=dtype)
    odd = rng.choice(patterns_of(special), shape) + rng.integers(-1, 2, shape)
    is_any_pattern = rng.random(shape) < 0.3
    odd = np.where(is_any_pattern, rng.integers(0, 1 << 32, shape), odd)
    is_odd = rng.random(shape) < oddities
    return from_patterns(np.where(is_odd, odd, patterns), dtype)


def any_mask(rng: np.random.Generator, kind: str, sequences: int, tokens: int) -> torch.Tensor:
    mask = np.ones((sequences, tokens), bool)
    if kind == "random":
        mask = rng.random(mask.shape) < 0.6
    elif kind == "left padded":
        starts = rng.integers(0, tokens, sequences)
        mask = np.arange(tokens) >= starts[:, None]
    elif kind == "one sequence empty":
        mask[rng.integers(sequences)] = False
    elif kind == "all empty":
        mask[:] = False
    return torch.from_numpy(mask)


def any_batch(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, mask: str = "random", oddities: float = 0.02
) -> Batch:
    rng = np.random.default_rng(seed)
    x = any_values(rng, shape, dtype, oddities)
    before = any_values(rng, shape, dtype, oddities)
    return Batch(x, before, any_mask(rng, mask, *shape[:2]))


def plain_batch(x: torch.Tensor, seed: int = 0) -> Batch:
    """All tokens count; the block's input is another random tensor of about the same size."""
    noise = normal(seed, x.shape, x.dtype)
    return whole_batch(x, x * 0.5 + noise)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), shapes, st.sampled_from(DTYPES), st.sampled_from(MASKS), st.sampled_from([0, 0.02, 0.5]))
def test_every_backend_equals_the_oracle_on_anything(
    backend: Callable[[], Kernels],
    seed: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    mask: str,
    oddities: float,
) -> None:
    batch = any_batch(seed, shape, dtype, mask, oddities)
    assert_close(measured(backend(), batch), expected(batch), angle_atol=1e-8)


@pytest.mark.parametrize("shape", [(2, 64, 96), (5, 1, 257), (1, 33, 1)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_fixed_shapes_equal_the_oracle(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int], mask: str
) -> None:
    batch = any_batch(1, shape, dtype, mask, oddities=0.002)
    assert_close(measured(kernels, batch), expected(batch), angle_atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_update_that_its_dtype_cannot_hold_has_a_size(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 4, dtype=dtype)
    before = 2 * x
    x[0, 1] = torch.finfo(dtype).max
    before[0, 1] = torch.finfo(dtype).min
    stats = measured(kernels, whole_batch(x, before))
    assert stats.token_count == 3
    assert stats.input_count == 12
    assert stats.cosine_sum == 1.0
    assert stats.relative_magnitude_sum == 3.0


def test_a_small_update_is_that_of_the_values_not_of_their_rounding(kernels: Kernels) -> None:
    """bfloat16 rounds 1.0078125 - 0.00390625 to 1.0: the update is off by 0.4%, its size is not."""
    after = torch.full((1, 2, 8), 1.0078125, dtype=torch.bfloat16)
    before = torch.full((1, 2, 8), 0.00390625, dtype=torch.bfloat16)
    stats = measured(kernels, whole_batch(after, before))
    assert (after - before)[0, 0, 0] == 1.0
    relative_magnitude = (1.0078125 - 0.00390625) / 0.00390625
    assert stats.relative_magnitude_sum == pytest.approx(2 * relative_magnitude, rel=1e-14)


def test_an_update_is_counted_as_its_dtype_rounds_it(kernels: Kernels, dtype: torch.dtype) -> None:
    batch = any_batch(17, (3, 8, 70), dtype, oddities=0.002)
    into = Accumulator(batch.x, GRID, units=True, geometry=False)
    kernels.add_update(into, batch.x, batch.before, batch.mask)
    kernels.finish()
    update = (batch.x - batch.before).double().numpy()
    mask = batch.mask.numpy()
    exact = oracle_stats(update, mask, GRID, units=True, by=counted_by(dtype))
    assert_close(stats_of(into), exact)


def test_tokens_without_an_angle_count_only_in_the_input_moments(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 4, dtype=dtype)
    before = torch.ones(1, 3, 4, dtype=dtype)
    x[0, 0] = before[0, 1] = 0
    stats = measured(kernels, whole_batch(x, before))
    assert stats.token_count == 1
    assert stats.cosine_sum == 1.0
    assert stats.angular_sum == 0.0
    assert stats.relative_magnitude_sum == 0.0
    assert stats.input_count == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.5, -1.5])
def test_parallel_tokens_have_an_angle_whatever_rounds(kernels: Kernels, dtype: torch.dtype, factor: float) -> None:
    rng = np.random.default_rng(3)
    shape = (1, 200, 33)
    values = rng.integers(1, 64, shape) * 2.0 ** rng.integers(-30, 1, shape)
    before = torch.from_numpy(values).to(dtype)
    stats = measured(kernels, whole_batch(before * factor, before))
    angular_sum = 0 if factor > 0 else 200
    assert stats.cosine_sum == pytest.approx(math.copysign(200, factor), rel=1e-15)
    assert stats.angular_sum == pytest.approx(angular_sum, abs=200 * 1e-8)


@pytest.mark.parametrize(
    ("spread", "outliers"),
    [(math.sqrt(0.03), 1e4), (math.sqrt(40_000), 1e4), (1e-2, -1e4)],
    ids=["first layers", "last layers", "small values"],
)
def test_massive_activations_keep_their_digits(
    kernels: Kernels, dtype: torch.dtype, spread: float, outliers: float
) -> None:
    x = normal(3, (2, 48, 96), dtype, spread=spread)
    x[:, ::16, 5] = outliers
    batch = plain_batch(x)
    assert_close(measured(kernels, batch), expected(batch))


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some sequences of a batch."""
    return Batch(batch.x[start:stop], batch.before[start:stop], batch.mask[start:stop])


def test_a_large_offset_does_not_cancel(kernels: Kernels, dtype: torch.dtype) -> None:
    x = normal(5, (4, 64, 128), dtype, mean=1e4)
    exact = x.double().flatten().tolist()
    mean = math.fsum(exact) / len(exact)
    m2 = math.fsum((v - mean) ** 2 for v in exact)
    batch = whole_batch(x, x)
    stats = measured(kernels, part_of(batch, 0, 1), part_of(batch, 1, 4))
    assert stats.mean == pytest.approx(mean, rel=1e-14)
    assert stats.m2 == pytest.approx(m2, rel=1e-9)
    assert stats.input_m2 == pytest.approx(m2, rel=1e-9)
    pooled = expected(batch).pooled_variance_sum
    assert stats.pooled_variance_sum == pytest.approx(pooled, rel=1e-9)


def around(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Each value as the dtype rounds it, with its two neighbours on both sides."""
    centers = patterns_of(torch.tensor(values, dtype=dtype))
    neighbours = centers[:, None] + np.arange(-2, 3)
    return from_patterns(np.unique(neighbours), dtype)


def test_near_zero_is_strict_and_exact_at_the_threshold(kernels: Kernels, dtype: torch.dtype) -> None:
    representable = torch.tensor(THRESHOLDS, dtype=dtype).double().numpy()
    above = np.nextafter(representable, 1)
    thresholds = np.unique(np.concatenate([GRID, representable, above]))
    values = around(THRESHOLDS, dtype)
    x = torch.cat([values, -values])[None, None]
    stats = measured(kernels, plain_batch(x), thresholds=thresholds)
    sizes = x.double().abs()
    near_zero = stats.near_zero.tolist()
    assert near_zero == [int((sizes < threshold).sum()) for threshold in thresholds]
    assert len(set(near_zero)) > len(THRESHOLDS)  # the thresholds tell neighbours apart


def test_several_batches_equal_one(kernels: Kernels, dtype: torch.dtype) -> None:
    whole = any_batch(6, (6, 8, 16), dtype, oddities=0.005)
    parts = [part_of(whole, 0, 1), part_of(whole, 1, 4), part_of(whole, 4, 6)]
    assert_close(measured(kernels, *parts), measured(kernels, whole))


def test_a_fully_masked_batch_adds_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    batch = any_batch(7, (3, 8, 16), dtype)
    filler = any_batch(8, (3, 8, 16), dtype, "all empty")
    assert measured(kernels, filler, batch, filler).equals(measured(kernels, batch))


def test_what_an_accumulator_does_not_keep_is_absent(kernels: Kernels, dtype: torch.dtype) -> None:
    batch = any_batch(10, (2, 8, 16), dtype)
    into = Accumulator(batch.x, GRID, units=False, geometry=False)
    kernels.add(into, batch.x, batch.mask)
    kernels.finish()
    x = batch.x.double().numpy()
    mask = batch.mask.numpy()
    exact = oracle_stats(x, mask, GRID, by=counted_by(dtype))
    assert_close(stats_of(into), exact)


def test_shards_in_threads_of_their_own_give_the_same_bytes(dtype: torch.dtype) -> None:
    batches = [any_batch(seed, (5, 32, 64), dtype, oddities=0.001) for seed in (11, 12)]

    def bytes_of(_: int) -> dict[str, bytes]:
        into = accumulate(CpuKernels(), batches, GRID)
        return {name: tensor.numpy().tobytes() for name, tensor in into.tensors.items()}

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(bytes_of, range(8))
    for other in others:
        assert other == first


def test_counts_move_to_64_bits_before_they_overflow(
    kernels: Kernels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [any_batch(seed, (3, 8, 16), dtype) for seed in (21, 22, 23)]
    whole = measured(kernels, *batches)
    monkeypatch.setattr("avss_dist.measure.kernels.reference.MOST_32_BIT", 2 * 3 * 8 * 16)
    into = accumulate(kernels, batches, GRID)
    if dtype != torch.float32:
        assert into.tensors["patterns"].dtype == torch.int64
    assert stats_of(into).equals(whole)


def test_small_chunks_change_no_count(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    batch = any_batch(13, (3, 8, 16), dtype, oddities=0.002)
    monkeypatch.setattr(reference, "CHUNK", 40)
    assert_close(measured(Kernels(), batch), expected(batch))


TRANSFERS = {"item": torch.Tensor.item, "nonzero": torch.nonzero, "mask": lambda t: t[t > 0], "bool": bool}


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
def test_the_guard_sees_a_transfer(transfer: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for its result"):
        transfer(torch.ones(1))


def test_the_guard_sees_a_copy() -> None:
    with NoWaiting() as guard:
        torch.ones(2).to("meta")
        torch.ones(2, device="meta").copy_(torch.ones(2))
        torch.where(torch.ones(2, device="meta") > 0, 1, 0)
    assert guard.copies == ["_to_copy", "copy_"]


BOTH = pytest.mark.parametrize("backend", [Kernels, lambda: kernels_for(torch.device("cuda"))], ids=["torch", "own"])


@pytest.mark.gpu
@needs_cuda
@BOTH
@pytest.mark.parametrize("mask", MASKS)
def test_cuda_equals_the_oracle_and_repeats_to_the_bit(
    dtype: torch.dtype, mask: str, backend: Callable[[], Kernels]
) -> None:
    batch = any_batch(15, (4, 64, 300), dtype, mask, oddities=0.001)
    first = measured(backend(), batch, device="cuda")
    second = measured(backend(), batch, device="cuda")
    assert_close(first, expected(batch), angle_atol=1e-8)
    assert first.equals(second)


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_device_has_its_own_kernels() -> None:
    assert isinstance(kernels_for(torch.device("cuda")), CudaKernels)


def test_a_cpu_has_its_own_kernels_and_an_unknown_device_those_of_torch() -> None:
    assert isinstance(kernels_for(torch.device("cpu")), CpuKernels)
    assert type(kernels_for(torch.device("xpu"))) is Kernels


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings CUDA")
def test_without_nvrtc_torch_counts_on_cuda_and_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="torch counts on cuda:0, which is slower: libnvrtc"):
        assert type(kernels_for(torch.device("cuda:0"))) is Kernels


def float32_cases() -> Float64:
    rng = np.random.default_rng(0)
    spread = 10.0 ** rng.uniform(-46, 38, 300)
    exact = spread.astype(np.float32).astype(np.float64)
    edges = np.array([1e-46, 2.0**-149, 2.0**-149 * 1.5, 2.0**-126, float(np.finfo(np.float32).max), 1e39])
    cases = np.concatenate([GRID, spread, exact, np.nextafter(exact, 0), np.nextafter(exact, np.inf), edges])
    return np.unique(cases[cases > 0])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_float32_limits_part_neighbours_as_float64_does() -> None:
    thresholds = float32_cases()
    limits = float32_limits(thresholds).astype(np.int64)
    for offset in range(-3, 4):
        patterns = np.clip(limits + offset, 0, 0x7F7FFFFF).astype(np.uint32)
        values = patterns.view(np.float32).astype(np.float64)
        assert np.array_equal(patterns < limits, values < thresholds), offset


def test_kernels_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only installation, without a home that can be written: numba finds no place for its cache."""
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache function"):
        njit(cache=True)(_twice)
    assert compiled()(_twice)(21) == 42


def _twice(number: int) -> int:
    return 2 * number
