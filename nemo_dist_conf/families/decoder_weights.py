"""The weights of pre-norm decoders with a gated MLP or experts, by name and shape."""

from __future__ import annotations

from nemo_dist_conf.families.decoder_base import DECODER
from nemo_dist_conf.families.shapes import ModelShape, Weight

__all__ = ["block_weights", "outer_weights"]


def block_weights(shape: ModelShape, sparse: bool) -> tuple[Weight, ...]:
    """Weights of one block; sparse: with experts in place of its MLP."""
    hidden, q, kv = shape.hidden, shape.q_width, shape.kv_width
    found = list(_expert_weights(shape) if sparse else _mlp_weights(shape))
    found.append(Weight("post_attention_layernorm.weight", (hidden,), "norm"))
    found += _linear("self_attn.o_proj", q, hidden, "attention", shape.out_bias)
    found += _linear("self_attn.v_proj", hidden, kv, "attention", shape.qkv_bias)
    if shape.qk_norm:
        found += [Weight(f"self_attn.{name}_norm.weight", (shape.head_dim,), "attention") for name in "kq"]
    for name, width in (("k", kv), ("q", q)):
        found += _linear(f"self_attn.{name}_proj", hidden, width, "attention", shape.qkv_bias)
    return (*found, Weight("input_layernorm.weight", (hidden,), "norm"))


def _mlp_weights(shape: ModelShape) -> tuple[Weight, ...]:
    hidden, wide, bias = shape.hidden, shape.intermediate, shape.mlp_bias
    return (
        *_linear("mlp.down_proj", wide, hidden, "mlp", bias),
        *_linear("mlp.up_proj", hidden, wide, "mlp", bias),
        *_linear("mlp.gate_proj", hidden, wide, "mlp", bias),
    )


def _expert_weights(shape: ModelShape) -> tuple[Weight, ...]:
    count, hidden, wide = shape.experts, shape.hidden, shape.expert_width
    return (
        Weight("mlp.experts.down_proj", (count, hidden, wide), "mlp", expert=True),
        Weight("mlp.experts.gate_up_proj", (count, 2 * wide, hidden), "mlp", expert=True),
        Weight("mlp.gate.weight", (count, hidden), "mlp"),
    )


def _linear(name: str, inputs: int, outputs: int, part: str, bias: bool) -> tuple[Weight, ...]:
    weight = Weight(f"{name}.weight", (outputs, inputs), part)
    return (weight, Weight(f"{name}.bias", (outputs,), part)) if bias else (weight,)


def outer_weights(shape: ModelShape) -> tuple[Weight, ...]:
    """Embedding, final norm, and the head where it is not the embedding."""
    places = DECODER.places
    embedding = Weight(f"{places.in_base(places.embedding)}.weight", (shape.vocab, shape.hidden), "embedding")
    norm = Weight(f"{places.in_base(places.final_norm)}.weight", (shape.hidden,), "final_norm")
    head = Weight(f"{places.head}.weight", (shape.vocab, shape.hidden), "head")
    return (embedding, norm) if shape.tied else (embedding, norm, head)
