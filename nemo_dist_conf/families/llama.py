"""Llama 2 and 3."""

from __future__ import annotations

from dataclasses import replace

from nemo_dist_conf.families.decoder_base import DECODER, TENSOR_PLAN, decoder_shapes
from nemo_dist_conf.families.spec import Fields

__all__ = ["FAMILY"]

FAMILY = replace(
    DECODER,
    name="llama",
    tensor_plan=TENSOR_PLAN,
    fields=Fields(attention_bias="attention_bias", mlp_bias="mlp_bias"),
    shapes=decoder_shapes({"intermediate_size": 11008}),
    proven=frozenset({"tp", "cp"}),
)
