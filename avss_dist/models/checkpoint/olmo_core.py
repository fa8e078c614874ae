"""Names that OLMo-core gives to the weights of its models, and those of transformers for the same tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

_OUTSIDE = {
    "embeddings": "model.embed_tokens",
    "lm_head.norm": "model.norm",
    "lm_head.w_out": "lm_head",
}
_IN_LAYER = {
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NORMS_BEHIND = {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"}
"""Norms of layers that normalize what attention and MLP return, as from OLMo 2 on."""
_NORMS_BEFORE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
"""Norms of layers that normalize what attention and MLP get."""
_LAYER = re.compile(r"blocks\.(?P<index>\d+)\.(?P<module>.+)")


def norms_are_behind(weights: Collection[str]) -> bool:
    """Whether the layers of a model in transformers normalize what attention and MLP return."""
    return any(".post_feedforward_layernorm." in name for name in weights)


def transformers_name(name: str, *, norms_behind: bool) -> str:
    """Return the name in transformers of a weight of OLMo-core, or the name itself if OLMo-core has no such weight.

    Args:
        norms_behind: see `norms_are_behind`.
    """
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    match = _LAYER.fullmatch(module)
    if match is None:
        return name
    in_layer = _IN_LAYER | _NORMS_BEFORE
    if norms_behind:
        in_layer = _IN_LAYER | _NORMS_BEHIND
    if match["module"] not in in_layer:
        return name
    return f"model.layers.{match['index']}.{in_layer[match['module']]}.{leaf}"
