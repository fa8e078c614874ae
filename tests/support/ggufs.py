"""Write tiny models as .gguf files without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH_NAMES

Array = np.ndarray[Any, np.dtype[Any]]


def write_gguf(
    model: Any,
    file: Path,
    *,
    architecture: str = "llama",
    block_count: int | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a model and return the file.

    Args:
        architecture: ``llama``, ``qwen3moe``, ``lfm2`` or ``gemma3``.
        block_count: number of layers in the metadata; None is the true one.
        kind: format of the matrices whose rows have whole blocks; others are float32.
    """
    config = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers if block_count is None else block_count)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or config.norm_eps)
    writer.add_rope_freq_base(1e6 if architecture == "gemma3" else 1e4)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "lfm2":
        heads = [config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types]
        writer.add_head_count_kv(heads)
        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_token_list([str(token) for token in range(config.vocab_size)])
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_tokenizer_model("no_vocab")
    if architecture == "qwen3moe":
        writer.add_key_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, tensor in _tensors(model, architecture):
        try:
            stored = kind if tensor.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(name, quants.quantize(tensor, stored), raw_dtype=stored)
        except quants.QuantError:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tensors(model: Any, architecture: str) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of a model as llama.cpp names and shapes them. (It also reorders rows, which here is not.)"""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().float().numpy()
        path, _, leaf = name.rpartition(".")
        if architecture == "gemma3" and tensor.ndim == 1:
            tensor = tensor + 1  # its norms add 1 to their weight
        if leaf == "gate_up_proj":
            block = path.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(tensor, 2, axis=1), strict=True):
                yield f"blk.{block}.ffn_{part}_exps.weight", np.ascontiguousarray(half)
        elif leaf == "down_proj":
            yield f"blk.{path.split('.')[2]}.ffn_down_exps.weight", tensor
        else:
            yield f"{names.get_name(path)}.{leaf}", tensor.squeeze(1) if "conv.conv" in path else tensor
