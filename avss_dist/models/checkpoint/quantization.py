"""Quantized checkpoints: the stored form of their weights, and the form that the loaded model computes with.

transformers silently unpacks some of them if the device has no arithmetic for them. Here that is a setting.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from avss_dist.core.errors import ModelError, first_line
from avss_dist.core.extras import pip_command
from avss_dist.core.settings import Settings
from avss_dist.core.values import JsonObject, NewObject
from avss_dist.models.checkpoint.complete import require_scales
from avss_dist.models.checkpoint.locate import Checkpoint, read_config, stored_tensors
from avss_dist.models.checkpoint.safetensors import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.quantizers import HfQuantizer

_REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
"""Errors that quantizers raise where a package or a device is not here, or over settings that they cannot read."""
_SCALED = {"fp8", "mxfp8", "mxfp4", "compressed-tensors"}
"""Methods whose weights have scales beside them, by name."""
KEYS = ("quantization_config", "compression_config")
"""Settings of config.json with the quantization."""
_INTEGRATIONS = "transformers.integrations."
_PACKED = {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
"""Dtypes of stored weights that are quantized."""
MXFP4_GROUP = 32
"""Number of weights of MXFP4 that share an exponent."""
MXFP4_GROUP_BYTES = 17
"""Bytes of such a group: 32 numbers of 4 bits and an exponent of 8 bits."""
FLOAT32_BYTES = 4
_ELSEWHERE = "Use a machine that has what it needs"


def quantization_settings(config: PreTrainedConfig) -> NewObject:
    """Return the quantization settings of a configuration or of its text part by name, empty if it has none."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        settings = getattr(config.get_text_config(), "quantization_config", None)
    if not settings:
        return {}
    if isinstance(settings, dict):
        return settings
    return settings.to_dict()


def quantization_method(config: PreTrainedConfig) -> str | None:
    """Return the ``quant_method`` of a configuration, such as fp8, or None if it is not quantized."""
    settings = quantization_settings(config)
    if not settings:
        return None
    return _method(settings)


def _method(settings: JsonObject) -> str:
    method = settings.get("quant_method")
    if method:
        return str(getattr(method, "value", method))
    if "load_in_4bit" in settings:
        return "bitsandbytes"
    return "unknown"


def describe_quantization(checkpoint: Checkpoint, settings: Settings) -> str | None:
    """Return the quantization of a checkpoint's weights, and whether they are unpacked before they compute.

    Returns:
        ``fp8``, ``fp8, dequantized``, ``gguf Q4_K, dequantized`` (the type of most bytes), or None if not quantized.
    """
    if checkpoint.gguf:
        sizes: Counter[str] = Counter()
        for tensor in stored_tensors(checkpoint):
            sizes[tensor.dtype] += tensor.size
        kind = max(sizes, key=lambda name: sizes[name], default="F32")
        if kind in DTYPES:
            return f"gguf {kind}"
        return f"gguf {kind}, dequantized"
    stored = _stored_settings(read_config(checkpoint.folder, checkpoint.name))
    if not stored:
        return None
    method = _method(stored)
    if settings.dequantize or stored.get("dequantize"):
        return f"{method}, dequantized"
    return method


