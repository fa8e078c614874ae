"""Estimates of five published configurations for GPUs that are not here, against formulas of their own.

The expected numbers follow from the dimensions of the models, written here layer by layer, not from the package: bytes
as stored (a scale of 4 bytes for 128 x 128 numbers of block FP8, or for a row of FBGEMM's FP8; 17 bytes for 32 numbers
of MXFP4). What a rank takes is written in whole gigabytes, which formulas for each partition gave, too.
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
from avss_dist.models.size import footprint
from avss_dist.partition.choose import choose

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
        layers: bytes of each layer.
        table: bytes of the embeddings, and of the head.
        norm: bytes of the final norm.
    """

    layers: tuple[int, ...]
    table: int
    norm: int

    @property
    def total(self) -> int:
        return sum(self.layers) + 2 * self.table + self.norm


def qwen() -> Model:
    h, q, kv, experts, m, layers, vocabulary = 4096, 64 * 128, 4 * 128, 128, 1536, 94, 151936
    attention = fp8(q, h) + 2 * fp8(kv, h) + fp8(h, q)
    stacks = experts * (fp8(2 * m, h) + fp8(h, m))
    whole = attention + stacks + bf16(experts, h) + bf16(2 * h) + bf16(2 * 128)  # router, norms, norms of q and k
    return Model(layers=(whole,) * layers, table=bf16(vocabulary, h), norm=bf16(h))


def oss() -> Model:
    h, q, kv, experts, m, layers, vocabulary = 2880, 64 * 64, 8 * 64, 128, 2880, 36, 201088
    attention = bf16(q + 2 * kv, h) + bf16(h, q) + bf16(q + 2 * kv + h) + bf16(64)  # with biases and sinks
    stacks = experts * 3 * m * h * 17 // 32 + bf16(experts, 2 * m + h)
    whole = attention + stacks + bf16(experts, h) + bf16(experts) + bf16(2 * h)
    return Model(layers=(whole,) * layers, table=bf16(vocabulary, h), norm=bf16(h))


def llama(h: int, q: int, m: int, layers: int, matrix: Callable[[int, int], int], whole: tuple[int, ...] = ()) -> Model:
    """A Llama with eight key-value heads of 128 units, whose MLPs are stored as matrices, except for some layers."""
    kv, vocabulary = 8 * 128, 128256
    attention, norms = bf16(2 * q + 2 * kv, h), bf16(2 * h)
    of_layer = []
    for layer in range(layers):
        store = bf16 if layer in whole else matrix
        mlp = 2 * store(m, h) + store(h, m)
        of_layer.append(attention + mlp + norms)
    return Model(layers=tuple(of_layer), table=bf16(vocabulary, h), norm=bf16(h))


def deepseek() -> Model:
    h, heads, experts, m, dense, vocabulary = 7168, 128, 256, 2048, 18432, 129280
    maps = ((1536, h), (heads * 192, 1536), (512 + 64, h), (heads * 256, 512), (h, heads * 128))  # low ranks, heads
    attention = sum(fp8(*shape) for shape in maps)
    norms = bf16(2 * h + 1536 + 512)
    mlp, shared = 2 * fp8(dense, h) + fp8(h, dense), 2 * fp8(m, h) + fp8(h, m)
    stacks = experts * (fp8(2 * m, h) + fp8(h, m))
    router = 4 * experts * h  # in float32
    first, mixture = attention + norms + mlp, attention + norms + shared + stacks + router
    return Model(layers=(first,) * 3 + (mixture,) * 58, table=bf16(vocabulary, h), norm=bf16(h))


MODELS = {
    QWEN: qwen(),
    OSS: oss(),
    LLAMA405: llama(16384, 16384, 53248, 126, fbgemm, (0, 125)),
    DEEPSEEK: deepseek(),
    LLAMA70: llama(8192, 8192, 28672, 80, bf16),
}


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


FITS: dict[str, tuple[dict[str, int], dict[str, int], tuple[str, str]]] = {
    # GPUs of a replica on 8 GPUs; of further partitions on 4 x 8 GPUs; and what auto takes
    QWEN: (
        {"device_map": 4, "fsdp": 4, "zero3": 4, "tensor_parallel": 4, "expert_parallel": 4},
        {},
        ("device_map", "device_map"),
    ),
    OSS: ({"single": 1, "device_map": 1, "expert_parallel": 2}, {}, ("single", "single")),
    LLAMA405: ({"device_map": 8, "fsdp": 8, "tensor_parallel": 8}, {}, ("device_map", "device_map")),
    # with a fifth of the weights in host memory, on 8 GPUs
    DEEPSEEK: ({"device_map": 8}, {"fsdp": 16, "tensor_parallel": 16, "expert_parallel": 16}, ("", "fsdp")),
    LLAMA70: (
        {"device_map": 3, "streaming": 1, "fsdp": 2, "zero3": 2, "tensor_parallel": 2},
        {},
        ("device_map", "device_map"),
    ),
}
GPU_GB = {
    # single, device_map, streaming, fsdp, zero3, tensor_parallel, expert_parallel
    QWEN: (237, 70, 18, 65, 65, 60, 60),
    OSS: (66, 66, 23, 37, 37, 33, 34),
    LLAMA405: (488, 69, 25, 75, 75, 62, 245),  # by two ranks, as it has no experts
    DEEPSEEK: (674, 70, 79, 66, 66, 54, 54),
    LLAMA70: (142, 71, 6, 75, 75, 71, 71),
}


@pytest.mark.parametrize("cluster", range(2))
@pytest.mark.parametrize("model", MODELS)
def test_what_fits_and_what_auto_takes(model: str, cluster: int) -> None:
    found, (fits, further, automatic) = paper(model, list(NODES)[cluster]), FITS[model]
    fits = fits | further if cluster else fits
    assert [row.partition for row in found.rows] == list(PARTITIONS)
    assert {row.partition: row.gpus for row in found.rows if row.fits} == fits
    assert found.auto == automatic[cluster]
    assert dict(zip(PARTITIONS, GPU_GB[model], strict=True)) == {
        row.partition: round(row.device_bytes / 1e9) for row in found.rows
    }
    if found.auto == "device_map":  # with as many GPUs as whole layers take
        assert found.auto_why.endswith(f"; over {fits['device_map']} GPUs")


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
