"""Estimates of five published configurations for GPUs that are not here, against numbers of formulas.

The formulas followed from the dimensions of the models, layer by layer, and from how weights are stored (a scale of 4
bytes for 128 x 128 numbers of block FP8, or for a row of FBGEMM's FP8; 17 bytes for 32 numbers of MXFP4). What a rank
takes is written in whole gigabytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.devices import devices_of

import avss_dist.estimation
from avss_dist.commands import estimate
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.estimation import Estimate
from avss_dist.models.checkpoint.locate import locate
from avss_dist.models.checkpoint.size import footprint
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.choose import choose
from avss_dist.partition.estimate import PartitionEstimate
from avss_dist.partition.execution import Execution

pytestmark = pytest.mark.nightly

PUBLISHED = Path(__file__).parents[1] / "support" / "published"
QWEN = "qwen3-235b-a22b-fp8"
OSS = "gpt-oss-120b"
LLAMA405 = "llama-3.1-405b-fp8"
DEEPSEEK = "deepseek-v3"
LLAMA70 = "llama-3.3-70b"
NODES = {1: devices_of("cuda", 80 * 10**9, count=8, host_bytes=2 * 10**12)}
NODES[4] = devices_of("cuda", 80 * 10**9, count=32, nodes=4, host_bytes=2 * 10**12)
"""Eight GPUs of 80 GB on a node, by the number of nodes."""


@cache
def paper(model: str, nodes: int = 1, **options: Any) -> Estimate:
    return estimated(model, nodes, **options)


def estimated(model: str, nodes: int = 1, **options: Any) -> Estimate:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avss_dist.estimation, "devices_here", lambda kind: NODES[nodes])
        patch.setattr(avss_dist.estimation, "pick_device", lambda name: torch.device("cuda"))
        return estimate(str(PUBLISHED / model), **options)


def rows(model: str, nodes: int = 1, **options: Any) -> dict[str, PartitionEstimate]:
    return by_partition(paper(model, nodes, **options))


def by_partition(guess: Estimate) -> dict[str, PartitionEstimate]:
    return {row.partition: row for row in guess.rows}


def fitting(guess: Estimate) -> dict[str, int]:
    """The GPUs of a replica, by the partitions that fit."""
    return {row.partition: row.gpus for row in guess.rows if row.fits}


WEIGHTS = {
    QWEN: 236_445_455_360,
    OSS: 65_248_815_744,
    LLAMA405: 487_229_259_776,
    DEEPSEEK: 673_363_413_344,
    LLAMA70: 141_107_412_992,
}
"""Bytes as stored, which formulas from the dimensions of each layer gave."""


@pytest.mark.parametrize(
    ("model", "billions"), [(QWEN, 235.1), (OSS, 116.8), (LLAMA405, 405.9), (DEEPSEEK, 671.0), (LLAMA70, 70.6)]
)
def test_sizes_are_the_published_ones(model: str, billions: float) -> None:
    """DeepSeek-V3 without its module that predicts further tokens."""
    assert round(paper(model).num_parameters / 1e9, 1) == billions
    assert paper(model).weight_bytes == pytest.approx(WEIGHTS[model], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "experts"),
    [(QWEN, 2_416_508_928), (DEEPSEEK, 11_277_041_664)],
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
@pytest.mark.parametrize("model", WEIGHTS)
def test_what_fits_and_what_auto_takes(model: str, cluster: int) -> None:
    guess = paper(model, list(NODES)[cluster])
    fits, further, automatic = FITS[model]
    if cluster:
        fits = fits | further
    assert list(by_partition(guess)) == list(PARTITIONS)
    assert fitting(guess) == fits
    assert guess.auto == automatic[cluster]
    for row, gigabytes in zip(guess.rows, GPU_GB[model], strict=True):
        assert round(row.device_bytes / 1e9) == gigabytes
    if guess.auto == "device_map":  # with as many GPUs as whole layers take
        assert guess.auto_why.endswith(f"; over {fits['device_map']} GPUs")


def test_reasons() -> None:
    qwen = rows(QWEN, ranks=8)
    oss = rows(OSS, ranks=8)
    assert "8 ranks do not divide 4 heads" in qwen["tensor_parallel"].why
    assert "has no plan that spreads experts of LlamaForCausalLM" in rows(LLAMA70, ranks=8)["expert_parallel"].why
    assert "cannot gather them" in oss["fsdp"].why
    assert "cannot gather them" in oss["zero3"].why
    assert "needs the setting dequantize" in qwen["streaming"].why
    assert "transformers cannot unpack these" in rows(LLAMA405, ranks=8)["streaming"].why
    assert "weights are unpacked to bfloat16" in qwen["streaming"].why
    assert "Set dequantize, with which it is streamed" in paper(DEEPSEEK).auto_why
    spread = rows(DEEPSEEK, 4, ranks=32)["expert_parallel"]
    assert "32 ranks do not divide the 18432 rows of model.layers.*.mlp.gate_proj.weight" in spread.why


def test_unpacked_weights() -> None:
    """Twice the bytes; of a model that streams with them, auto takes what it said before."""
    guess = paper(DEEPSEEK, dequantize=True)
    assert guess.weight_bytes == pytest.approx(2 * guess.num_parameters, rel=1e-3)
    assert not guess.quantized
    assert guess.auto == "streaming"
    row = by_partition(guess)["streaming"]
    assert row.fits
    assert row.device_bytes == rows(DEEPSEEK)["streaming"].device_bytes
    in_parts = rows(QWEN, ranks=8, dequantize=True)["fsdp"]
    assert "8 ranks do not divide the 512 rows of model.layers.*.self_attn.k_proj.weight" in in_parts.why


def test_limits_and_ranks() -> None:
    assert rows(LLAMA70, ranks=4)["fsdp"].ranks == 4
    limited = estimated(LLAMA70, max_memory={"0": "16GB"})
    assert set(fitting(limited)) == {"device_map", "streaming"}
    assert limited.device_bytes == 16e9


def test_a_configuration_that_does_not_tell_the_size_of_its_weights(tmp_path: Path) -> None:
    text = (PUBLISHED / LLAMA70 / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ModelError, match=r"\(gptq\), and its configuration alone does not tell the size"):
        estimate(str(tmp_path))
