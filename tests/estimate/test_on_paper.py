"""Estimates for hardware that is not at hand, of five published configurations, against formulas of their own.

The expected numbers follow from the dimensions of the models, written here layer by layer, not from the package: bytes
as stored (a scale of 4 bytes for 128 x 128 numbers of block FP8, or for a row of FBGEMM's FP8; 17 bytes for 32 numbers
of MXFP4), the parts of 8, 16 or 32 ranks, and what a rank receives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from avss_dist.api.measure import estimate
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.hardware import Hardware, parse_hardware
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Execution, Settings
from avss_dist.estimation.estimate import Estimate, Row
from avss_dist.measure.shard import counter_bytes
from avss_dist.models.checkpoints import locate
from avss_dist.models.loading import skeleton, text_config
from avss_dist.models.quantization import packed, quantize_skeleton
from avss_dist.models.size import footprint
from avss_dist.partition.choose import batch_bytes, choose
from avss_dist.partition.cost import Machine

pytestmark = pytest.mark.nightly

PUBLISHED = Path(__file__).parents[1] / "support" / "published"
QWEN, OSS, LLAMA405, DEEPSEEK, LLAMA70 = (
    *("qwen3-235b-a22b-fp8", "gpt-oss-120b", "llama-3.1-405b-fp8", "deepseek-v3"),
    "llama-3.3-70b",
)
CLUSTERS = {"8xH100": 8, "4x8xH100": 32}
TOKENS = 256  # of a row


@cache
def paper(model: str, hardware: str, **options: Any) -> Estimate:
    return estimate(str(PUBLISHED / model), hardware=hardware, **options)


def rows(model: str, hardware: str) -> dict[str, Row]:
    return {row.partition: row for row in paper(model, hardware).rows}


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
        sums: sums of hidden states over ranks in all layers, by partition.
        table: bytes of the embeddings, and of the head.
        norm: bytes of the final norm.
        hidden: units of the residual stream.
        unpacked: bytes of the largest layer in bfloat16, and of unpacking its largest weight.
        active: parameters that multiply a token, those that tensor parallel ranks divide, and expert parallel ranks.
        attention: units of all queries.
    """

    layers: tuple[tuple[int, int, int], ...]
    sums: tuple[int, int]
    table: int
    norm: int
    hidden: int
    unpacked: tuple[int, int]
    active: tuple[int, int, int]
    attention: int

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
    in_attention, chosen = 2 * h * q + 2 * h * kv, 8 * 3 * m * h
    return Model(
        layers=((attention + stacks, stacks, whole),) * layers,
        sums=(2 * layers, layers),  # four key-value heads: expert parallel ranks have the whole attention each
        table=bf16(vocabulary, h),
        norm=bf16(h),
        hidden=h,
        unpacked=(2 * numbers, experts * 2 * m * h * 4),
        active=(layers * (in_attention + chosen + experts * h), layers * (in_attention + chosen), layers * chosen),
        attention=q,
    )


