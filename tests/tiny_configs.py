"""A small config of every family of causal language models of transformers."""

from __future__ import annotations

from typing import Any

__all__ = ["causal_families", "families", "tiny_config"]

_VOCABULARY = 128
_SIZES: list[tuple[int, str]] = [
    (64, "hidden_size n_embd d_model embedding_dim embed_dim emb_dim dim dim_model lru_width router_hidden_size"),
    (64, "cross_attention_hidden_size hidden_dim encoder_hidden_size output_dim max_position_embeddings n_positions"),
    (64, "n_ctx max_seq_len image_size ffn_hidden_size hidden_size_global adapter_in_dim adapter_out_dim"),
    (64, "adapter_input_size"),
    (96, "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim feed_forward_hidden_size dff"),
    (96, "intermediate_size_mlp vision_hidden_size mlp_dim projector_hidden_size dim_ff d_inner"),
    (32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size dim_head"),
    (32, "shared_intermediate_size hidden_size_per_layer_input expert_ffn_hidden_size q_lora_rank kv_lora_rank"),
    (5, "sliding_window attention_window_size sliding_window_size local_attention window_size"),
    (8, "attention_chunk_size chunk_size mamba_chunk_size mamba_n_heads mamba_num_heads n_mamba_heads rotary_dim"),
    (16, "mamba_d_head mamba_head_dim mamba_headdim linear_head_dim linear_key_head_dim linear_value_head_dim"),
    (4, "linear_num_value_heads linear_num_heads mamba_dt_rank"),
    (2, "linear_num_key_heads"),
    (1, "topk_group cross_attn_k"),
    (128, "mamba_d_ssm"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "attention_heads num_experts num_local_experts n_routed_experts moe_num_experts num_cross_attention_heads"),
    (4, "zero_expert_num"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k"),
    (2, "top_k_experts"),
    (16, "head_dim global_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim patch_size pronunciation_embed_dim"),
    (16, "shape_embed_dim"),
    (8, "state_size mamba_d_state ssm_state_size"),
    (_VOCABULARY, "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (_VOCABULARY, "pronunciation_vocab_size shape_vocab_size n_words"),
]
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_decoder_layers", "num_encoder_layers", "depth", "num_global_layers", "num_blocks"),
)
_TINY = {name: size for size, names in _SIZES for name in names.split()}


def _besides(layers: int) -> dict[str, dict[str, Any]]:
    """What a family needs besides."""
    turns = layers // 2
    return {
        "bailing_hybrid": {"n_group": 2, "topk_group": 1},
        "bamba": {"attn_layer_indices": list(range(1, layers, 2))},
        "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "dbrx": {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "dots3_note_text": {"head_dim": 32},
        "deepseek_v2": {"num_experts_per_tok": 2},
        "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
        "gemma3n_text": {"num_kv_shared_layers": layers - 2, "intermediate_size": [96] * layers},
        "gpt_neo": {"attention_types": [[["global", "local"], turns]]},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * turns},
        "hunyuan_v1_dense": {"head_dim": 16},
        "hunyuan_v1_moe": {"head_dim": 16},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * turns},
        "mamba2": {"num_heads": 8, "head_dim": 16},
        "ministral": {"head_dim": 16},
        "nemotron": {"num_key_value_heads": 2},
        "qwen4_exp_text": {
            **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
            **{"indexer_compress_ratio": 4, "hc_lowrank": 16, "ple_embed_dim": 64, "ngram_vocab_size_base": 64},
            **{"split_ngram_parts": 4, "output_gate_type": "sigmoid"},
        },
        "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 4]},
        "xlstm": {"chunk_size": 16},
        "xmod": {"default_language": "en_XX"},
        "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]},
        "zaya": {"num_experts_per_tok": 1},
    }


#: Families whose config cannot be made small field by field, or needs a package that is not installed.
_WITHOUT = (
    *("dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified"),
    *("gemma4_unified_assistant", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text"),
)

#: Whose causal model reads fields of its decoder, which the config of the whole has in a part alone.
_OF_DECODER = ("musicgen", "musicgen_melody")


def causal_families() -> list[str]:
    """All of transformers, by their model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def families() -> list[str]:
    """Those whose initial values docs/conformance.md has."""
    return sorted(set(causal_families()) - set(_WITHOUT))


def tiny_config(family: str, layers: int = 2) -> Any:
    """A few blocks of its kinds in turn, several experts, windows shorter than a row; nothing drops out or jitters."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(family)
    fields, besides = plain.to_dict(), dict(_besides(layers).get(family, {}))
    if family in _OF_DECODER:
        unsaid = ("architectures", "dtype", "model_type", "transformers_version")
        decoder = {key: value for key, value in plain.decoder.to_dict().items() if key not in unsaid}
        besides = {**decoder, **_shrunk(decoder, layers)}
    return AutoConfig.for_model(family, **{**_shrunk(fields, layers), **besides})


def _shrunk(fields: dict[str, Any], layers: int) -> dict[str, Any]:
    """The fields that a small config has otherwise."""
    deep = next((fields[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if fields.get(name)), None)
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config":  # by numbers of layers that are no more
            found[name] = {}
        elif isinstance(value, dict) and name.endswith("_config"):
            besides = _besides(layers).get(value.get("model_type", ""), {})
            found[name] = {**value, **_shrunk(value, layers), **besides}
        elif isinstance(value, list) and deep and len(value) == deep > layers:
            kinds = list(dict.fromkeys(value))
            found[name] = (kinds * layers)[:layers]
        elif isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
            found[name] = 0.0
        elif name == "use_cache":
            found[name] = False
        elif isinstance(value, int) and not isinstance(value, bool):
            if name == "num_key_value_heads" and fields.get("kv_lora_rank"):  # each head has its own
                found[name] = _TINY["num_attention_heads"]
            elif name in _TINY:
                found[name] = _TINY[name]
            elif name == "n_group":
                found[name] = min(value, 2)
            elif name in _DEPTHS:
                found[name] = layers
            elif name.endswith("token_id") and value >= _VOCABULARY:
                found[name] = 1
    return found