def _stored_settings(config: JsonObject) -> JsonObject:
    """Return the quantization settings of a ``config.json`` or of a part of it, empty if it has none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in KEYS:
            if isinstance(part.get(key), dict):
                return part[key]
    return {}


def describe_computing(model: PreTrainedModel) -> str | None:
    """Return the modules of an open model that compute with quantized weights, and the kernels of the hub in use.

    Returns:
        ``FP8Linear x 252 of transformers.integrations.finegrained_fp8; kernels: finegrained-fp8``, or None if weights
        are not quantized any more.
    """
    if quantization_method(model.config) is None:
        return None
    kinds: Counter[tuple[str, str]] = Counter()
    for module in model.modules():
        if _computes_quantized(module):
            kind = type(module)
            kinds[kind.__name__, kind.__module__] += 1
    if not kinds:
        return None
    parts = [f"{name} x {count} of {origin}" for (name, origin), count in sorted(kinds.items())]
    description = ", ".join(parts)
    kernels = _hub_kernels()
    if kernels:
        description += f"; kernels: {', '.join(kernels)}"
    return description


def _hub_kernels() -> list[str]:
    """Return the names of the kernels of the hub that transformers has loaded."""
    try:
        from transformers.integrations import hub_kernels

        mapping = hub_kernels._KERNEL_MODULE_MAPPING
    except (ImportError, AttributeError):  # another version of transformers
        return []
    return sorted(name for name, module in mapping.items() if module is not None)


def _computes_quantized(module: torch.nn.Module) -> bool:
    """Whether a module has quantized weights, or is one of transformers' that may keep them in a form of their own."""
    if type(module).__module__.startswith(_INTEGRATIONS):
        return True
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return any("weight" in name and tensor.dtype in _PACKED for name, tensor in tensors)


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are quantized, because rounding them again would say little of the original.

    Raises:
        ModelError: the files have quantized weights.
    """
    stored = describe_quantization(checkpoint, Settings())
    if stored and stored.removeprefix("gguf ") not in DTYPES:
        raise ModelError(
            f"'{checkpoint.name}' is quantized already ({stored}): its weights would be rounded a second time.",
            "Name the checkpoint that it was made of, in bfloat16, float16 or float32.",
        )


def with_quantization(
    checkpoint: Checkpoint, config: PreTrainedConfig, settings: Settings, placing: Mapping[str, object]
) -> PreTrainedConfig:
    """Return a configuration with which transformers loads the weights as stored, or unpacked if `dequantize` is set.

    Args:
        config: from `text_config`; it is not changed.
        placing: options of ``from_pretrained`` that place weights on devices.

    Raises:
        ModelError: the quantization is unknown, needs a package or a device that is missing, or cannot be unpacked;
            or `dequantize` is set and the checkpoint is not quantized, or lacks scales.
    """
    if quantization_method(config) is None:
        if settings.dequantize and not checkpoint.gguf:
            raise ModelError(f"'{checkpoint.name}' is not quantized.", "Leave out `dequantize`.")
        return config
    ready_quantizer(checkpoint, config, settings, placing)
    if not settings.dequantize:
        return config
    config = copy.deepcopy(config)
    config.quantization_config = quantization_settings(config) | {"dequantize": True}
    return config


def ready_quantizer(
    checkpoint: Checkpoint, config: PreTrainedConfig, settings: Settings, placing: Mapping[str, object] = {}
) -> HfQuantizer:
    """Return transformers' quantizer of a quantized checkpoint, once it has found all that it needs here.

    Args: see `with_quantization`.

    Raises:
        ModelError: see `with_quantization`.
    """
    method = quantization_method(config)
    quantizer = _quantizer(checkpoint, config)
    stored = f"'{checkpoint.name}' is quantized ({method})"
    quantization: Any = quantizer.quantization_config
    unpacks = hasattr(quantization, "dequantize")
    if settings.dequantize:
        if not unpacks:
            raise ModelError(f"{stored}, which transformers cannot unpack while it loads.", f"{_ELSEWHERE}.")
        quantization.dequantize = True
        if method in _SCALED:
            require_scales(checkpoint)
        if method == "fp8":
            unpack_partial_blocks()
    hint = f"{_ELSEWHERE}."
    if unpacks:
        hint = f"{_ELSEWHERE}, or set `dequantize`."
    is_asked_to_unpack = unpacks and quantization.dequantize
    try:
        quantizer.validate_environment(device_map=placing.get("device_map"), weights_only=True)
    except _REFUSALS as error:
        raise ModelError(f"{stored}: {first_line(error)}", hint) from error
    # transformers has changed the settings where no device computes with quantized weights.
    if unpacks and quantization.dequantize and not is_asked_to_unpack:
        raise ModelError(f"{stored}, and no device here computes with that.", hint)
    return quantizer


def unpack_partial_blocks() -> None:
    """Have transformers unpack block FP8 whose last rows or columns are less than a block, as in DeepSeek-V3.

    transformers 5.24 divides a matrix evenly among its scales. So it refuses some of these matrices, and computes
    others with the scales of other blocks.
    """
    try:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        operation: Any = Fp8Dequantize
        whole = operation._dequantize_one
    except (ImportError, AttributeError):  # another version
        return
    if getattr(whole, "unpacks_partial_blocks", False):
        return

    def unpack(self: Any, quantized: torch.Tensor, scales: torch.Tensor, *args: object, **kwargs: object) -> object:
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        if not block or scales.dim() < 2 or not quantized.is_floating_point():
            return whole(self, quantized, scales, *args, **kwargs)
        rows, columns = quantized.shape[-2:]
        block_rows, block_columns = block
        padded_rows = scales.shape[-2] * block_rows
        padded_columns = scales.shape[-1] * block_columns
        missing_rows = padded_rows - rows
        missing_columns = padded_columns - columns
        is_whole = missing_rows == 0 and missing_columns == 0
        if is_whole or missing_rows not in range(block_rows) or missing_columns not in range(block_columns):
            return whole(self, quantized, scales, *args, **kwargs)
        filled = quantized.new_zeros(*quantized.shape[:-2], padded_rows, padded_columns)
        filled[..., :rows, :columns] = quantized
        unpacked = whole(self, filled, scales, *args, **kwargs)
        return unpacked[..., :rows, :columns].contiguous()

    unpack.unpacks_partial_blocks = True  # type: ignore[attr-defined]
    operation._dequantize_one = unpack


def unpacking_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of memory that unpacking a weight takes for a while, beside the weight.

    Experts are unpacked and then joined, so there are two copies, and the stored bytes or indices of as many numbers.
    Of another matrix there are two copies in float32.

    Args:
        parameter: the unpacked weight, which may be on the meta device. Fused experts have three dimensions.
    """
    numbers = parameter.numel()
    matrix = numbers
    if parameter.dim() > 2:
        matrix = numbers // len(parameter)
    joined = numbers * (parameter.element_size() + 2)
    return max(joined, 2 * matrix * FLOAT32_BYTES)


