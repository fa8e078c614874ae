"""Estimates of five published configurations for GPUs that are not here, against formulas of their own.

The expected numbers follow from the dimensions of the models, written here layer by layer, not from the package: bytes
as stored (a scale of 4 bytes for 128 x 128 numbers of block FP8, or for a row of FBGEMM's FP8; 17 bytes for 32 numbers
of MXFP4), and the parts of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.devices import devices_of

import avss_dist.estimation.estimate
from avss_dist.api.measure import estimate
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Execution, Settings
from avss_dist.estimation.estimate import Estimate, Row
from avss_dist.models.checkpoints import locate
from avss_dist.models.loading import skeleton, text_config
from avss_dist.models.quantization import packed, quantize_skeleton
from avss_dist.models.size import footprint
from avss_dist.partition.choose import choose
from avss_dist.partition.memory import batch_bytes

pytestmark = pytest.mark.nightly

PUBLISHED = Path(__file__).parents[1] / "support" / "published"
QWEN, OSS, LLAMA405, DEEPSEEK, LLAMA70 = (
    *("qwen3-235b-a22b-fp8", "gpt-oss-120b", "llama-3.1-405b-fp8", "deepseek-v3"),
    "llama-3.3-70b",
)
NODES = {1: devices_of("cuda", 80 * 10**9, count=8, host_bytes=2 * 10**12)}
NODES[4] = devices_of("cuda", 80 * 10**9, count=32, nodes=4, host_bytes=2 * 10**12)
"""Eight GPUs of 80 GB on a node, by the number of nodes."""


@cache
def paper(model: str, nodes: int = 1, **options: Any) -> Estimate:
    return estimated(model, nodes, **options)


def estimated(model: str, nodes: int = 1, **options: Any) -> Estimate:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avss_dist.estimation.estimate, "devices_here", lambda kind: NODES[nodes])
        patch.setattr(avss_dist.estimation.estimate, "pick_device", lambda name: torch.device("cuda"))
        return estimate(str(PUBLISHED / model), **options)


def rows(model: str, nodes: int = 1) -> dict[str, Row]:
    return {row.partition: row for row in paper(model, nodes).rows}


# Dimensions of the models, by hand.


def fp8(rows: int, columns: int) -> int:
    """Bytes of a matrix in FP8 with a float32 scale for each block of 128 x 128."""
    return rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)


def fbgemm(rows: int, columns: int) -> int:
    return rows * columns + 4 * rows


def bf16(*sizes: int) -> int:
    return 2 * math.prod(sizes)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Bytes and sizes of a model.

    Attributes:
        layers: for each layer, its bytes as (divided by tensor parallel ranks, divided by expert parallel ranks, all).
        table: bytes of the embeddings, and of the head.
        norm: bytes of the final norm.
        unpacked: bytes of the largest layer in bfloat16, and of unpacking its largest weight.
    """

    layers: tuple[tuple[int, int, int], ...]
    table: int
    norm: int
    unpacked: tuple[int, int]

    @property
    def total(self) -> int:
        return sum(layer[2] for layer in self.layers) + 2 * self.table + self.norm

    def part(self, which: int, ranks: int) -> float:
        """Bytes of a rank whose layers are divided in the first or second way; embeddings and head are, too."""
        divided = sum(layer[which] for layer in self.layers) + 2 * self.table
        return divided / ranks + self.total - divided


def qwen() -> Model:
    h, q, kv, experts, m, layers, vocabulary = 4096, 64 * 128, 4 * 128, 128, 1536, 94, 151936
    attention = fp8(q, h) + 2 * fp8(kv, h) + fp8(h, q)
    stacks = experts * (fp8(2 * m, h) + fp8(h, m))
    whole = attention + stacks + bf16(experts, h) + bf16(2 * h) + bf16(2 * 128)  # router, norms, norms of q and k
    numbers = 2 * h * q + 2 * h * kv + experts * 3 * m * h + experts * h + 2 * h + 2 * 128
    return Model(
        layers=((attention + stacks, stacks, whole),) * layers,
        table=bf16(vocabulary, h),
        norm=bf16(h),
        unpacked=(2 * numbers, experts * 2 * m * h * 4),
    )


