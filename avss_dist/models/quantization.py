"""Quantized checkpoints: what their weights are stored as, and what the model that is loaded computes with.

transformers unpacks some of them without a word where the device has no arithmetic for them. Here that is a setting.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from avss_dist.errors import ModelError, first_line
from avss_dist.models.checkpoints import Checkpoint, read_config
from avss_dist.models.safetensors import DTYPES
from avss_dist.models.stored import stored_tensors
from avss_dist.settings import Settings

# What quantizers raise where a package or a device is not here, or over settings that they cannot read.
_REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
KEYS = ("quantization_config", "compression_config")  # of config.json
_ELSEWHERE = "Compute where there is what it needs"


def quantization_settings(config: Any) -> Any:
    """The quantization settings of a configuration, wherever in it they stand; None if the model is not quantized."""
    whole = getattr(config, "quantization_config", None)
    return whole or getattr(config.get_text_config(), "quantization_config", None)


def quantization_method(config: Any) -> str | None:
    """The name of the quantization, as ``config.json`` has it: fp8, compressed-tensors, ...; None if there is none."""
    settings = quantization_settings(config)
    return _method(settings if isinstance(settings, Mapping) else settings.to_dict()) if settings else None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown")
    return str(getattr(method, "value", method))


def describe_quantization(checkpoint: Checkpoint, settings: Settings) -> str | None:
    """How a checkpoint's weights are quantized, and whether they are unpacked to be computed with.

    Returns:
        ``fp8``, ``fp8, dequantized``, ``gguf Q4_K, dequantized`` (the type of most bytes); None where nothing is.
    """
    if checkpoint.gguf:
        sizes: Counter[str] = Counter()
        for tensor in stored_tensors(checkpoint):
            sizes[tensor.dtype] += tensor.size
        kind = max(sizes, key=lambda name: sizes[name], default="F32")
        return f"gguf {kind}" + ("" if kind in DTYPES else ", dequantized")
    config = read_config(checkpoint.folder, checkpoint.name)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    stored = next((part[key] for part in parts for key in KEYS if isinstance(part.get(key), dict)), None)
    if not stored:
        return None
    return _method(stored) + (", dequantized" if settings.dequantize or stored.get("dequantize") else "")


def with_quantization(checkpoint: Checkpoint, config: Any, settings: Settings, placing: Mapping[str, Any]) -> Any:
    """A configuration by which transformers loads the weights as the settings say: as they are stored, or unpacked.

    Args:
        config: of `text_config`; it is not changed.
        placing: options of ``from_pretrained`` that say where weights go.

    Raises:
        ModelError: the quantization is not known, or needs a package or a device that is not here, or cannot be
            unpacked; or there is nothing to unpack.
    """
    method = quantization_method(config)
    if method is None:
        if settings.dequantize and not checkpoint.gguf:
            raise ModelError(f"'{checkpoint.name}' is not quantized.", "Leave out `dequantize`.")
        return config
    quantizer = _quantizer(checkpoint, config, method)
    how, stored = quantizer.quantization_config, f"'{checkpoint.name}' is quantized ({method})"
    unpacks = hasattr(how, "dequantize")
    if settings.dequantize:
        if not unpacks:
            raise ModelError(f"{stored}, which transformers cannot unpack while it loads.", f"{_ELSEWHERE}.")
        how.dequantize = True
    instead = f"{_ELSEWHERE}, or set `dequantize`." if unpacks else f"{_ELSEWHERE}."
    unpacked = unpacks and how.dequantize
    try:
        quantizer.validate_environment(device_map=placing.get("device_map"), weights_only=True)
    except _REFUSALS as error:
        raise ModelError(f"{stored}: {first_line(error)}", instead) from error
    if unpacks and how.dequantize and not unpacked:
        raise ModelError(f"{stored}, and no device here computes with that.", instead)
    if not settings.dequantize:
        return config
    config = copy.deepcopy(config)
    config.quantization_config = dict(quantization_settings(config)) | {"dequantize": True}
    return config


def unpacked_gguf() -> Any:
    """With it transformers unpacks a .gguf file, whatever other packages are here; None where it always does."""
    import transformers

    return transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None


def comparable(checkpoint: Checkpoint, config: Any, settings: Settings) -> Settings:
    """Settings by which this machine computes with a checkpoint's weights: dequantized, where that can be done.

    Raises:
        ModelError: it cannot compute with them.
    """
    how = quantization_settings(config)
    if how is None:
        return settings
    quantizer = _quantizer(checkpoint, config, quantization_method(config) or "")
    settings = replace(settings, dequantize=hasattr(quantizer.quantization_config, "dequantize"))
    with_quantization(checkpoint, config, settings, {})
    return settings


def quantize_skeleton(checkpoint: Checkpoint, config: Any, model: Any) -> Any:
    """A model on the meta device, with the modules that hold the quantized weights as they are stored.

    Args:
        config: the model's; model: of `skeleton`; its modules are replaced.

    Raises:
        ModelError: the quantization is not known, or needs a package that is not here.
    """
    method = quantization_method(config)
    assert method is not None
    quantizer = _quantizer(checkpoint, config, method)
    with suppress(*_REFUSALS):  # some prepare themselves there; nothing is computed, so no device is needed
        quantizer.validate_environment(device_map=None, weights_only=True)
    if hasattr(quantizer.quantization_config, "dequantize"):
        quantizer.quantization_config.dequantize = False
    try:
        quantizer.preprocess_model(model, dtype=model.dtype, device_map=None, keep_in_fp32_modules=None)
    except _REFUSALS as error:
        raise ModelError(
            f"'{checkpoint.name}' is quantized ({method}), and its modules cannot be built: {first_line(error)}"
        ) from error
    return model


def require_known(checkpoint: Checkpoint, method: str) -> None:
    """Refuse a quantization that transformers does not know: nobody can say what its settings and weights mean.

    Raises:
        ModelError: it is one.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method not in AUTO_QUANTIZER_MAPPING and not method.startswith("bitsandbytes"):
        raise ModelError(
            f"'{checkpoint.name}' is quantized by '{method}', which transformers does not know: its weights would be "
            "read as what they are not.",
            "Is the config.json right? A newer method needs a newer transformers: pip install -U transformers.",
        )


def _quantizer(checkpoint: Checkpoint, config: Any, method: str) -> Any:
    """transformers' quantizer of a configuration."""
    from transformers.quantizers.auto import AutoHfQuantizer

    require_known(checkpoint, method)
    try:
        return AutoHfQuantizer.from_config(copy.deepcopy(quantization_settings(config)), pre_quantized=True)
    except ImportError as error:
        raise ModelError(
            f"'{checkpoint.name}' is quantized ({method}), which needs a package that is not here: {first_line(error)}"
        ) from error
    except _REFUSALS as error:
        raise ModelError(
            f"The quantization settings of '{checkpoint.name}' ({method}) cannot be read: {first_line(error)}"
        ) from error
