"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from nemo_dist_conf.families.decoder_base import DECODER, EXPERTS_PLACES, EXPERTS_TENSOR_PLAN, decoder_shapes
from nemo_dist_conf.families.spec import Fields

__all__ = ["FAMILY"]

FAMILY = replace(
    DECODER,
    name="mixtral",
    places=EXPERTS_PLACES,
    tensor_plan=EXPERTS_TENSOR_PLAN,
    fields=Fields(
        window="sliding_window",
        experts="num_local_experts",
        experts_per_token="num_experts_per_tok",
        expert_width="intermediate_size",
    ),
    shapes=decoder_shapes(
        {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        is_sparse=lambda config, layer: True,
    ),
    proven=frozenset({"cp"}),
)