def oss() -> Model:
    h, q, kv, experts, m, layers, vocabulary = 2880, 64 * 64, 8 * 64, 128, 2880, 36, 201088
    attention = bf16(q + 2 * kv, h) + bf16(h, q) + bf16(q + 2 * kv + h) + bf16(64)  # with biases and sinks
    stacks = experts * 3 * m * h * 17 // 32 + bf16(experts, 2 * m + h)
    whole = attention + stacks + bf16(experts, h) + bf16(experts) + bf16(2 * h)
    unpacked = whole - stacks + bf16(experts, 3 * m * h + 2 * m + h)
    return Model(
        layers=((0, stacks, whole),) * layers,
        table=bf16(vocabulary, h),
        norm=bf16(h),
        unpacked=(unpacked, experts * 2 * m * h * 4),
    )


def llama(h: int, q: int, m: int, layers: int, matrix: Callable[[int, int], int], whole: tuple[int, ...] = ()) -> Model:
    """A Llama with eight key-value heads of 128 units, whose MLPs are stored as matrices, except for some layers."""
    kv, vocabulary = 8 * 128, 128256
    attention, norms = bf16(2 * q + 2 * kv, h), bf16(2 * h)
    of_layer = []
    for layer in range(layers):
        store = bf16 if layer in whole else matrix
        mlp = 2 * store(m, h) + store(h, m)
        of_layer.append((attention + mlp, 0, attention + mlp + norms))
    parameters = 2 * h * q + 2 * h * kv + 3 * h * m
    return Model(
        layers=tuple(of_layer),
        table=bf16(vocabulary, h),
        norm=bf16(h),
        unpacked=(2 * parameters + norms, 8 * h * m if matrix is not bf16 else 0),
    )


def deepseek() -> Model:
    h, heads, experts, m, dense, vocabulary = 7168, 128, 256, 2048, 18432, 129280
    maps = ((1536, h), (heads * 192, 1536), (512 + 64, h), (heads * 256, 512), (h, heads * 128))  # low ranks, heads
    attention = sum(fp8(*shape) for shape in maps)
    norms = bf16(2 * h + 1536 + 512)
    mlp, shared = 2 * fp8(dense, h) + fp8(h, dense), 2 * fp8(m, h) + fp8(h, m)
    stacks = experts * (fp8(2 * m, h) + fp8(h, m))
    router = 4 * experts * h  # in float32
    first, mixture = attention + norms + mlp, attention + norms + shared + stacks + router
    in_attention = sum(math.prod(shape) for shape in maps)
    numbers = in_attention + (experts + 1) * 3 * m * h
    return Model(
        layers=((mlp, mlp, first),) * 3 + ((shared + stacks, shared + stacks, mixture),) * 58,
        table=bf16(vocabulary, h),
        norm=bf16(h),
        unpacked=(2 * numbers + norms + router, experts * 2 * m * h * 4),
    )


MODELS = {
    QWEN: qwen(),
    OSS: oss(),
    LLAMA405: llama(16384, 16384, 53248, 126, fbgemm, (0, 125)),
    DEEPSEEK: deepseek(),
    LLAMA70: llama(8192, 8192, 28672, 80, bf16),
}


@cache
def beside(model: str) -> int:
    """Bytes of a batch's activations, whose formula has tests of its own."""
    settings = Settings(device="cuda", dtype="bfloat16")
    checkpoint = locate(str(PUBLISHED / model), weights=False)
    assert checkpoint is not None
    size = footprint(checkpoint, settings)
    return batch_bytes(size, settings)


@pytest.mark.parametrize(
    ("model", "billions"), [(QWEN, 235.1), (OSS, 116.8), (LLAMA405, 405.9), (DEEPSEEK, 671.0), (LLAMA70, 70.6)]
)
def test_parameters_are_the_published_ones(model: str, billions: float) -> None:
    """DeepSeek-V3 without its module that predicts further tokens."""
    assert round(paper(model).num_parameters / 1e9, 1) == billions


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_as_stored(model: str) -> None:
    assert paper(model).weight_bytes == pytest.approx(MODELS[model].total, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "experts"),
    [(QWEN, 128 * (fp8(3072, 4096) + fp8(4096, 1536))), (DEEPSEEK, 256 * (fp8(4096, 7168) + fp8(7168, 2048)))],
)
def test_mixtures_whose_layer_has_no_room_are_refused(model: str, experts: int) -> None:
    """On 8 GPUs, the layer of Qwen3-235B has room beside a rank's part and that of DeepSeek-V3 has not."""
    settings = Settings(device="cuda", dtype="bfloat16")
    checkpoint = locate(str(PUBLISHED / model), weights=False)
    assert checkpoint is not None
    size = footprint(checkpoint, settings)
    assert size.expert_bytes == experts
    devices = NODES[1]
    for partition in ("fsdp", "zero3"):
        execution = Execution(partition=partition)
        if model == QWEN:
            assert choose(size, settings, execution, devices).ranks == 8
            continue
        with pytest.raises(ConfigError, match=r"needs 108 GB of GPU memory for each of 8 ranks, and there are 80 GB"):
            choose(size, settings, execution, devices)


