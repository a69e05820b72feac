"""A small config of every family of causal language models of transformers."""

from __future__ import annotations

from typing import Any

__all__ = ["families", "tiny_config"]

_LAYERS = 2
_VOCABULARY = 128
_SIZES: list[tuple[int, str]] = [
    (64, "hidden_size n_embd d_model embedding_dim embed_dim emb_dim dim dim_model lru_width router_hidden_size"),
    (64, "cross_attention_hidden_size hidden_dim encoder_hidden_size output_dim max_position_embeddings n_positions"),
    (64, "n_ctx max_seq_len image_size ffn_hidden_size"),
    (96, "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim feed_forward_hidden_size dff"),
    (96, "intermediate_size_mlp vision_hidden_size mlp_dim projector_hidden_size dim_ff d_inner"),
    (32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size dim_head"),
    (32, "shared_intermediate_size hidden_size_per_layer_input expert_ffn_hidden_size q_lora_rank kv_lora_rank"),
    (_LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
    (_LAYERS, "num_encoder_layers depth num_global_layers num_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "attention_heads num_experts num_local_experts n_routed_experts moe_num_experts num_cross_attention_heads"),
    (4, "zero_expert_num"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts"),
    (16, "head_dim global_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim patch_size pronunciation_embed_dim"),
    (16, "shape_embed_dim"),
    (8, "state_size mamba_d_state ssm_state_size"),
    (_VOCABULARY, "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (_VOCABULARY, "pronunciation_vocab_size shape_vocab_size n_words"),
]
_TINY = {name: size for size, names in _SIZES for name in names.split()}

#: What a family needs besides.
_BESIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"per_layer_config": {}},
    "gemma4_unified_text": {"per_layer_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 8]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

#: Families whose config cannot be made small field by field, or needs a package that is not installed.
_WITHOUT = (
    *("dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified"),
    *("gemma4_unified_assistant", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text"),
)


def families() -> list[str]:
    """Those that a small config can be made of, by their model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(_WITHOUT))


def tiny_config(family: str) -> Any:
    from transformers import AutoConfig

    plain = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **{**_shrunk(plain.to_dict()), **_BESIDES.get(family, {})})


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a small config has otherwise."""
    layers = next((fields[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if fields.get(name)), None)
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found[name] = {**value, **_shrunk(value)}
        elif isinstance(value, list) and layers and len(value) == layers > _LAYERS:
            kinds = list(dict.fromkeys(value))
            found[name] = (kinds + [kinds[-1]] * _LAYERS)[:_LAYERS]
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in _TINY:
                found[name] = _TINY[name]
            elif name.endswith("token_id") and value >= _VOCABULARY:
                found[name] = 1
    return found
