"""Names of tensor- and sequence-parallel styles, and the patterns by which a plan gives them to modules; no torch.

A plan maps a pattern to a style name. A pattern is a module's name seen from the model's root; ``*`` stands for any
one part of it (``model.layers.*.self_attn.q_proj``). Some styles may be given to a parameter that stands in no layer of
its own, by its name. The names are those of transformers where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["SEQUENCE_STYLES", "STYLES", "Style", "find_style", "match_end", "match_pattern", "sequence_twin", "unalias"]


@dataclass(frozen=True)
class Style:
    """What a module of one style does.

    text: it in words; tensors are [batch, seq, hidden]. layers: classes of torch.nn that it is for, and Conv1D, a
    linear layer of transformers; empty: any module, but none of a style that splits something, which is for parameters
    only.
    splits: features of the weight that the ranks share, "output" or "input"; "": none, every rank has them all.
    keeps_part: what is split stays the rank's own between this layer and the next, so the ranks have to divide it.
    parameters: it may be given to a parameter too: [..., output, input], or [output] alone. packed: weights of one size
    that lie in a row along the dimension that is split, of each of which a rank has its part.
    splits_sequence: activations are split over the sequence. sequence_twin: the style that takes its place under
    sequence parallelism; "": itself.
    """

    text: str
    layers: tuple[str, ...] = ()
    splits: str = ""
    keeps_part: bool = False
    parameters: bool = False
    packed: int = 1
    splits_sequence: bool = False
    sequence_twin: str = ""

    def split_dim(self, layer: str, dims: int) -> int | None:
        """The dimension that is split of a layer's weight, or of a parameter, of so many dimensions; None: none.

        layer: its class, as in ``layers``. A Linear's weight, and a parameter in no layer, ends in [output, input]; a
        Conv1D's in [input, output]; an Embedding's is [vocabulary, hidden], which is the same. The one dimension of a
        vector is the output.
        """
        if not self.splits or (self.splits == "input" and dims == 1):
            return None
        turned = layer in ("Embedding", "Conv1D")
        return dims - 1 if dims == 1 or (self.splits == "output") == turned else dims - 2


_LINEAR, _EMBEDDING = ("Linear", "Conv1D"), ("Embedding",)

#: Style name -> what it does. runtime/techniques/tensor/styles.py has the same names with torch's objects.
STYLES: dict[str, Style] = {
    "colwise": Style(
        "output features split over the ranks, each rank keeps its part (Linear, Conv1D, Embedding, parameters)",
        layers=(*_LINEAR, *_EMBEDDING),
        splits="output",
        keeps_part=True,
        parameters=True,
    ),
    "colwise_gather_output": Style(
        "output features split over the ranks, the output gathered (Linear, Conv1D, Embedding)",
        layers=(*_LINEAR, *_EMBEDDING),
        splits="output",
    ),
    "rowwise": Style(
        "input features split over the ranks, takes colwise outputs, the outputs summed (Linear, Conv1D, parameters)",
        layers=_LINEAR,
        splits="input",
        keeps_part=True,
        parameters=True,
        sequence_twin="rowwise_scatter_output",
    ),
    "rowwise_split_input": Style(
        "as rowwise, of an input that every rank has in full (Linear, Conv1D)", layers=_LINEAR, splits="input"
    ),
    "rowwise_scatter_output": Style(
        "as rowwise, the summed output split over the sequence (Linear, Conv1D)",
        layers=_LINEAR,
        splits="input",
        keeps_part=True,
        splits_sequence=True,
    ),
    "embedding_rowwise": Style(
        "vocabulary split over the ranks, the outputs summed (Embedding)",
        layers=_EMBEDDING,
        splits="input",
        sequence_twin="embedding_rowwise_scatter_output",
    ),
    "embedding_rowwise_scatter_output": Style(
        "as embedding_rowwise, the output split over the sequence (Embedding)",
        layers=_EMBEDDING,
        splits="input",
        splits_sequence=True,
    ),
    "replicated": Style("the same weights and the same input on every rank", sequence_twin="sequence_parallel"),
    "replicated_with_grad_allreduce": Style(
        "the same weights on different inputs, gradients summed (a norm of split heads)"
    ),
    "sequence_parallel": Style(
        "the same weights on each rank's part of the sequence, gradients summed (norms)", splits_sequence=True
    ),
    "split_heads": Style(
        "no weights of its own: what it says of its heads (number, width together) is the rank's part (attention)"
    ),
    "packed_colwise": Style(
        "as colwise, of two layers in one (gate and up), each split by itself (Linear, Conv1D, parameters)",
        layers=_LINEAR,
        splits="output",
        keeps_part=True,
        parameters=True,
        packed=2,
    ),
    "packed_qkv_colwise": Style(
        "as colwise, of three layers in one (query, key, value), each split by itself (Linear, Conv1D)",
        layers=_LINEAR,
        splits="output",
        keeps_part=True,
        packed=3,
    ),
    "packed_rowwise": Style(
        "input features of two weights in one, each split by itself (parameters [..., input, output])",
        splits="input",
        keeps_part=True,
        parameters=True,
        packed=2,
    ),
    "local_params": Style("its own parameters that are split (sinks, vectors a head) are the rank's part in its code"),
    "moe_tp_experts": Style("experts of which each rank has a part of the hidden width, the outputs summed"),
    "moe_identity_expert": Style("no weights of its own: what each rank adds in full to outputs that are summed"),
    "mla_kv_a_proj": Style(
        "the same weights on every rank; gradients of its last outputs, a rotary key that split heads share, summed"
    ),
    "all_reduce": Style("what the ranks return summed; its own parameters that are split are the rank's part"),
    "own_output": Style("no weights of its own: what it returns may be written into (to add another output to it)"),
    "gather_input": Style("no weights of its own: the input made full once for all layers inside (attention, MLP)"),
    "scatter_input": Style("no weights of its own: the input split over the sequence (blocks)", splits_sequence=True),
    "scatter_inputs": Style(
        "as scatter_input, of every input that is [batch, seq, ...] like the first (blocks)", splits_sequence=True
    ),
    "sequence_parameters": Style(
        "the module's own parameters, not those inside, meet what is split over the sequence, gradients summed (blocks)"
    ),
    "whole_inputs": Style("no weights of its own: what is split of the inputs made full, plain tensors inside"),
    "whole_sequence": Style("as whole_inputs, the output split over the sequence (mixers)", splits_sequence=True),
}

#: Other names in use -> style name.
_STYLE_ALIASES: dict[str, str] = {
    "colwise_rep": "colwise_gather_output",
    "embedding_colwise": "colwise_gather_output",
    "replicate": "replicated",
    "rowwise_rep": "rowwise_split_input",
}

#: Styles that split activations over the sequence; a plan with none of them is not sequence-parallel.
SEQUENCE_STYLES = frozenset(name for name, style in STYLES.items() if style.splits_sequence)


def find_style(name: str) -> Style | None:
    """What the style of this name or alias does; None for an unknown name."""
    return STYLES.get(unalias(name))


def unalias(style: str) -> str:
    """The name in STYLES that a style name stands for; an unknown name as it is."""
    return _STYLE_ALIASES.get(style, style)


def sequence_twin(name: str) -> str:
    """The style that takes the place of one under sequence parallelism; itself where none does."""
    style = find_style(name)
    return style.sequence_twin or name if style is not None else name


def match_pattern(pattern: str, name: str) -> bool:
    """Whether a module's name is meant by a pattern; ``*`` within one part between dots, as in torch's plans."""
    parts, wanted = name.split("."), pattern.split(".")
    # Most parts are words, for which no regular expression needs to be built.
    return len(parts) == len(wanted) and all(
        part == want or (not want.isidentifier() and fnmatchcase(part, want)) for part, want in zip(parts, wanted)
    )


def match_end(pattern: str, name: str) -> bool:
    """Whether a module's name ends in what a pattern means: ``q_proj``, ``self_attn.*_proj``, ``layers.0.mlp.*``."""
    parts = name.split(".")
    return match_pattern(pattern, ".".join(parts[-len(pattern.split(".")) :]))