@pytest.mark.parametrize("model", [QWEN, DEEPSEEK])
def test_sizes_are_those_of_the_modules_of_transformers(model: str) -> None:
    """Where transformers builds the quantized modules without a kernel of their own."""
    checkpoint = locate(str(PUBLISHED / model), weights=False)
    assert checkpoint is not None
    config = text_config(checkpoint)
    sizes = []
    for quantize in (packed, quantize_skeleton):
        model_ = quantize(checkpoint, config, skeleton(config, Settings(), config.dtype))
        sizes.append(sum(p.numel() * p.element_size() for p in model_.parameters()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("ranks", [8, 16, 32])
@pytest.mark.parametrize("model", MODELS)
def test_memory_of_each_rank(model: str, ranks: int) -> None:
    """DeepSpeed splits a model whose heads the ranks do not divide, or of which no plan divides the layers."""
    found = {row.partition: row for row in paper(model, 4, ranks=ranks).rows}
    of, more = MODELS[model], beside(model)
    largest = max(max(layer[2] for layer in of.layers), of.table)
    for name, row in found.items():
        n = row.ranks
        expected = {
            "single": of.total,
            "streaming": of.table + of.norm + 2 * of.unpacked[0] + of.unpacked[1],
            "fsdp": of.total / n + 2 * largest + 50e6 * 2,  # PyTorch and DeepSpeed gather ahead
            "zero3": of.total / n + 2 * largest + 50e6 * 2,
            "tensor_parallel": of.part(0, n),
            "expert_parallel": of.part(1, n),
        }
        by_plan = model == DEEPSEEK or ("llama" in model and n <= 8)
        if name == "tensor_parallel" and not by_plan:  # DeepSpeed would divide the layers, and no more
            expected[name] = sum(layer[2] for layer in of.layers) / n + of.table + of.norm
        if (
            name == "expert_parallel" and "llama" in model
        ):  # there are no experts, so the plan of tensor_parallel is left
            expected[name] = of.part(0, n)
        if name in expected:
            assert row.device_bytes == pytest.approx(expected[name] + more, rel=1e-3), name


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("model", MODELS)
def test_a_device_map_fills_one_gpu_after_the_other(model: str, nodes: int) -> None:
    """Nine tenths of each, without a batch; the first also keeps room for the largest layer. It stays on a node."""
    of, row = MODELS[model], rows(model, nodes)["device_map"]
    room = int(80e9 * 0.9) - beside(model)
    largest = max(layer[2] for layer in of.layers)
    pieces = [of.table, *(layer[2] for layer in of.layers), of.norm, of.table]
    held = [0]
    for size in pieces if of.total > room else [of.total]:
        if held[-1] + size > room - (largest if len(held) == 1 and of.total > room else 0):
            held.append(0)
        held[-1] += size
    fits = len(held) <= 8
    assert row.gpus == min(len(held), 8)
    if not fits:
        held[0] += largest  # one layer at a time of those in host memory
    assert row.device_bytes == pytest.approx(max(held[:8]) + beside(model), rel=2e-3)
    assert ("in host memory" in row.why) == (not fits)


FITS = {
    # on 8 GPUs; on 4 x 8 GPUs, with the GPUs of a replica
    QWEN: (
        {"device_map": 4, "fsdp": 4, "zero3": 4, "tensor_parallel": 4, "expert_parallel": 4},
        {"device_map": 4, "fsdp": 4, "zero3": 4, "tensor_parallel": 4, "expert_parallel": 4},
        ("device_map", "device_map"),
    ),
    OSS: (
        {"single": 1, "device_map": 1, "expert_parallel": 2},
        {"single": 1, "device_map": 1, "expert_parallel": 2},
        ("single", "single"),
    ),
    LLAMA405: (
        {"device_map": 8, "fsdp": 8, "tensor_parallel": 8},
        {"device_map": 8, "fsdp": 8, "tensor_parallel": 8},
        ("device_map", "device_map"),
    ),
    DEEPSEEK: (
        {"device_map": 8},  # with a fifth of the weights in host memory
        {"device_map": 8, "fsdp": 16, "tensor_parallel": 16, "expert_parallel": 16},
        ("", "fsdp"),
    ),
    LLAMA70: (
        {"device_map": 3, "streaming": 1, "fsdp": 2, "zero3": 2, "tensor_parallel": 2},
        {"device_map": 3, "streaming": 1, "fsdp": 2, "zero3": 2, "tensor_parallel": 2},
        ("device_map", "device_map"),
    ),
}
GPU_GB = {
    # single, device_map, streaming, fsdp, zero3, tensor_parallel, expert_parallel
    QWEN: (237, 70, 18, 65, 65, 60, 60),
    OSS: (66, 66, 23, 37, 37, 33, 34),
    LLAMA405: (488, 69, 25, 75, 75, 62, 62),
    DEEPSEEK: (674, 70, 79, 66, 66, 54, 54),
    LLAMA70: (142, 71, 6, 75, 75, 71, 71),
}


@pytest.mark.parametrize("cluster", range(2))
@pytest.mark.parametrize("model", MODELS)
def test_what_fits_and_what_auto_takes(model: str, cluster: int) -> None:
    found = paper(model, list(NODES)[cluster])
    assert [row.partition for row in found.rows] == list(PARTITIONS)
    assert {row.partition: row.gpus for row in found.rows if row.fits} == FITS[model][cluster]
    assert found.auto == FITS[model][2][cluster]
    assert dict(zip(PARTITIONS, GPU_GB[model], strict=True)) == {
        row.partition: round(row.device_bytes / 1e9) for row in found.rows
    }
    if found.auto == "device_map":  # with as many GPUs as whole layers take
        assert found.auto_why.endswith(f"; over {FITS[model][cluster]['device_map']} GPUs")


def test_reasons() -> None:
    reasons = {model: {row.partition: row.why for row in paper(model, ranks=8).rows} for model in MODELS}
    assert "8 ranks do not divide 4 heads" in reasons[QWEN]["tensor_parallel"]
    assert "has no plan that spreads experts of LlamaForCausalLM" in reasons[LLAMA70]["expert_parallel"]
    assert "cannot gather them" in reasons[OSS]["fsdp"] and "cannot gather them" in reasons[OSS]["zero3"]
    assert "needs the setting dequantize" in reasons[QWEN]["streaming"]
    assert "transformers cannot unpack these" in reasons[LLAMA405]["streaming"]
    assert "weights are unpacked to bfloat16" in reasons[QWEN]["streaming"]
    assert "Set dequantize, with which it is streamed" in paper(DEEPSEEK).auto_why
    why = {row.partition: row.why for row in paper(DEEPSEEK, 4, ranks=32).rows}
    assert "32 ranks do not divide the 18432 rows of model.layers.*.mlp.gate_proj.weight" in why["expert_parallel"]


def test_unpacked_weights() -> None:
    """Twice the bytes; of a model that streams with them, auto takes what it said before."""
    found = paper(DEEPSEEK, dequantize=True)
    assert found.weight_bytes == pytest.approx(2 * found.num_parameters, rel=1e-3) and not found.quantized
    assert found.auto == "streaming"
    row = {row.partition: row for row in found.rows}["streaming"]
    assert row.fits and row.device_bytes == rows(DEEPSEEK)["streaming"].device_bytes
    why = {row.partition: row.why for row in paper(QWEN, ranks=8, dequantize=True).rows}["fsdp"]
    assert "8 ranks do not divide the 512 rows of model.layers.*.self_attn.k_proj.weight" in why


def test_limits_and_ranks() -> None:
    found = {row.partition: row for row in paper(LLAMA70, ranks=4).rows}
    assert found["fsdp"].ranks == 4
    limited = estimated(LLAMA70, max_memory={"0": "16GB"})
    assert {row.partition for row in limited.rows if row.fits} == {"device_map", "streaming"}
    assert limited.device_bytes == 16e9


def test_a_configuration_that_does_not_tell_the_size_of_its_weights(tmp_path: Path) -> None:
    text = (PUBLISHED / LLAMA70 / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ModelError, match=r"\(gptq\), and its configuration alone does not tell the size"):
        estimate(str(tmp_path))
