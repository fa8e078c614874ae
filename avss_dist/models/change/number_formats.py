"""Number formats that the weights of linear maps are rounded to: a registry, with the numerics of the defining library.

A weight is a matrix [outputs, inputs]. Numbers share a scale within a group of neighbouring inputs of one output, or
within all inputs of one output. ``int*``, ``fp8``, ``mxfp4`` and ``nvfp4`` are rounded by compressed-tensors, with
scales from the extremes of each group. The types of llama.cpp are rounded by ``gguf``: those that this library can
quantize.

The libraries are imported when something is rounded, so that the command line lists the formats without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avss_dist.core.errors import require_known
from avss_dist.core.extras import require_package

if TYPE_CHECKING:
    import torch

SCALE_BITS = 16
"""Number of bits of a scale that is stored in the dtype of the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A number format of weights.

    Attributes:
        name: name in options and tables.
        summary: description in a few words.
        element_bits: bits of a number.
        group: number of neighbouring inputs that share a scale; None for all inputs of an output.
        scale_bits: bits that each group has beside its numbers.
        tensor_bits: bits that each weight has beside its groups.
        options: fields of compressed-tensors' ``QuantizationArgs``, with dtypes by their names in torch. Formats are
            symmetric about zero.
        type: name in ``gguf.GGMLQuantizationType`` of a type of llama.cpp, which ``gguf`` rounds to on the CPU; empty
            for formats of compressed-tensors.
    """

    name: str
    summary: str
    element_bits: float
    group: int | None
    scale_bits: int
    tensor_bits: int = 0

    options: Mapping[str, Any] = field(default_factory=dict)
    type: str = ""

    @property
    def module(self) -> str:
        """Module of the library that rounds, which has to be installed."""
        return "gguf" if self.type else "compressed_tensors"

    @property
    def strategy(self) -> str:
        """Name, in compressed-tensors, of the numbers that share a scale."""
        if self.group is None:
            return "channel"
        if self.tensor_bits:
            return "tensor_group"
        return "group"

    def bits(self, outputs: int, inputs: int) -> float:
        """Return the bits per weight of a map, with all scales."""
        numbers_of_scale = self.group or inputs
        return self.element_bits + self.scale_bits / numbers_of_scale + self.tensor_bits / (outputs * inputs)

    def obstacle(self, outputs: int, inputs: int) -> str | None:
        """Return why the format cannot take a weight of this shape, or None if it can."""
        if self.group and inputs % self.group:
            return f"{inputs} inputs are not a multiple of {self.group}, which share a scale"
        return None

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight after rounding, in float32: the nearest numbers of the format, times their scales.

        Args:
            weight: [outputs, inputs], of a shape without `obstacle`.
        """
        import torch

        self.require_package()
        weight = weight.detach().float().contiguous()
        if self.type:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize, quantize

            kind = GGMLQuantizationType[self.type]
            packed = quantize(weight.cpu().numpy(), kind)
            return torch.from_numpy(dequantize(packed, kind)).to(weight.device)
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        options = dict(self.options)
        for name, value in self.options.items():
            if name.endswith("_dtype"):
                options[name] = getattr(torch, value)
        args = QuantizationArgs(strategy=self.strategy, group_size=self.group, **options)
        if self.group is None:
            lowest, highest = torch.aminmax(weight, dim=-1, keepdim=True)
        else:
            lowest, highest = torch.aminmax(weight.unflatten(-1, (-1, self.group)), dim=-1)
        global_scale = None
        if self.tensor_bits:
            global_scale = generate_gparam(*torch.aminmax(weight))
        scale, zero_point = calculate_qparams(lowest, highest, args, global_scale=global_scale)
        return fake_quantize(weight, scale, zero_point, args, global_scale=global_scale)

    def require_package(self) -> None:
        """Refuse a format whose library is not installed.

        Raises:
            ConfigError: the hint is the command that installs it.
        """
        require_package(self.module, f"The number format {self.name}")


