"""Which style each module of a model family takes under tensor and sequence parallelism; names only, no torch.

A plan maps a pattern to a style name. A pattern is a module's name seen from the model's root; ``*`` stands for any
one part of it (``model.layers.*.self_attn.q_proj``). The names are those of transformers where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Mapping

__all__ = [
    "DECODER",
    "FAMILIES",
    "Family",
    "SEQUENCE_STYLES",
    "STYLES",
    "STYLE_ALIASES",
    "complete_plan",
    "match_pattern",
    "unalias",
]

#: Style name -> what a module of that style does. Tensors are [batch, seq, hidden].
STYLES: dict[str, str] = {
    "colwise": "output features split over the ranks, each rank keeps its part (Linear, Embedding)",
    "colwise_gather_output": "output features split over the ranks, the output gathered (Linear, Embedding)",
    "rowwise": "input features split over the ranks, takes colwise outputs, the outputs summed (Linear)",
    "rowwise_split_input": "as rowwise, of an input that every rank has in full (Linear)",
    "rowwise_scatter_output": "as rowwise, the summed output split over the sequence (Linear)",
    "embedding_rowwise": "vocabulary split over the ranks, the outputs summed (Embedding)",
    "embedding_rowwise_scatter_output": "as embedding_rowwise, the output split over the sequence (Embedding)",
    "replicated": "the same weights and the same input on every rank",
    "replicated_with_grad_allreduce": "the same weights on different inputs, gradients summed (a norm of split heads)",
    "sequence_parallel": "the same weights on each rank's part of the sequence, gradients summed (norms)",
    "gather_input": "no weights of its own: the input made full once for all layers inside (attention, MLP)",
    "scatter_input": "no weights of its own: the input split over the sequence (blocks)",
}

#: Other names in use -> style name.
STYLE_ALIASES: dict[str, str] = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
}

#: Styles that split activations over the sequence; a plan with none of them is not sequence-parallel.
SEQUENCE_STYLES = frozenset(
    {"sequence_parallel", "scatter_input", "rowwise_scatter_output", "embedding_rowwise_scatter_output"}
)

_SEQUENCE_TWIN = {
    "rowwise": "rowwise_scatter_output",
    "embedding_rowwise": "embedding_rowwise_scatter_output",
    "replicated": "sequence_parallel",
}


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder are, relative to its base model (head: to the model that has one).

    layers: styles of what a block holds, relative to the block. inputs: modules of a block whose layers share one
    input. norms: the block's norms on the residual stream.
    """

    embedding: str = "embed_tokens"
    block: str = "layers.*"
    inputs: tuple[str, ...] = ("self_attn", "mlp")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "norm"
    head: str = "lm_head"
    layers: Mapping[str, str] = field(
        default_factory=lambda: {
            "self_attn.q_proj": "colwise",
            "self_attn.k_proj": "colwise",
            "self_attn.v_proj": "colwise",
            "self_attn.q_norm": "replicated_with_grad_allreduce",
            "self_attn.k_norm": "replicated_with_grad_allreduce",
            "self_attn.o_proj": "rowwise",
            "mlp.gate_proj": "colwise",
            "mlp.up_proj": "colwise",
            "mlp.down_proj": "rowwise",
        }
    )


#: Pre-norm decoder with gated MLP. Names that a model lacks (q_norm outside Qwen3) are left out for it.
DECODER = Family()

#: transformers' model_type -> family. A new family is one line.
FAMILIES: dict[str, Family] = {
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER,
}


def complete_plan(
    model_type: str | None,
    base_plan: Mapping[str, str] | None = None,
    head_plan: Mapping[str, str] | None = None,
    *,
    prefix: str = "model",
    sequence_parallel: bool = False,
) -> dict[str, str] | None:
    """Pattern -> style name for a whole model, relative to its root; None where nothing is known of it.

    base_plan: relative to the base model (transformers' ``config.base_model_tp_plan``); it overrules the family's
    layers. head_plan: relative to the root. prefix: the base model's name in the root, "" where it is the root.
    sequence_parallel: norms and the residual stream split over the sequence; None for a model_type that is not in
    FAMILIES, because its own plan does not name the modules of the residual stream.
    """
    family = FAMILIES.get(model_type or "")
    if family is None and (sequence_parallel or not base_plan):
        return None
    inside = f"{prefix}." if prefix else ""
    plan: dict[str, str] = {}
    if family is not None:
        plan[inside + family.embedding] = "embedding_rowwise"
        for name in (*family.norms, *family.inputs):
            plan[f"{inside}{family.block}.{name}"] = "replicated" if name in family.norms else "gather_input"
        plan |= {f"{inside}{family.block}.{name}": style for name, style in family.layers.items()}
        plan[inside + family.final_norm] = "replicated"
        if prefix:
            plan[family.head] = "colwise_gather_output"
    plan |= {inside + pattern: style for pattern, style in (base_plan or {}).items()}
    if prefix:
        plan |= dict(head_plan or {})
    if sequence_parallel and family is not None:
        plan = {pattern: _SEQUENCE_TWIN.get(unalias(style), style) for pattern, style in plan.items()}
        plan[inside + family.block] = "scatter_input"
    return plan


def match_pattern(pattern: str, name: str) -> bool:
    """Whether a module's name is meant by a pattern; ``*`` within one part between dots, as in torch's plans."""
    parts, wanted = name.split("."), pattern.split(".")
    # Most parts are words, for which no regular expression needs to be built.
    return len(parts) == len(wanted) and all(
        part == want or (not want.isidentifier() and fnmatchcase(part, want)) for part, want in zip(parts, wanted)
    )


def unalias(style: str) -> str:
    """The name in STYLES that a style name stands for; an unknown name as it is."""
    return STYLE_ALIASES.get(style, style)