def oss() -> Model:
    h, q, kv, experts, m, layers, vocabulary = 2880, 64 * 64, 8 * 64, 128, 2880, 36, 201088
    attention = bf16(q + 2 * kv, h) + bf16(h, q) + bf16(q + 2 * kv + h) + bf16(64)  # with biases and sinks
    stacks = experts * 3 * m * h * 17 // 32 + bf16(experts, 2 * m + h)
    whole = attention + stacks + bf16(experts, h) + bf16(experts) + bf16(2 * h)
    unpacked = whole - stacks + bf16(experts, 3 * m * h + 2 * m + h)
    in_attention, chosen = 2 * h * q + 2 * h * kv, 4 * (3 * m * h)
    return Model(
        layers=((0, stacks, whole),) * layers,
        sums=(0, layers),
        table=bf16(vocabulary, h),
        norm=bf16(h),
        hidden=h,
        unpacked=(unpacked, experts * 2 * m * h * 4),
        active=(layers * (in_attention + chosen + experts * h), 0, layers * chosen),
        attention=q,
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
        sums=(2 * layers, 2 * layers),
        table=bf16(vocabulary, h),
        norm=bf16(h),
        hidden=h,
        unpacked=(2 * parameters + norms, 8 * h * m if matrix is not bf16 else 0),
        active=(layers * parameters, layers * parameters, layers * parameters),
        attention=q,
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
    routed, always = 58 * 8 * 3 * m * h, 58 * 3 * m * h + 3 * 3 * dense * h
    return Model(
        layers=((mlp, mlp, first),) * 3 + ((shared + stacks, shared + stacks, mixture),) * 58,
        sums=(3 + 58 * 2, 3 + 58 * 2),  # attention has no rule: each rank has all of it
        table=bf16(vocabulary, h),
        norm=bf16(h),
        hidden=h,
        unpacked=(2 * numbers + norms + router, experts * 2 * m * h * 4),
        active=(61 * in_attention + routed + always + 58 * experts * h, routed + always, routed + always),
        attention=heads * 56,  # transformers' head_dim of this configuration
    )


MODELS = {
    QWEN: qwen(),
    OSS: oss(),
    LLAMA405: llama(16384, 16384, 53248, 126, fbgemm, (0, 125)),
    DEEPSEEK: deepseek(),
    LLAMA70: llama(8192, 8192, 28672, 80, bf16),
}


@cache
def beside(model: str) -> tuple[int, int]:
    """Bytes of a batch's activations, and of the statistics, whose formulas have tests of their own."""
    settings = Settings(device="cuda", dtype="bfloat16")
    checkpoint = locate(str(PUBLISHED / model), weights=False)
    assert checkpoint is not None
    size = footprint(checkpoint, settings)
    return batch_bytes(size, settings), counter_bytes(size, settings)


@pytest.mark.parametrize(
    ("model", "billions"), [(QWEN, 235.1), (OSS, 116.8), (LLAMA405, 405.9), (DEEPSEEK, 671.0), (LLAMA70, 70.6)]
)
def test_parameters_are_the_published_ones(model: str, billions: float) -> None:
    """DeepSeek-V3 without its module that predicts further tokens."""
    assert round(paper(model, "8xH100").num_parameters / 1e9, 1) == billions


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_as_stored(model: str) -> None:
    assert paper(model, "8xH100").weight_bytes == pytest.approx(MODELS[model].total, rel=1e-6)


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
    devices = Machine.of_hardware(Hardware(1, 8, "H100"), {}).devices()
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


@pytest.mark.parametrize("hardware", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_memory_of_each_rank(model: str, hardware: str) -> None:
    found, of, more = rows(model, hardware), MODELS[model], sum(beside(model))
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
        if name == "tensor_parallel" and model in (QWEN, OSS):  # DeepSpeed would divide the layers, and no more
            expected[name] = sum(layer[2] for layer in of.layers) / n + of.table + of.norm
        if (
            name == "expert_parallel" and "llama" in model
        ):  # there are no experts, so the plan of tensor_parallel is left
            expected[name] = of.part(0, n)
        if name in expected:
            assert row.device_bytes == pytest.approx(expected[name] + more, rel=1e-3), name


@pytest.mark.parametrize("hardware", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_device_map_fills_one_gpu_after_the_other(model: str, hardware: str) -> None:
    """Nine tenths of each, without a batch; the first also keeps room for the largest layer. It stays on a node."""
    of, row = MODELS[model], rows(model, hardware)["device_map"]
    room = int(80e9 * 0.9) - beside(model)[0]
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
    assert row.device_bytes == pytest.approx(max(held[:8]) + sum(beside(model)), rel=2e-3)
    assert ("in host memory" in row.why) == (not fits)
    if fits:
        hidden = paper(model, hardware).rows_per_shard * TOKENS * of.hidden * 2
        assert row.exchanged_bytes == (len(held) - 1) * hidden // len(of.layers)


@pytest.mark.parametrize("hardware", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_what_a_rank_receives_for_a_layer_and_a_shard(model: str, hardware: str) -> None:
    """Parts of a gathered layer for every batch; or hidden states, twice, for every sum over ranks."""
    found, of = rows(model, hardware), MODELS[model]
    rows_of_shard = paper(model, hardware).rows_per_shard
    layers = len(of.layers)
    mean, hidden = sum(layer[2] for layer in of.layers) / layers, rows_of_shard * TOKENS * of.hidden * 2
    sums = dict(zip(("tensor_parallel", "expert_parallel"), of.sums, strict=True))
    for name in ("fsdp", "zero3", *sums):
        others = (found[name].ranks - 1) / found[name].ranks
        received = rows_of_shard / 8 * mean
        if name in sums:
            by_deepspeed = name == "tensor_parallel" and model in (QWEN, OSS)
            received = 2 * hidden * (2 * layers if by_deepspeed else sums[name]) / layers
        assert found[name].exchanged_bytes == pytest.approx(others * received, rel=1e-6), name
    assert found["single"].exchanged_bytes == 0
    assert found["streaming"].exchanged_bytes == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("hardware", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_times_follow_from_the_peaks(model: str, hardware: str) -> None:
    """Half of 989 TFLOP/s, 3.35 TB/s, 450 GB/s between GPUs, 400 GB/s between nodes; statistics take a quarter more."""
    found, of = paper(model, hardware), MODELS[model]
    layers, rows_of_shard = len(of.layers), found.rows_per_shard
    shard = rows_of_shard * TOKENS * (2 * of.active[0] + 4 * layers * of.attention * TOKENS)
    weights = sum(layer[2] for layer in of.layers)
    alone = 1.25 * max(shard / 989e12, rows_of_shard / 8 * weights / 3.35e12) / 0.5
    by_name = {row.partition: row for row in found.rows}
    assert by_name["single"].shard_seconds == pytest.approx(alone, rel=1e-3)
    for name in ("fsdp", "tensor_parallel", "expert_parallel"):
        row, n = by_name[name], by_name[name].ranks
        link = 225e9 if n <= 8 else 200e9
        received = row.exchanged_bytes * layers
        if name == "fsdp":
            gathered = received + rows_of_shard / 8 * (of.table + of.norm) * (n - 1) / n
            expected = math.ceil(found.num_shards / n) * (alone + gathered / link) / found.num_shards
        else:
            divided = of.active[1 if name == "tensor_parallel" else 2] / of.active[0]
            if name == "tensor_parallel" and model in (QWEN, OSS):
                divided = 1.0
            share = divided / 1.25
            expected = alone * (share / n + 1 - share) + received / link
        assert row.shard_seconds == pytest.approx(expected, rel=2e-3), name


FITS = {
    # on 8 GPUs; on 4 x 8 GPUs, with the GPUs of a replica
    QWEN: (
        {"device_map": 4, "fsdp": 8, "zero3": 8, "expert_parallel": 8},
        {"device_map": 4, "fsdp": 8, "zero3": 8, "expert_parallel": 8},
        ("device_map", "device_map"),
    ),
    OSS: (
        {"single": 1, "device_map": 1, "expert_parallel": 8},
        {"single": 1, "device_map": 1, "expert_parallel": 8},
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
        {"device_map": 3, "streaming": 1, "fsdp": 8, "zero3": 8, "tensor_parallel": 8},
        {"device_map": 3, "streaming": 1, "fsdp": 8, "zero3": 8, "tensor_parallel": 8},
        ("device_map", "device_map"),
    ),
}
GPU_GB = {
    # on 8 GPUs: single, device_map, streaming, fsdp, zero3, tensor_parallel, expert_parallel; on 4 x 8 GPUs
    QWEN: ((237, 70, 18, 35, 35, 31, 36), (237, 70, 18, 35, 35, 9, 36)),
    OSS: ((66, 66, 23, 12, 12, 9, 10), (66, 66, 23, 6, 6, 4, 10)),
    LLAMA405: ((488, 69, 25, 75, 75, 62, 62), (488, 69, 25, 75, 29, 62, 16)),
    DEEPSEEK: ((674, 70, 79, 108, 108, 95, 95), (674, 70, 79, 66, 45, 54, 54)),
    LLAMA70: ((142, 71, 6, 23, 23, 18, 18), (142, 71, 6, 23, 23, 18, 5)),
}


@pytest.mark.parametrize("cluster", range(2))
@pytest.mark.parametrize("model", MODELS)
def test_what_fits_and_what_auto_takes(model: str, cluster: int) -> None:
    found = paper(model, list(CLUSTERS)[cluster])
    assert [row.partition for row in found.rows] == list(PARTITIONS)
    assert {row.partition: row.gpus for row in found.rows if row.fits} == FITS[model][cluster]
    assert found.auto == FITS[model][2][cluster]
    assert dict(zip(PARTITIONS, GPU_GB[model][cluster], strict=True)) == {
        row.partition: round(row.device_bytes / 1e9) for row in found.rows
    }
    if found.auto == "device_map":  # with as many GPUs as whole layers take
        assert found.auto_why.endswith(f"; over {FITS[model][cluster]['device_map']} GPUs")
    for row in found.rows:
        assert row.replicas == max(1, CLUSTERS[found.hardware] // row.gpus)


def test_reasons() -> None:
    reasons = {model: {row.partition: row.why for row in paper(model, "8xH100").rows} for model in MODELS}
    assert "8 ranks do not divide 4 heads" in reasons[QWEN]["tensor_parallel"]
    assert "has no plan that spreads experts of LlamaForCausalLM" in reasons[LLAMA70]["expert_parallel"]
    assert "cannot gather them" in reasons[OSS]["fsdp"] and "cannot gather them" in reasons[OSS]["zero3"]
    assert "needs the setting dequantize" in reasons[QWEN]["streaming"]
    assert "transformers cannot unpack these" in reasons[LLAMA405]["streaming"]
    assert "weights are unpacked to bfloat16" in reasons[QWEN]["streaming"]
    assert "Set dequantize, with which it is streamed" in paper(DEEPSEEK, "8xH100").auto_why
    why = {row.partition: row.why for row in paper(DEEPSEEK, "4x8xH100", ranks=32).rows}
    assert "32 ranks do not divide the 18432 rows of model.layers.*.mlp.gate_proj.weight" in why["expert_parallel"]


def test_unpacked_weights() -> None:
    """Twice the bytes; of a model that streams with them, auto takes what it said before."""
    found = paper(DEEPSEEK, "8xH100", dequantize=True)
    assert found.weight_bytes == pytest.approx(2 * found.num_parameters, rel=1e-3) and not found.quantized
    assert found.auto == "streaming"
    row = {row.partition: row for row in found.rows}["streaming"]
    assert row.fits and row.device_bytes == rows(DEEPSEEK, "8xH100")["streaming"].device_bytes
    why = {row.partition: row.why for row in paper(QWEN, "8xH100", dequantize=True).rows}["fsdp"]
    assert "8 ranks do not divide the 512 rows of model.layers.*.self_attn.k_proj.weight" in why


def test_limits_and_ranks() -> None:
    found = {row.partition: row for row in paper(LLAMA70, "8xH100", ranks=4).rows}
    assert found["fsdp"].ranks == 4 and found["fsdp"].replicas == 2
    limited = estimate(str(PUBLISHED / LLAMA70), hardware="8xH100", max_memory={"0": "16GB"})
    assert {row.partition for row in limited.rows if row.fits} == {"device_map", "streaming"}
    assert limited.device_free_bytes == 16e9


def test_a_given_text_is_counted(tiny_llama: Path) -> None:
    settings: dict[str, Any] = {"sequence_length": 32, "max_sequences": 6, "sequences_per_shard": 4, "batch_size": 2}
    given = estimate(str(tiny_llama), corpus="builtin:pydoc", hardware="2xA100", **settings)
    assumed = estimate(str(tiny_llama), hardware="2xA100", **settings)
    assert (given.num_sequences, given.num_tokens, given.num_shards) == (6, 192, 2)
    assert given.rows == assumed.rows and given.corpus and not assumed.corpus


@pytest.mark.parametrize(
    ("text", "hardware"),
    [("8xH100", Hardware(1, 8, "H100")), ("4x8xh200", Hardware(4, 8, "H200")), (" 1xA100 ", Hardware(1, 1, "A100"))],
)
def test_hardware_is_read(text: str, hardware: Hardware) -> None:
    assert parse_hardware(text) == hardware and parse_hardware(str(hardware)) == hardware


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hardware": "H100"}, "expected a number of GPUs and their name"),
        ({"hardware": "0x8xH100"}, "must be at least 1"),
        ({"hardware": "8xH1000"}, "'H1000' is not a GPU whose speed is known here"),
        ({}, "`corpus` is missing"),
        ({"hardware": "8xH100", "teacher": "x"}, "`teacher` has no effect with `hardware`"),
        ({"hardware": "8xH100", "device": "cpu"}, "`device` is cpu"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        estimate(str(PUBLISHED / LLAMA70), **options)


def test_a_configuration_that_does_not_tell_the_size_of_its_weights(tmp_path: Path) -> None:
    text = (PUBLISHED / LLAMA70 / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ModelError, match=r"\(gptq\), and its configuration alone does not tell the size"):
        estimate(str(tmp_path), hardware="8xH100")
    with pytest.raises(ModelError, match="has no weights"):  # which are needed to measure here
        estimate(str(PUBLISHED / LLAMA70), corpus="builtin:pydoc")
