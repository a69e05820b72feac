"""The weights of a decoder by name and shape, read from a transformers config without transformers or torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Mapping

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = ["ModelShape", "SHAPED_FAMILIES", "Weight", "block_weights", "outer_weights", "shape_of", "weights"]


@dataclass(frozen=True)
class Weight:
    """A parameter of the model. expert: the first dimension counts experts. name: relative to its block, if it has one.

    part: ``embedding``, ``attention``, ``mlp``, ``norm``, ``final_norm`` or ``head``.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    expert: bool = False

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """Everything about a decoder that sizes and costs depend on.

    sparse: of each layer, whether experts take the place of its MLP. experts: 0 for a dense model.
    expert_width: of one expert's hidden layer. window: of sliding attention, None: all tokens before.
    """

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    experts: int
    experts_per_token: int
    expert_width: int
    sparse: tuple[bool, ...]
    window: int | None = None

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        return sum(weight.count for _, weight in weights(self))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses: the experts that it does not visit are left out."""
        idle = self.experts - self.experts_per_token
        unused = sum(w.count // self.experts * idle for _, w in weights(self) if w.expert)
        return self.parameters - unused

    def kinds(self, first: int = 0, last: int | None = None) -> dict[bool, int]:
        """How many of the layers first to last - 1 are dense (False) and sparse (True); those that occur."""
        held = self.sparse[first:last]
        return {kind: held.count(kind) for kind in (False, True) if kind in held}


#: model_type -> what its config in transformers holds where the user says nothing.
#: biases: which of these options the family heeds.
#: Source: transformers 5.23, models/*/configuration_*.py; a test compares.
SHAPED_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "biases": ("attention_bias", "mlp_bias")},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "qkv_bias": True},
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "qk_norm": True,
        "biases": ("attention_bias",),
    },
    "mixtral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "qk_norm": True,
        "biases": ("attention_bias",),
    },
}
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a transformers config describes. Raises ConfigError for a family or a size that cannot be.

    config: its fields; what is absent has transformers' default.
    """
    family = str(config.get("model_type"))
    if family not in SHAPED_FAMILIES:
        raise ConfigError(
            unknown_name(
                family,
                SHAPED_FAMILIES,
                what=f"sizes of a model of type {config.get('model_type')} are not known",
                asked=assigned("model.config.model_type", config.get("model_type")),
                offer=lambda known: assigned("model.config.model_type", known),
                # Fields of one family are not those of another; a model of the recipe brings its own.
                otherwise="model=llama3_8b",
            )
        )
    given = {key: value for key, value in config.items() if value is not None}
    if "num_local_experts" in given and family == "qwen3_moe":  # transformers has two names for it
        given.setdefault("num_experts", given["num_local_experts"])
    said = {**_COMMON, **SHAPED_FAMILIES[family], **given}
    wrong = [key for key in _SIZES if isinstance(said[key], bool) or not isinstance(said[key], int) or said[key] < 1]
    if wrong:
        raise ConfigError(
            *(
                Problem(
                    what=f"model.config.{key}={said[key]} is not a size",
                    asked=f"model.config.{key}={said[key]}",
                    allowed="a whole number, 1 or more",
                    instead=f"model.config.{key}={({**_COMMON, **SHAPED_FAMILIES[family]})[key]}",
                )
                for key in wrong
            )
        )
    layers, heads = said["num_hidden_layers"], said["num_attention_heads"]
    sparse = tuple(_is_sparse(said, index, family) for index in range(layers))
    biases = {name for name in SHAPED_FAMILIES[family].get("biases", ()) if said.get(name)}
    kv_heads = said.get("num_key_value_heads", heads)
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        kv_heads = heads
    width = said["moe_intermediate_size"] if "moe_intermediate_size" in said else said["intermediate_size"]
    return ModelShape(
        model_type=family,
        hidden=said["hidden_size"],
        intermediate=said["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=said.get("head_dim", said["hidden_size"] // heads),
        vocab=said["vocab_size"],
        tied=bool(said["tie_word_embeddings"]),
        qkv_bias="qkv_bias" in SHAPED_FAMILIES[family] or "attention_bias" in biases,
        out_bias="attention_bias" in biases,
        mlp_bias="mlp_bias" in biases,
        qk_norm=bool(said.get("qk_norm")),
        experts=said.get("num_experts", said.get("num_local_experts", 0)) if any(sparse) else 0,
        experts_per_token=said.get("num_experts_per_tok", 0) if any(sparse) else 0,
        expert_width=width if any(sparse) else 0,
        sparse=sparse,
        window=said.get("sliding_window") if said.get("use_sliding_window", family == "mistral") else None,
    )


def _is_sparse(said: Mapping[str, Any], index: int, family: str) -> bool:
    if family == "mixtral":
        return True
    if family != "qwen3_moe":
        return False
    step = said["decoder_sparse_step"]
    return index not in said.get("mlp_only_layers", ()) and said["num_experts"] > 0 and (index + 1) % step == 0


def block_weights(shape: ModelShape, sparse: bool) -> tuple[Weight, ...]:
    """Weights of one layer, in the order in which backward has their gradients."""
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
    """Embedding, final norm and head, by their names in the whole model; tied ones once, as the embedding."""
    embedding = Weight("model.embed_tokens.weight", (shape.vocab, shape.hidden), "embedding")
    norm = Weight("model.norm.weight", (shape.hidden,), "final_norm")
    head = Weight("lm_head.weight", (shape.vocab, shape.hidden), "head")
    return (embedding, norm) if shape.tied else (embedding, norm, head)


def weights(shape: ModelShape) -> list[tuple[str, Weight]]:
    """(name in the whole model, weight) of every parameter."""
    inside = [
        (f"model.layers.{index}.{weight.name}", weight)
        for index, sparse in enumerate(shape.sparse)
        for weight in block_weights(shape, sparse)
    ]
    return [*inside, *((weight.name, weight) for weight in outer_weights(shape))]
