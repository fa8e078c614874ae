"""Number formats, bit for bit: against the storage of the library that defines each."""

from __future__ import annotations

import importlib.util
from importlib.resources import files

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from avss_dist.core.errors import ConfigError
from avss_dist.core.extras import install_hint
from avss_dist.models.change.number_formats import FORMATS, NumberFormat, fitting, number_format

COMPRESSED = [known for known in FORMATS.values() if known.module == "compressed_tensors"]
GGUF = [known for known in FORMATS.values() if known.module == "gguf"]


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Numbers of many sizes, with a group of zeros and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 512, generator=generator) * torch.randn(24, 1, generator=generator).exp()
    weight[3, :256] = 0
    weight[5] = 0
    return weight


@pytest.mark.parametrize("known", FORMATS.values(), ids=FORMATS)
def test_rounded_weights_are_float32_of_the_same_shape_and_their_own_rounding(
    known: NumberFormat, weight: torch.Tensor
) -> None:
    before = weight.clone()
    rounded = known.round(weight.bfloat16())
    assert torch.equal(weight, before)
    assert rounded.dtype == torch.float32
    assert rounded.shape == weight.shape
    assert not rounded[5].any()
    assert not rounded[3, :256].any()
    error = (rounded - weight).norm() / weight.norm()
    assert error < (1 if known.element_bits < 3 else 0.3 if known.element_bits < 4 else 0.2)
    assert error > 1e-5


def stored_by_compressed_tensors(known: NumberFormat, weight: torch.Tensor) -> torch.Tensor:
    """The weight as the library's own compressor packs it, and as its numbers and scales unpack, in float32."""
    dtypes = {name: getattr(torch, value) for name, value in known.options.items() if name.endswith("_dtype")}
    strategy = "channel" if known.group is None else "tensor_group" if known.tensor_bits else "group"
    args = QuantizationArgs(strategy=strategy, group_size=known.group, **{**known.options, **dtypes})
    rows = weight if known.group is None else weight.reshape(len(weight), -1, known.group)
    whole = generate_gparam(weight.min(), weight.max()) if known.tensor_bits else None
    scale, zero_point = calculate_qparams(
        rows.amin(-1, keepdim=known.group is None), rows.amax(-1, keepdim=known.group is None), args, whole
    )
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    state |= {} if whole is None else {"weight_global_scale": whole}
    kind = known.name.split("-")[0]
    packer = {"int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
    name = packer.get(kind, {"int8": "int-quantized", "fp8": "float-quantized"}.get(kind, ""))
    packed = BaseCompressor.get_value_from_registry(name).compress(
        state, QuantizationScheme(targets=["Linear"], weights=args)
    )
    if kind == "int4":
        codes = unpack_from_int32(packed["weight_packed"], 4, weight.shape).float()
    elif kind in ("mxfp4", "nvfp4"):
        codes = unpack_fp4_from_uint8(packed["weight_packed"], *weight.shape).float()
    else:
        assert packed["weight"].element_size() == 1
        codes = packed["weight"].float()
    stored = packed["weight_scale"]
    scales = torch.exp2(stored.float() - 127) if kind == "mxfp4" else stored.float()
    scales = scales if whole is None else scales / whole
    groups = codes.reshape(*scales.shape, -1) if known.group else codes
    return (groups * (scales[..., None] if known.group else scales)).reshape(weight.shape)


@pytest.mark.parametrize("known", [f for f in COMPRESSED if f.element_bits >= 4], ids=lambda known: known.name)
def test_numbers_are_those_of_the_packed_storage_of_compressed_tensors(
    known: NumberFormat, weight: torch.Tensor
) -> None:
    """It has no storage for integers of fewer bits."""
    assert torch.equal(known.round(weight), stored_by_compressed_tensors(known, weight))


@pytest.mark.parametrize("known", GGUF, ids=lambda known: known.name)
def test_numbers_and_bits_are_those_of_the_storage_of_gguf(known: NumberFormat, weight: torch.Tensor) -> None:
    kind = GGMLQuantizationType[known.type]
    stored = quantize(weight.numpy(), kind)
    assert np.array_equal(known.round(weight).numpy(), dequantize(stored, kind))
    block, size = GGML_QUANT_SIZES[kind]
    assert known.group == block
    assert known.bits(24, 512) == 8 * size / block == 8 * stored.nbytes / weight.numel()


def test_scales_count_as_bits() -> None:
    bits = {name: known.bits(1000, 512) for name, known in FORMATS.items()}
    assert bits["int4-g128"] == 4 + 16 / 128
    assert bits["int8"] == bits["fp8"] == 8 + 16 / 512
    assert bits["mxfp4"] == 4.25
    assert bits["nvfp4"] == 4.5 + 32 / 512_000
    assert bits["q4_0"] == 4.5
    assert bits["q5_1"] == 6
    assert bits["tq1_0"] == 1.6875


def test_the_page_lists_every_format() -> None:
    page = files("avss_dist").joinpath("docs/reference/plans.md").read_text(encoding="utf-8")
    table = page.partition("| format | bits |")[2].partition("\n\n")[0]
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    listed = {name.strip("| `"): (bits, group) for name, bits, group, _ in cells}
    for name, known in FORMATS.items():
        scales = " + 16 / inputs" if known.group is None else ""
        bits = known.element_bits + (known.scale_bits / known.group if known.group else 0)
        assert listed.pop(name) == (f"{bits:g}{scales}", str(known.group or "all"))
    assert not listed


def test_shapes_are_refused_with_the_reason() -> None:
    assert FORMATS["int4-g128"].obstacle(64, 576) == "576 inputs are not a multiple of 128, which share a scale"
    assert FORMATS["int4"].obstacle(64, 577) is None
    able = fitting([(64, 576), (576, 1536)])
    assert "int4-g64" in able
    assert "q4_0" in able
    assert not {"int4-g128", "tq2_0"} & {*able}


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    assert number_format("Q4_0") is FORMATS["q4_0"]
    with pytest.raises(ConfigError, match="Unknown number format 'q4_k'") as caught:
        number_format("q4_k")
    assert "Did you mean 'q4_" in str(caught.value.hint)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avss_dist.core.extras.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="nvfp4 needs compressed_tensors, which is not installed") as caught:
        FORMATS["nvfp4"].round(torch.zeros(16, 16))
    assert caught.value.hint == install_hint("compressed_tensors")
    assert importlib.util.find_spec("compressed_tensors") is not None
