"""Qwen 3 with experts, in the layers that its config chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Mapping

from nemo_dist_conf.families.decoder_base import DECODER, EXPERTS_PLACES, EXPERTS_TENSOR_PLAN, decoder_shapes
from nemo_dist_conf.families.spec import Fields

__all__ = ["FAMILY"]


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    step = config["decoder_sparse_step"]
    return layer not in config.get("mlp_only_layers", ()) and config["num_experts"] > 0 and (layer + 1) % step == 0


FAMILY = replace(
    DECODER,
    name="qwen3_moe",
    places=EXPERTS_PLACES,
    tensor_plan=EXPERTS_TENSOR_PLAN,
    fields=Fields(
        attention_bias="attention_bias",
        window="sliding_window",
        window_switch="use_sliding_window",
        experts="num_experts",
        experts_per_token="num_experts_per_tok",
        expert_width="moe_intermediate_size",
        other_names={"num_local_experts": "num_experts"},
    ),
    shapes=decoder_shapes(
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        is_sparse=_is_sparse,
        qk_norm=True,
    ),
    proven=frozenset({"cp"}),
)
