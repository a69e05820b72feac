"""What a model family is to the rest of the package: one row, torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Mapping

from nemo_dist_conf.families.mixers import Mixer

__all__ = ["Family", "Fields", "Places", "Shapes", "TensorPlan"]

# Without eq: there is one row a family, and functions that nobody calls would be made in every check of a model.


@dataclass(frozen=True, eq=False)
class Places:
    """Where the parts of a model are.

    base: the base model's name in a model with a head, "" where it is the model. embedding, blocks (the list of them)
    and final_norm: relative to the base model. head: relative to the model with a head.
    unstyled: patterns of all modules that a tensor plan does not name, relative to the base model, so that a name typed
    wrong is told before a model is built; None: not known, then it is told when it is built.
    """

    base: str = "model"
    embedding: str = "embed_tokens"
    blocks: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    unstyled: tuple[str, ...] | None = None

    def in_base(self, name: str) -> str:
        """The name in a model with a head of what has this name in the base model."""
        return f"{self.base}.{name}" if self.base else name

    def block(self, index: int | str) -> str:
        """The name of a block in a model with a head; of all of them for ``*``."""
        return self.in_base(f"{self.blocks}.{index}")


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """The style of each module under tensor parallelism (families/styles.py); that of sequence parallelism follows.

    block: styles by the name of a module of a block, relative to it; what a model lacks is left out for it.
    norms: of a block, on the residual stream: every rank runs them on all tokens, or on its part of the sequence.
    inputs: modules of a block whose layers share one input, which is made full once for all of them.
    """

    block: Mapping[str, str]
    norms: tuple[str, ...]
    inputs: tuple[str, ...]
    embedding: str = "embedding_rowwise"
    final_norm: str = "replicated"
    head: str = "colwise_gather_output"


@dataclass(frozen=True, eq=False)
class Fields:
    """What a config calls each size and switch; "": it has no such field.

    intermediate, expert_width: of the hidden layer of an MLP and of an expert. window: tokens of sliding attention,
    heeded where the field window_switch is on ("": always). attention_bias: of all projections of an attention.
    other_names: more names that a config may use for these, and what the field is called.
    """

    hidden: str = "hidden_size"
    intermediate: str = "intermediate_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    vocab: str = "vocab_size"
    tied: str = "tie_word_embeddings"
    attention_bias: str = ""
    mlp_bias: str = ""
    window: str = ""
    window_switch: str = ""
    experts: str = ""
    experts_per_token: str = ""
    expert_width: str = ""
    other_names: Mapping[str, str] = field(default_factory=dict)

    def own_names(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config's fields under their own names; one that is given by two counts as its own name has it."""
        return {**{name: config[other] for other, name in self.other_names.items() if other in config}, **config}


@dataclass(frozen=True, eq=False)
class Shapes:
    """How the weights follow from a config, for the plan.

    defaults: field -> what the config holds where the user says nothing.
    weights: module with two functions, imported when a plan asks for them. ``block_weights(shape, sparse)``: weights of
    a block by their names in it, in the order in which backward has their gradients; sparse: experts take the place of
    its MLP. ``outer_weights(shape)``: those outside of blocks, by their names in a model with a head: embedding, final
    norm, and the head where it is not the embedding. Both take a ModelShape and return Weights (families/shapes.py).
    is_sparse: (all fields, index of a layer) -> whether it holds experts; None: none does.
    """

    defaults: Mapping[str, Any]
    weights: str
    is_sparse: Callable[[Mapping[str, Any], int], bool] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """One model family. What a row does not say is found out, as for a family without a row.

    name: ``model_type`` of its configs.
    expert_plan: what is done to the experts of a layer, pattern relative to the base model -> style name of
    transformers; empty: the config's own ``base_model_ep_plan``.
    mixers: layers beside an attention of transformers' registry, which cp runs on whole rows.
    config_fields: every field of its config, also by older names, to tell a misspelt one; empty: not known.
    rotary: heads are turned in pairs, so their width is even.
    proven: axes of which tests hold its own classes against one process ("tp", with sequence parallelism; "cp"); what
    is not proven is tried on a small input before a model is changed.
    modeling: a module that makes transformers know the family when it is imported (AutoConfig.register,
    AutoModelForCausalLM.register); "": transformers knows it, or it is none of transformers.
    """

    name: str
    places: Places = Places()
    tensor_plan: TensorPlan | None = None
    expert_plan: Mapping[str, str] = field(default_factory=dict)
    mixers: tuple[Mixer, ...] = ()
    fields: Fields = Fields()
    config_fields: frozenset[str] = frozenset()
    shapes: Shapes | None = None
    rotary: bool = False
    proven: frozenset[str] = frozenset()
    modeling: str = ""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What its config holds where the user says nothing; empty where that is not known."""
        return {} if self.shapes is None else self.shapes.defaults
