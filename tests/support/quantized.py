"""Tiny checkpoints in the formats in which quantized models are published, made of checkpoints in floating point."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = 16  # rows and columns that share a scale; published checkpoints have 128
MXFP4_BLOCK = 32  # numbers that share a scale
_QUANTIZED = re.compile(r"layers\.\d+\..*_proj(_with_mqa)?(\.weight)?$|layers\.\d+\..*experts\..*\.w[123]\.weight$")
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
Named = Iterator[tuple[str, torch.Tensor]]


def rewrite(
    whole: Path, folder: Path, quantize: Callable[[str, torch.Tensor], Named], quantization: dict[str, Any]
) -> Path:
    """Copy a checkpoint, with the projections of its layers replaced and its quantization settings added."""
    shutil.copytree(whole, folder)
    tensors: dict[str, torch.Tensor] = {}
    weights_file = folder / "model.safetensors"
    for name, tensor in load_file(weights_file).items():
        if tensor.dim() > 1 and _QUANTIZED.search(name):
            tensors.update(quantize(name, tensor))
        else:
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights_file)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def block_scales(tensor: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in FP8 and the scale of each of its blocks."""
    rows, columns = tensor.shape
    padded = torch.nn.functional.pad(tensor, (0, -columns % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12).float() / 448
    quantized = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn)
    return quantized.clone(), scale


def block_fp8(whole: Path, folder: Path, block: int = BLOCK, skipped: Sequence[str] = ()) -> Path:
    """Write a checkpoint in block FP8, as DeepSeek and Qwen publish theirs, but for some modules."""

    def quantize(name: str, tensor: torch.Tensor) -> Named:
        if any(name.startswith(module) for module in skipped):
            yield name, tensor
            return
        quantized, scale = block_scales(tensor, block)
        yield name, quantized
        yield f"{name}_scale_inv", scale

    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    return rewrite(whole, folder, quantize, settings | ({"modules_to_not_convert": [*skipped]} if skipped else {}))


def mxfp4(whole: Path, folder: Path) -> Path:
    """Write a checkpoint of a gpt-oss model with its experts in MXFP4."""

    def quantize(name: str, tensor: torch.Tensor) -> Named:
        if tensor.dim() != 3 or not name.endswith("_proj"):
            yield name, tensor
            return
        groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, MXFP4_BLOCK))  # experts, outputs, groups, numbers
        exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-12))) - 2
        scaled = groups / torch.exp2(exponents)[..., None]
        codes = (scaled[..., None] - _FP4).abs().argmin(-1).to(torch.uint8)
        yield f"{name}_blocks", codes[..., 0::2] | (codes[..., 1::2] << 4)
        yield f"{name}_scales", (exponents + 127).to(torch.uint8)

    return rewrite(whole, folder, quantize, {"quant_method": "mxfp4"})


def compressed_tensors(whole: Path, folder: Path, scheme: str) -> Path:
    """Write a checkpoint of compressed-tensors.

    Args:
        scheme: ``int4``, ``int8``, ``fp8-tensor`` or ``fp8-channel``.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    form, weights = {
        "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}),
        "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    }[scheme]
    args = QuantizationArgs(**weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def quantize(name: str, tensor: torch.Tensor) -> Named:
        sizes = {"group": (-1, BLOCK), "channel": (1, -1), "tensor": (1, -1)}
        tensors = tensor.flatten()[None] if weights["strategy"] == "tensor" else tensor
        largest = tensors.unflatten(-1, sizes[weights["strategy"]]).abs().amax(-1)
        scale = largest / {4: 7, 8: 127 if weights["type"] == "int" else 448}[weights["num_bits"]]
        state = {"weight": tensor, "weight_scale": scale.view(1) if weights["strategy"] == "tensor" else scale}
        compressed = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        for part, value in compressed.items():
            yield f"{name.removesuffix('weight')}{part}", value

    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"symmetric": True}}},
        "ignore": ["lm_head"],
    }
    return rewrite(whole, folder, quantize, settings)
