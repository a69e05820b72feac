"""What trying a plan of tensor parallelism comes to for a small model of each family, for a plan on paper, which tries
nothing: modules that are then split otherwise than the family's own plan says, or than the way with the least traffic.

``python -m tests.plan.found`` measures it on two ranks. A run does not read it: it tries its own model.
"""

from __future__ import annotations

from typing import Mapping

__all__ = ["found_styles"]

#: Family -> style -> the modules that it takes the place of another for, patterns with a space between.
_FOUND: Mapping[str, Mapping[str, str]] = {
    "bamba": {
        "replicated": "model.layers.*.mamba model.layers.*.mamba.norm",
        "colwise_gather_output": "model.layers.*.mamba.in_proj",
        "rowwise_split_input": "model.layers.*.mamba.out_proj",
    },
    "bert": {
        "replicated": "bert.embeddings.word_embeddings cls.predictions.decoder",
    },
    "bert-generation": {
        "replicated": "bert.embeddings.word_embeddings lm_head.decoder",
    },
    "big_bird": {
        "replicated": "bert.embeddings.word_embeddings cls.predictions.decoder",
        "rowwise_split_input": "bert.encoder.layer.*.attention.output.dense",
        "colwise_gather_output": (
            "bert.encoder.layer.*.attention.self.key bert.encoder.layer.*.attention.self.query "
            "bert.encoder.layer.*.attention.self.value"
        ),
    },
    "bitnet": {
        "rowwise_split_input": "model.layers.*.mlp.down_proj model.layers.*.self_attn.o_proj",
        "replicated": "model.layers.*.mlp.ffn_sub_norm model.layers.*.self_attn.attn_sub_norm",
        "colwise_gather_output": (
            "model.layers.*.mlp.gate_proj model.layers.*.mlp.up_proj model.layers.*.self_attn.k_proj "
            "model.layers.*.self_attn.q_proj model.layers.*.self_attn.v_proj"
        ),
    },
    "bloom": {
        "split_heads": "transformer.h.*.self_attention",
    },
    "camembert": {
        "replicated": "lm_head.decoder roberta.embeddings.word_embeddings",
    },
    "codegen": {
        "rowwise_split_input": "transformer.h.*.attn.out_proj",
        "colwise_gather_output": "transformer.h.*.attn.qkv_proj",
    },
    "cpmant": {
        "split_heads": "cpmant.encoder.layers.*.self_att.self_attention",
    },
    "ctrl": {
        "replicated": "lm_head transformer.w",
    },
    "data2vec-text": {
        "replicated": "data2vec_text.embeddings.word_embeddings lm_head.decoder",
    },
    "dbrx": {
        "colwise_gather_output": "transformer.blocks.*.norm_attn_norm.attn.Wqkv",
        "rowwise_split_input": "transformer.blocks.*.norm_attn_norm.attn.out_proj",
    },
    "diffllama": {
        "replicated": "model.layers.*.self_attn",
        "colwise_gather_output": (
            "model.layers.*.self_attn.k_proj model.layers.*.self_attn.q_proj model.layers.*.self_attn.v_proj"
        ),
        "rowwise_split_input": "model.layers.*.self_attn.o_proj",
    },
    "doge": {
        "rowwise_split_input": "model.layers.*.self_attn.dt_proj model.layers.*.self_attn.o_proj",
        "colwise_gather_output": (
            "model.layers.*.self_attn.k_proj model.layers.*.self_attn.q_proj model.layers.*.self_attn.v_proj"
        ),
    },
    "ernie": {
        "replicated": "cls.predictions.decoder ernie.embeddings.word_embeddings",
    },
    "falcon": {
        "replicated": "transformer.h.*.mlp.dense_4h_to_h transformer.h.*.mlp.dense_h_to_4h",
        "rowwise_split_input": "transformer.h.*.self_attention.dense",
        "colwise_gather_output": "transformer.h.*.self_attention.query_key_value",
    },
    "fuyu": {
        "split_heads": "model.language_model.layers.*.self_attn",
    },
    "gemma4": {
        "replicated": "lm_head model.language_model.embed_tokens",
    },
    "git": {
        "replicated": "git.embeddings.word_embeddings",
        "split_heads": "git.encoder.layer.*.attention.self",
    },
    "gpt-sw3": {
        "split_heads": "transformer.h.*.attn",
        "packed_qkv_colwise": "transformer.h.*.attn.c_attn",
    },
    "gpt2": {
        "split_heads": "transformer.h.*.attn",
        "packed_qkv_colwise": "transformer.h.*.attn.c_attn",
    },
    "gpt_bigcode": {
        "colwise_gather_output": "transformer.h.*.attn.c_attn",
        "rowwise_split_input": "transformer.h.*.attn.c_proj",
    },
    "gpt_neo": {
        "split_heads": "transformer.h.*.attn.attention",
    },
    "gpt_neox_japanese": {
        "split_heads": "gpt_neox_japanese.layers.*.attention",
    },
    "gpt_oss": {
        "replicated": "model.layers.*.self_attn",
        "colwise_gather_output": (
            "model.layers.*.self_attn.k_proj model.layers.*.self_attn.q_proj model.layers.*.self_attn.v_proj"
        ),
        "rowwise_split_input": "model.layers.*.self_attn.o_proj",
    },
    "gptj": {
        "split_heads": "transformer.h.*.attn",
    },
    "inkling2_text": {
        "packed_colwise": "model.layers.*.mlp.experts.gate_up_proj",
    },
    "inkling_text": {
        "packed_colwise": "model.layers.*.mlp.experts.gate_up_proj",
    },
    "lfm3": {
        "colwise_gather_output": "model.layers.*.conv.in_proj",
        "rowwise_split_input": "model.layers.*.conv.out_proj",
    },
    "llama4": {
        "own_output": "model.layers.*.feed_forward.shared_expert",
    },
    "llama4_text": {
        "own_output": "model.layers.*.feed_forward.shared_expert",
    },
    "mamba2": {
        "replicated": "backbone.layers.*.mixer backbone.layers.*.mixer.norm",
        "colwise_gather_output": "backbone.layers.*.mixer.in_proj",
        "rowwise_split_input": "backbone.layers.*.mixer.out_proj",
    },
    "megatron-bert": {
        "replicated": "bert.embeddings.word_embeddings cls.predictions.decoder",
        "split_heads": "bert.encoder.layer.*.attention.self",
    },
    "mllama": {
        "split_heads": "model.layers.*.self_attn",
    },
    "modernbert-decoder": {
        "colwise_gather_output": "model.layers.*.mlp.Wi",
        "rowwise_split_input": "model.layers.*.mlp.Wo",
    },
    "moshi": {
        "colwise_gather_output": "model.layers.*.mlp.fc1",
        "rowwise_split_input": "model.layers.*.mlp.fc2",
    },
    "mpt": {
        "split_heads": "transformer.blocks.*.attn",
        "packed_qkv_colwise": "transformer.blocks.*.attn.Wqkv",
    },
    "mvp": {
        "split_heads": "model.decoder.layers.*.self_attn",
    },
    "openai-gpt": {
        "split_heads": "transformer.h.*.attn",
        "packed_qkv_colwise": "transformer.h.*.attn.c_attn",
    },
    "opt": {
        "split_heads": "model.decoder.layers.*.self_attn",
    },
    "persimmon": {
        "split_heads": "model.layers.*.self_attn",
    },
    "prophetnet": {
        "colwise_gather_output": (
            "prophetnet.decoder.layers.*.self_attn.key_proj prophetnet.decoder.layers.*.self_attn.query_proj "
            "prophetnet.decoder.layers.*.self_attn.relative_pos_embeddings "
            "prophetnet.decoder.layers.*.self_attn.value_proj"
        ),
        "rowwise_split_input": "prophetnet.decoder.layers.*.self_attn.out_proj",
    },
    "recurrent_gemma": {
        "replicated": "model.layers.*.temporal_block.conv_1d model.layers.*.temporal_block.rg_lru",
        "rowwise_split_input": "model.layers.*.temporal_block.linear_out",
        "colwise_gather_output": "model.layers.*.temporal_block.linear_x model.layers.*.temporal_block.linear_y",
    },
    "rembert": {
        "split_heads": "rembert.encoder.layer.*.attention.self",
    },
    "roberta": {
        "replicated": "lm_head.decoder roberta.embeddings.word_embeddings",
    },
    "roberta-prelayernorm": {
        "replicated": "lm_head.decoder roberta_prelayernorm.embeddings.word_embeddings",
        "rowwise_split_input": (
            "roberta_prelayernorm.encoder.layer.0.attention.output.dense "
            "roberta_prelayernorm.encoder.layer.1.attention.output.dense"
        ),
        "colwise_gather_output": (
            "roberta_prelayernorm.encoder.layer.*.attention.self.key "
            "roberta_prelayernorm.encoder.layer.*.attention.self.query "
            "roberta_prelayernorm.encoder.layer.*.attention.self.value"
        ),
    },
    "roc_bert": {
        "replicated": "cls.predictions.decoder roc_bert.embeddings.word_embeddings",
    },
    "roformer": {
        "replicated": "cls.predictions.decoder roformer.embeddings.word_embeddings",
        "split_heads": "roformer.encoder.layer.*.attention.self",
    },
    "rwkv": {
        "replicated": "rwkv.blocks.*.attention",
        "colwise_gather_output": (
            "rwkv.blocks.*.attention.key rwkv.blocks.*.attention.receptance rwkv.blocks.*.attention.value"
        ),
        "rowwise_split_input": "rwkv.blocks.*.attention.output",
    },
    "stablelm": {
        "split_heads": "model.layers.*.self_attn",
    },
    "trocr": {
        "colwise_gather_output": (
            "model.decoder.layers.*.self_attn.k_proj model.decoder.layers.*.self_attn.q_proj "
            "model.decoder.layers.*.self_attn.v_proj"
        ),
        "rowwise_split_input": "model.decoder.layers.*.self_attn.out_proj",
    },
    "whisper": {
        "split_heads": "model.decoder.layers.*.self_attn",
    },
    "xglm": {
        "split_heads": "model.layers.*.self_attn",
    },
    "xlm": {
        "split_heads": "transformer.attentions.*",
    },
    "xlm-roberta": {
        "replicated": "lm_head.decoder roberta.embeddings.word_embeddings",
    },
    "xlm-roberta-xl": {
        "replicated": "lm_head.decoder roberta.embeddings.word_embeddings",
    },
    "xlstm": {
        "colwise_gather_output": (
            "backbone.blocks.*.mlstm_layer.fgate_preact backbone.blocks.*.mlstm_layer.igate_preact "
            "backbone.blocks.*.mlstm_layer.k backbone.blocks.*.mlstm_layer.ogate_preact "
            "backbone.blocks.*.mlstm_layer.q backbone.blocks.*.mlstm_layer.v"
        ),
        "replicated": "backbone.blocks.*.mlstm_layer.multihead_norm",
        "rowwise_split_input": "backbone.blocks.*.mlstm_layer.out_proj",
    },
    "xmod": {
        "replicated": "lm_head.decoder roberta.embeddings.word_embeddings",
    },
    "zamba": {
        "replicated": "model.layers.*.mamba model.layers.*.mamba_decoder.mamba",
        "colwise_gather_output": "model.layers.*.mamba.in_proj model.layers.*.mamba_decoder.mamba.in_proj",
        "rowwise_split_input": "model.layers.*.mamba.out_proj model.layers.*.mamba_decoder.mamba.out_proj",
    },
    "zamba2": {
        "replicated": (
            "model.layers.*.mamba model.layers.*.mamba.norm model.layers.*.mamba_decoder.mamba "
            "model.layers.*.mamba_decoder.mamba.norm"
        ),
        "colwise_gather_output": (
            "model.layers.*.mamba.in_proj model.layers.*.mamba_decoder.mamba.in_proj "
            "model.layers.*.shared_transformer.feed_forward.gate_up_proj "
            "model.layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.0.1"
        ),
        "rowwise_split_input": (
            "model.layers.*.mamba.out_proj model.layers.*.mamba_decoder.mamba.out_proj "
            "model.layers.*.shared_transformer.feed_forward.down_proj"
        ),
    },
    "zaya": {
        "rowwise_split_input": "model.layers.*.self_attn.o_proj",
        "replicated": (
            "model.layers.*.self_attn.qk_norm model.layers.*.self_attn.qkv_proj.conv_qk_depthwise "
            "model.layers.*.self_attn.qkv_proj.conv_qk_grouped"
        ),
        "colwise_gather_output": (
            "model.layers.*.self_attn.qkv_proj.k_proj model.layers.*.self_attn.qkv_proj.q_proj "
            "model.layers.*.self_attn.qkv_proj.v_proj_current model.layers.*.self_attn.qkv_proj.v_proj_delayed"
        ),
    },
}


def found_styles(model_type: object) -> dict[str, str]:
    """Pattern -> style, relative to the whole model; empty where a run takes what a plan on paper would."""
    found = _FOUND.get(str(model_type), {})
    return {pattern: style for style, patterns in found.items() for pattern in patterns.split()}