def _integers(bits: int, group: int | None) -> NumberFormat:
    name = f"int{bits}"
    sharing = "output channel"
    if group is not None:
        name = f"int{bits}-g{group}"
        sharing = f"group of {group} inputs"
    return NumberFormat(
        name=name,
        summary=f"integers of {bits} bits, a scale for each {sharing}",
        element_bits=bits,
        group=group,
        scale_bits=SCALE_BITS,
        options={"num_bits": bits, "type": "int"},
    )


def _gguf(kind: str, bits: float, group: int, scale_bits: int, summary: str, name: str = "") -> NumberFormat:
    return NumberFormat(
        name=name or kind.lower(),
        summary=f"{kind} of llama.cpp: {summary}",
        element_bits=bits,
        group=group,
        scale_bits=scale_bits,
        type=kind,
    )


_FORMATS = (
    _integers(8, None),
    _integers(8, 128),
    _integers(4, None),
    _integers(4, 128),
    _integers(4, 64),
    _integers(4, 32),
    _integers(3, 64),
    _integers(2, 64),
    NumberFormat(
        name="fp8",
        summary="FP8 E4M3, a scale for each output channel",
        element_bits=8,
        group=None,
        scale_bits=SCALE_BITS,
        options={"num_bits": 8, "type": "float"},
    ),
    NumberFormat(
        name="mxfp4",
        summary="FP4 E2M1, a power of two (E8M0) for each group of 32 inputs",
        element_bits=4,
        group=32,
        scale_bits=8,
        options={"num_bits": 4, "type": "float", "scale_dtype": "uint8", "zp_dtype": "uint8"},
    ),
    NumberFormat(
        name="nvfp4",
        summary="FP4 E2M1, a scale in FP8 for each group of 16 inputs and one for each map",
        element_bits=4,
        group=16,
        scale_bits=8,
        tensor_bits=32,
        options={
            "num_bits": 4,
            "type": "float",
            "scale_dtype": "float8_e4m3fn",
            "zp_dtype": "float8_e4m3fn",
        },
    ),
    _gguf("BF16", 16, 1, 0, "bfloat16"),
    _gguf("Q8_0", 8, 32, 16, "integers of 8 bits, a scale for each 32"),
    _gguf("Q5_1", 5, 32, 32, "integers of 5 bits, a scale and a minimum for each 32"),
    _gguf("Q5_0", 5, 32, 16, "integers of 5 bits, a scale for each 32"),
    _gguf("Q4_1", 4, 32, 32, "integers of 4 bits, a scale and a minimum for each 32"),
    _gguf("Q4_0", 4, 32, 16, "integers of 4 bits, a scale for each 32"),
    _gguf("MXFP4", 4, 32, 8, "FP4 E2M1, a power of two for each 32, rounded down", "gguf-mxfp4"),
    _gguf("TQ2_0", 2, 256, 16, "-1, 0 or 1 in 2 bits, a scale for each 256"),
    _gguf("TQ1_0", 1.625, 256, 16, "-1, 0 or 1 in 1.6 bits, a scale for each 256"),
)
FORMATS: Mapping[str, NumberFormat] = {target.name: target for target in _FORMATS}
"""Number formats by name."""


def number_format(name: str) -> NumberFormat:
    """Return the number format of a name, upper or lower case.

    Raises:
        ConfigError: there is no such format. The hint names the nearest one.
    """
    return FORMATS[require_known("number format", name.lower(), FORMATS)]


def format_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the full names of number formats, each once."""
    return tuple(dict.fromkeys(number_format(name).name for name in names))


def fitting(shapes: Iterable[tuple[int, int]]) -> list[str]:
    """Return the names of the formats that can take weights of all shapes (outputs, inputs)."""
    every = set(shapes)
    return [name for name, target in FORMATS.items() if not any(target.obstacle(*shape) for shape in every)]
