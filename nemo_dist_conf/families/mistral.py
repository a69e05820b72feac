"""Mistral: attention to a window of tokens."""

from __future__ import annotations

from dataclasses import replace

from nemo_dist_conf.families.decoder_base import DECODER, TENSOR_PLAN, decoder_shapes
from nemo_dist_conf.families.spec import Fields

__all__ = ["FAMILY"]

FAMILY = replace(
    DECODER,
    name="mistral",
    tensor_plan=TENSOR_PLAN,
    fields=Fields(window="sliding_window"),
    shapes=decoder_shapes({"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096}),
    proven=frozenset({"tp", "cp"}),
)
