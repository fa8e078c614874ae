"""Resolution of every ``auto`` setting that can change a number, once, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import DTYPES, Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.quantization import quantization_settings
from avss_dist.models.safetensors import TensorInfo, weight_files
from avss_dist.models.stored import floating_dtype, hub_tensors, stored_tensors


def pin(settings: Settings, checkpoint: Checkpoint, config: Any, device: str, *, spec: str | None = None) -> Settings:
    """Return settings in which every ``auto`` that can change a number is resolved.

    Args:
        config: from `text_config`.
        spec: the hub id as the user wrote it, if the weights may not be on this machine.

    Raises:
        ModelError: ``sequence_length`` exceeds the model's maximum, or the weight files have no header.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < settings.sequence_length:
        raise ModelError(
            f"'{checkpoint.name}' reads at most {longest} tokens, not the {settings.sequence_length} of "
            "`sequence_length`.",
            f"Make `sequence_length` {longest} or less.",
        )
    tensors = hub_tensors(spec, checkpoint) if spec and not weight_files(checkpoint.folder) else None
    dtype = str(compute_dtype(checkpoint, config, settings, tensors)).removeprefix("torch.")
    return replace(settings, device=device, dtype=dtype if dtype in DTYPES else settings.dtype)


def compute_dtype(
    checkpoint: Checkpoint, config: Any, settings: Settings, tensors: Iterable[TensorInfo] | None = None
) -> torch.dtype:
    """Return the compute dtype: that of the settings, else of the configuration, else of the weight files.

    Without any of them, as for the published configuration of gpt-oss alone, quantized weights compute in bfloat16.

    Args:
        tensors: tensors of the weight files; None reads their headers if they are needed.
    """
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if named is not None:
        return _known_dtype(named, checkpoint)
    if checkpoint.gguf:
        return torch.float32  # which transformers unpacks it to
    stored = list(stored_tensors(checkpoint) if tensors is None else tensors)
    return floating_dtype(stored) if stored or not quantization_settings(config) else torch.bfloat16


def _known_dtype(named: Any, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that a configuration names.

    Raises:
        ModelError: torch has no dtype of that name.
    """
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(
            f"The config.json of '{checkpoint.name}' names the dtype {named!r}, which torch does not have.",
            "Set `dtype`, or correct config.json.",
        )
    return dtype