def quantize_skeleton(checkpoint: Checkpoint, config: PreTrainedConfig, model: PreTrainedModel) -> PreTrainedModel:
    """Replace the modules of a skeleton by those that hold quantized weights as stored, and return it.

    Args:
        config: the model's configuration.
        model: a model on the meta device, from `skeleton`.

    Raises:
        ModelError: the quantization is unknown, or needs a package that is not installed.
    """
    quantizer = _quantizer(checkpoint, config)
    with suppress(*_REFUSALS):  # Some prepare themselves there. Nothing is computed, so that no device is needed.
        quantizer.validate_environment(device_map=None, weights_only=True)
    if hasattr(quantizer.quantization_config, "dequantize"):
        quantizer.quantization_config.dequantize = False
    try:
        quantizer.preprocess_model(model, dtype=model.dtype, device_map=None, keep_in_fp32_modules=None)
    except _REFUSALS as error:
        raise ModelError(
            f"'{checkpoint.name}' is quantized ({quantization_method(config)}), and its modules cannot be built: "
            f"{first_line(error)}"
        ) from error
    return model


def can_unpack(checkpoint: Checkpoint, config: PreTrainedConfig) -> bool:
    """Whether transformers can unpack the weights of a quantized checkpoint while it loads them."""
    try:
        quantizer = _quantizer(checkpoint, config)
    except ModelError:  # Opening the model says so.
        return True
    return hasattr(quantizer.quantization_config, "dequantize")


def packed(checkpoint: Checkpoint, config: PreTrainedConfig, model: PreTrainedModel) -> PreTrainedModel | None:
    """Replace the parameters of a skeleton that stay quantized by bytes as many as their numbers and scales have.

    Args:
        config: the model's configuration.
        model: a model on the meta device, from `skeleton`. It is changed.

    Returns:
        The model; None if the layout of its quantization is not known here.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    method = quantization_method(config)
    if method not in ("fp8", "fbgemm_fp8", "mxfp4"):
        return None
    skipped = _quantizer(checkpoint, config).get_modules_to_not_convert(
        model,
        quantization_settings(config).get("modules_to_not_convert"),
        getattr(model, "_keep_in_fp32_modules", None),
    )
    for path, module in model.named_modules():
        if not should_convert_module(path, skipped):
            continue
        is_linear = isinstance(module, torch.nn.Linear) and method != "mxfp4"
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            rows, columns = parameter.shape[-2:] if parameter.dim() > 1 else (0, 0)
            shape: tuple[int, ...]
            if parameter.dim() == 3:  # fused experts
                shape = (len(parameter), _packed_bytes(config, method, rows, columns))
            elif is_linear and leaf == "weight":
                shape = (_packed_bytes(config, method, rows, columns),)
            else:
                continue
            stored = parameter.new_empty(shape, dtype=torch.uint8)
            module._parameters[leaf] = torch.nn.Parameter(stored, requires_grad=False)
    return model


def _packed_bytes(config: PreTrainedConfig, method: str, rows: int, columns: int) -> int:
    """Return the bytes of the numbers and scales of a quantized matrix, by a method that `packed` knows."""
    if method == "mxfp4":
        return rows * columns * MXFP4_GROUP_BYTES // MXFP4_GROUP
    block = scale_block(config)
    if method == "fbgemm_fp8":
        scales = rows
    elif block is None:
        scales = 1
    else:
        scales = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
    return rows * columns + scales * FLOAT32_BYTES


def scale_block(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return the rows and columns of a weight that share a scale in block FP8, or None for other weights."""
    block = quantization_settings(config).get("weight_block_size")
    if not block:
        return None
    rows, columns = block
    return rows, columns


def require_known_method(checkpoint: Checkpoint, method: str) -> None:
    """Refuse a quantization method that transformers does not know.

    Raises:
        ModelError: transformers has no quantizer for the method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method not in AUTO_QUANTIZER_MAPPING and not method.startswith("bitsandbytes"):
        raise ModelError(
            f"'{checkpoint.name}' is quantized by '{method}', which transformers does not know and "
            "would load as unquantized weights.",
            "Is the config.json right? A newer method needs a newer transformers: "
            f"{pip_command()} install -U transformers.",
        )


def _quantizer(checkpoint: Checkpoint, config: PreTrainedConfig) -> HfQuantizer:
    """Return transformers' quantizer for a configuration."""
    from transformers.quantizers.auto import AutoHfQuantizer

    method = quantization_method(config) or ""
    require_known_method(checkpoint, method)
    try:
        return AutoHfQuantizer.from_config(copy.deepcopy(quantization_settings(config)), pre_quantized=True)
    except ImportError as error:
        raise ModelError(
            f"'{checkpoint.name}' is quantized ({method}), which needs a package that is not installed: "
            f"{first_line(error)}"
        ) from error
    except _REFUSALS as error:
        raise ModelError(
            f"The quantization settings of '{checkpoint.name}' ({method}) cannot be read: {first_line(error)}"
        ) from error
