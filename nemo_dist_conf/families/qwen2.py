"""Qwen 2 and 2.5: queries, keys and values have a bias."""

from __future__ import annotations

from dataclasses import replace

from nemo_dist_conf.families.decoder_base import DECODER, TENSOR_PLAN, decoder_shapes
from nemo_dist_conf.families.spec import Fields

__all__ = ["FAMILY"]

FAMILY = replace(
    DECODER,
    name="qwen2",
    tensor_plan=TENSOR_PLAN,
    fields=Fields(window="sliding_window", window_switch="use_sliding_window"),
    shapes=decoder_shapes(
        {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
        qkv_bias=True,
    ),
    proven=frozenset({"tp", "cp"}),
)
