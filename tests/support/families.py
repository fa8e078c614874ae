"""Tiny random models of every transformers family, all built from one generic small config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from support.checkpoints import VOCABULARY

LAYERS = 3
_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "image-text": AutoModelForImageTextToText,
}
_FAMILIES: dict[str, Any] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
MAX_PARAMETERS = 60_000_000

# One small value for each attribute name that configs use; a config gets those which its class has.
_GENERIC: dict[int | float | bool, str] = {
    64: "hidden_size n_embd d_model dim emb_dim embedding_size embedding_dim word_embed_proj_dim d_embedding "
    "true_hidden_size max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "max_source_positions attention_hidden_size lru_width input_embedding_size output_embedding_size d_latents "
    "backbone_hidden_size hidden_size_global pooler_hidden_size prediction_head_size projection_dim output_dim "
    "max_source_length max_target_length model_max_length max_2d_position_embeddings adapter_out_dim embedding_rank",
    128: "intermediate_size n_inner decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dim_ff dff d_inner "
    "hidden_dim intermediate_size_mlp dense_intermediate_size feed_forward_size mamba_d_ssm d_ff "
    "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input "
    "encoder_hash_byte_group_vocab entity_vocab_size pronunciation_vocab_size shape_vocab_size audio_vocab_size",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_self_attends_per_block",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
    "num_self_attention_heads num_cross_attention_heads linear_num_heads mamba_n_heads mamba_num_heads "
    "linear_num_value_heads index_n_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "index_topk num_buckets num_hash",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts "
    "attn_layer_period n_layers_per_attn_res_block layer_group_size n_mamba_heads num_query_groups",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace "
    "attn_layer_offset num_dense_layers n_input_layers n_recurrent_layers n_output_layers num_shared_experts "
    "n_shared_experts moe_num_shared_experts altup_active_idx moe_layer_start_index num_kv_shared_layers "
    "num_random_blocks",
    16: "head_dim kv_channels swa_head_dim v_head_dim d_head d_kv dim_head attention_head_size attention_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim mamba_head_dim q_lora_rank kv_lora_rank "
    "qk_head_dim o_lora_rank gated_norm_rank mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank "
    "mamba_chunk_size chunk_size local_attn_chunk_length lsh_attn_chunk_length sliding_window sliding_window_size "
    "window_size attention_window attention_window_size local_attention attention_chunk_size block_size "
    "hidden_size_per_layer_input laurel_rank loop_gate_rank d_rel rel_extent hc_lowrank adapter_rank "
    "router_hidden_size pronunciation_embed_dim shape_embed_dim entity_emb_size num_latents query_pre_attn_scalar",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim prompt_length prompt_types segment_types",
    32: "mamba_d_head moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size intra_bottleneck_size "
    "image_size crop_size audio_chunk_size",
}
_VALUES: dict[str, Any] = {}
for _value, _names in _GENERIC.items():
    _VALUES |= dict.fromkeys(_names.split(), _value)

# Attribute values that one family needs to build or run at this size.
_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_BLOCKS: dict[str, Any] = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
_GEMMA4: dict[str, Any] = {**_SLIDING, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_COMPASS: dict[str, Any] = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
_KOSMOS: dict[str, Any] = {"layers": LAYERS, "embed_dim": 64, "ffn_dim": 128, "attention_heads": 4}
_DOTS3_VISION: dict[str, Any] = {"mlp_layer_types": ["dense"] * 3, "adapter_in_dim": 64}


def _positions(*sections: int) -> dict[str, Any]:
    """Rotary embeddings by kind of position (time, height, width) for heads of this size."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 3},
    "chameleon": {"vocabulary_map": {"<image>": 8}},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": {"text_config": _positions(2, 3, 3)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * LAYERS}},
    "dots3_note": {"vision_config": _DOTS3_VISION, "audio_config": {"adapter_input_size": 64}},
    "emu3": {"vq_config": {"base_channels": 32}, "vocabulary_map": {"<image>": 8, "<|extra_200|>": 7}},
    "ernie4_5_vl_moe": {"text_config": _positions(3, 3, 2) | {"moe_intermediate_size": [32, 32]}},
    "esmc": {"num_key_value_heads": 4},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm46v": {"text_config": _positions(2, 3, 3)},
    "glm4v": {"text_config": _positions(2, 3, 3)},
    "glm4v_moe": {"text_config": _positions(1, 1, 2)},
    "glm5_next": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}},
    "glm_ocr": {"text_config": _positions(2, 3, 3)},
    "glmga": {"text_config": _positions(2, 3, 3)},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "granitemoehybrid": _HYBRID,
    "hunyuan_vl": {"text_config": _positions(2, 2, 2, 2)},
    "hy_v4_vl": {"text_config": _positions(1, 1, 2)},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 64}},
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32}},
    "kimi_linear": _HYBRID,
    "kosmos-2": {"text_config": _KOSMOS},
    "kosmos-2.5": {"text_config": _KOSMOS, "latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [2, 1]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": _positions(2, 3, 3)},
    "qwen2_5_omni_thinker": {"text_config": _positions(2, 3, 3)},
    "qwen2_5_vl": {"text_config": _positions(2, 3, 3)},
    "qwen2_vl": {"text_config": _positions(2, 3, 3), "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64}},
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": _HYBRID | _INDEXER},
    "qwen4_exp_text": _HYBRID | _INDEXER,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 4]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _BLOCKS | {"attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": _BLOCKS,
    "zaya": {"num_experts_per_tok": 1},
}


