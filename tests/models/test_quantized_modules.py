"""What a run records of the modules that compute with quantized weights; on a CPU, none of these forms computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import tiny_model
from support.quantized import block_fp8, compressed_tensors

from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load, skeleton, text_config
from avss_dist.models.quantization import describe_computing, quantize_skeleton

FP8 = "of transformers.integrations.finegrained_fp8"


def int4(whole: Path, folder: Path) -> Path:
    return compressed_tensors(whole, folder, "int4")


@pytest.mark.parametrize(
    ("family", "quantize", "expected"),
    [
        ("llama", block_fp8, f"FP8Linear x 21 {FP8}"),
        ("qwen3_moe", block_fp8, f"FP8Experts x 3 {FP8}, FP8Linear x 12 {FP8}"),
        ("llama", int4, "Linear x 21 of torch.nn.modules.linear"),
    ],
)
def test_modules_are_named_with_where_they_come_from(
    family: str, quantize: Callable[[Path, Path], Path], expected: str, tmp_path: Path
) -> None:
    """The modules that transformers builds for the stored weights, and none once weights are unpacked."""
    tiny_model("causal", family).save_pretrained(tmp_path / "whole")
    checkpoint = resolve(str(quantize(tmp_path / "whole", tmp_path / "quantized")))
    config = text_config(checkpoint)
    model = skeleton(config, Settings(), torch.float32)
    assert describe_computing(model) is None
    assert describe_computing(quantize_skeleton(checkpoint, config, model)) == expected
    unpacked = load(checkpoint, Settings(device="cpu", dequantize=True), torch.device("cpu"))
    assert describe_computing(unpacked.model) is None
