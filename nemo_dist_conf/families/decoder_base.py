"""What pre-norm decoders with rotary embeddings and a gated MLP share: Llama and those built like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Mapping

from nemo_dist_conf.families.spec import Family, Places, Shapes, TensorPlan

__all__ = ["DECODER", "EXPERTS_PLACES", "EXPERTS_TENSOR_PLAN", "TENSOR_PLAN", "decoder_shapes"]

_PLACES = Places(unstyled=("layers", "rotary_emb", "layers.*.mlp.act_fn"))

#: Names that a model lacks (q_norm outside Qwen3) are left out for it.
TENSOR_PLAN = TensorPlan(
    norms=("input_layernorm", "post_attention_layernorm"),
    inputs=("self_attn", "mlp"),
    block={
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.q_norm": "replicated_with_grad_allreduce",
        "self_attn.k_norm": "replicated_with_grad_allreduce",
        "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    },
)

#: The same with experts in some blocks; their router, and so their input, is every rank's in full.
EXPERTS_TENSOR_PLAN = replace(
    TENSOR_PLAN,
    inputs=("self_attn",),
    block={
        **TENSOR_PLAN.block,
        "mlp.gate": "replicated",
        "mlp.experts.gate_up_proj": "packed_colwise",
        "mlp.experts.down_proj": "rowwise",
        "mlp.experts": "moe_tp_experts",
    },
)
#: Which of a block's modules a model with experts has depends on its config.
EXPERTS_PLACES = replace(_PLACES, unstyled=None)

#: Fields of the configs of these families (transformers 5), also under their older names.
_CONFIG_FIELDS = frozenset(
    """attention_bias attention_dropout bos_token_id decoder_sparse_step dtype eos_token_id head_dim hidden_act
    hidden_size initializer_range intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias
    mlp_only_layers model_type moe_intermediate_size norm_topk_prob num_attention_heads num_experts num_experts_per_tok
    num_hidden_layers num_key_value_heads num_local_experts output_router_logits pad_token_id pretraining_tp
    rms_norm_eps rope_parameters rope_scaling rope_theta router_aux_loss_coef router_jitter_noise sliding_window
    tie_word_embeddings torch_dtype use_cache use_sliding_window vocab_size""".split()
)

#: The base row: what is not said here differs from family to family.
DECODER = Family(name="decoder", places=_PLACES, config_fields=_CONFIG_FIELDS, rotary=True)

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}


def decoder_shapes(
    defaults: Mapping[str, Any],
    *,
    is_sparse: Callable[[Mapping[str, Any], int], bool] | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> Shapes:
    """The shapes of such a decoder. defaults: where its config has others than Llama's (transformers 5.23)."""
    return Shapes({**_DEFAULTS, **defaults}, "nemo_dist_conf.families.decoder_weights", is_sparse, qkv_bias, qk_norm)
