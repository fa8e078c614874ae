"""How large a checkpoint is and what a forward pass of it costs, told before any weight is read.

Names, shapes and ties of the parameters follow from the configuration alone: the model is built on the meta device. The
headers of the weight files add what is stored. Of a hub checkpoint only these are fetched.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avss_dist.checkpoints import WEIGHTS, Checkpoint, hub_mistakes
from avss_dist.config import Settings
from avss_dist.errors import ModelError
from avss_dist.models import hub_config, skeleton, text_config, without_head
from avss_dist.structure import layer_lists

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of the headers, where they compute
_SCORES = {"eager": 2}  # copies of the attention scores that exist at once, beside one in float32; others have none
_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MOST_HEADER_BYTES = 100_000_000  # what the safetensors library takes at most


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a checkpoint takes in files, in memory and in arithmetic. All bytes are in the compute dtype, but those stored.

    Attributes:
        num_parameters: of the model as it is loaded; tied ones count once.
        stored_bytes: all tensors of the weight files.
        weight_bytes: the whole model with its language-model head, as the partition ``single`` holds it.
        layer_bytes: each transformer layer, in order.
        other_bytes: what is no layer and runs: embeddings, norms, but no untied language-model head.
        num_layers, hidden_size: layers, and units of the residual stream.
        dtype: the compute dtype.
        attention: its implementation.
        num_heads, attention_width: attention heads, and units that the queries and the values of all heads have.
        attention_layers: layers that compare every token with every other.
        matmul_parameters: parameters of the layers that multiply a token: of experts, as many as are chosen for it.
        mlp_width: units of an MLP's intermediate results that exist at once.
    """

    num_parameters: int
    stored_bytes: int
    weight_bytes: int
    layer_bytes: tuple[int, ...]
    other_bytes: int
    num_layers: int
    hidden_size: int
    dtype: str
    attention: str
    num_heads: int
    attention_width: int
    attention_layers: int
    matmul_parameters: int
    mlp_width: int

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation."""
        return getattr(torch, self.dtype).itemsize

    def hidden_bytes(self, rows: int, tokens: int) -> int:
        """Bytes of the hidden states between two layers."""
        return rows * tokens * self.hidden_size * self.element_bytes

    def activation_bytes(self, rows: int, tokens: int) -> int:
        """Bytes that one forward pass over one batch takes at its peak, with what observation keeps."""
        kept = 4 * self.hidden_size  # the layer's input, its normed copy, the sublayer's output, the update
        scores = 0
        if copies := _SCORES.get(self.attention):
            scores = rows * self.num_heads * tokens * tokens * (copies * self.element_bytes + 4)
        attention = rows * tokens * (kept + 6 * self.attention_width) * self.element_bytes + scores
        return max(attention, rows * tokens * (kept + self.mlp_width) * self.element_bytes)

    def forward_flops(self, rows: int, tokens: int) -> int:
        """Floating-point operations of the layers in one forward pass: two for each multiplication and addition."""
        attention = 4 * self.attention_layers * self.attention_width * tokens
        return rows * tokens * (2 * self.matmul_parameters + attention)


def footprint(checkpoint: Checkpoint | str, settings: Settings) -> Footprint:
    """Size a checkpoint from its configuration and the headers of its weight files; nothing else is read.

    Args:
        checkpoint: one that was resolved, or what a user names: hub id, folder, ``.gguf`` file.
        settings: the compute dtype, the attention, the layer list.

    Raises:
        ModelError: there is no such checkpoint, or it cannot be read or built.
    """
    config, tensors = _describe(checkpoint, settings)
    dtype = _compute_dtype(config, settings, tensors)
    model = skeleton(config, settings, dtype)
    text = config.get_text_config()
    layers = next(iter(layer_lists(without_head(model), getattr(text, "num_hidden_layers", None), settings.layers).values()))
    stored = sum(tensor.size for tensor in tensors)
    whole = _sizes(model)
    # A quantized checkpoint keeps its own formats in memory; they are spread over the model as its numbers are.
    scale = stored / whole if getattr(config, "quantization_config", None) and not _is_gguf(checkpoint) else 1.0
    sizes = [int(_sizes(layer) * scale) for layer in layers]
    head = 0 if model is without_head(model) else _sizes(model) - _sizes(without_head(model))
    experts, chosen = _experts(text)
    width = _attention_width(text)
    mixed = [layer for layer in layers if any(_ATTENTION.search(name) for name, _ in layer.named_modules())]
    return Footprint(
        num_parameters=sum(p.numel() for p in model.parameters()),
        stored_bytes=stored,
        weight_bytes=int(whole * scale),
        layer_bytes=tuple(sizes),
        other_bytes=int((whole - head) * scale) - sum(sizes),
        num_layers=len(layers),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        dtype=str(dtype).removeprefix("torch."),
        attention=str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "eager"),
        num_heads=_heads(text),
        attention_width=width,
        attention_layers=len(mixed) if width else 0,
        matmul_parameters=int(sum(_multiplied(layer, experts, chosen) for layer in layers)),
        mlp_width=max(_mlp_width(layer, chosen) for layer in layers),
    )