def model_types(*kinds: str) -> list[tuple[str, str]]:
    """Every (kind, model_type) that the auto classes of some kinds, or of all, know, sorted."""
    types = []
    for kind in kinds or _FAMILIES:
        types += [(kind, name) for name in _FAMILIES[kind]]
    return sorted(types)


def tiny_config(model_type: str, *, overrides: bool = True, **changes: Any) -> PretrainedConfig:
    """The generic small config in a family's config class; overrides=False leaves out the family's own values.

    ``changes`` are other values, from which the class derives its own.
    """
    extra = _OVERRIDES.get(model_type, {}) if overrides else {}
    return _build(CONFIG_MAPPING[model_type], extra | changes)


def tiny_model(kind: str, model_type: str, *, overrides: bool = True, **changes: Any) -> PreTrainedModel:
    """A seeded float32 model in evaluation mode; raises what the library raises, and MemoryError for a giant.

    ``changes`` are other values of the text configuration.
    """
    config = tiny_config(model_type, overrides=overrides)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    auto = _CLASSES[kind]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config, dtype=torch.float32).parameters())
    if size > MAX_PARAMETERS:
        raise MemoryError(f"{model_type}: {size:,} parameters, more than {MAX_PARAMETERS:,}")
    torch.manual_seed(0)
    return auto.from_config(config, dtype=torch.float32).eval()


def tiny_batch() -> torch.Tensor:
    """Two rows of twelve token ids, none of them special."""
    return torch.randint(10, 120, (2, 12), generator=torch.Generator().manual_seed(0))


def _build(config_class: type[PretrainedConfig], extra: dict[str, Any]) -> PretrainedConfig:
    """An instance with the generic values of the attributes that the class has, subconfigs included."""
    names = inspect.signature(config_class).parameters
    values = {name: _VALUES[name] for name in names if name in _VALUES}
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no grouped heads
    values |= _special_ids(names)
    parts = {name: _build(part, extra.get(name, {})) for name, part in _parts(config_class).items()}
    return config_class(**(values | extra | parts))


def _parts(config_class: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The classes of the nested configs: the declared ones, or the default's class where AutoConfig is declared."""
    declared = {name: part for name, part in config_class.sub_configs.items() if getattr(part, "model_type", "")}
    try:
        defaults = vars(config_class())
    except Exception:  # the class's own defaults do not build (gemma4_assistant)
        return declared
    return {name: type(value) for name, value in defaults.items() if isinstance(value, PretrainedConfig)} | declared


def _special_ids(names: Any) -> dict[str, int]:
    """Ids inside the vocabulary for every token id attribute: pad 0, bos 1, eos 2, the others from 3 on."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    others = [name for name in names if name.endswith(("_token_id", "_token_index")) and name not in known]
    ids = {name: value for name, value in known.items() if name in names}
    for index, name in enumerate(others):
        ids[name] = 3 + index % 6
    return ids


def lively(model: Any) -> Any:
    """A tiny model whose layers do something: random weights are small, and layers that add nothing need no repair."""
    generator = torch.Generator().manual_seed(0)
    model.resize_token_embeddings(VOCABULARY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter *= 8
            elif parameter.dim() == 1 and "norm" in name and "weight" in name:
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    return model.eval()
