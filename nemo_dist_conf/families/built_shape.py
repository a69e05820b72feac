"""What is read off a model that was built without values, for families without a row of shapes. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Callable, Iterator, Mapping, Sequence

from nemo_dist_conf.families.config_facts import ModelFacts
from nemo_dist_conf.families.shapes import Weight

__all__ = ["BuiltShape", "Gathered", "Given", "Passage", "Run", "Work", "estimated_run"]

_FP32 = 4


@dataclass(frozen=True)
class Work:
    """What one part of a model does for a microbatch on one rank that holds the whole model; bytes, FLOPs of a forward.

    saved: for backward, parameters left out; of them stream: as wide as the residual stream, which every rank of tensor
    parallelism holds whole; inner: the rest, which they share. kept: the same of results of matrix products and
    attention. entered: what comes in and has a gradient. keys_and_values, queries_and_outputs: of an attention that is
    fused. matmul, attention: FLOPs, of attention without discount for a causal mask. moved: bytes that all other
    operators read and write. kernels: operators that are no views.
    """

    saved_stream: int = 0
    saved_inner: int = 0
    kept_stream: int = 0
    kept_inner: int = 0
    entered: int = 0
    keys_and_values: int = 0
    queries_and_outputs: int = 0
    matmul: float = 0.0
    attention: float = 0.0
    moved: int = 0
    kernels: int = 0


@dataclass(frozen=True)
class Given:
    """A tensor that a module is given: its bytes, its last dimension, and whether it has a gradient.

    name: of the argument, with the place in it.
    """

    name: str
    size: int
    width: int
    has_gradient: bool


@dataclass(frozen=True)
class Passage:
    """One call of a module: what it was given, and the first tensor that it returned, its bytes and last dimension.

    part: the number of the block that it was in; -1: before the first one, their count: after the last.
    again: its block saves something for backward after it, so what follows the module runs again where the block is
    recomputed.
    """

    part: int
    given: tuple[Given, ...]
    returned: int
    width: int = 0
    again: bool = False


@dataclass(frozen=True)
class Gathered:
    """A tensor that context parallelism gathers. part: as in Passage. size: bytes of whole rows.

    has_gradient: which is scattered back. of_heads: tensor parallelism splits it. why: in words.
    """

    part: int
    size: int
    has_gradient: bool
    of_heads: bool
    why: str


@dataclass(frozen=True)
class Run:
    """A microbatch through a model: blocks in their order, and what comes before and after them.

    width: of the residual stream, vocab: of the logits; 0: not seen. first: names of modules outside of blocks that
    run before any of them. passages: calls of each module, by its name. used: parameters that the outputs depend on,
    by name; None: not seen.
    """

    blocks: tuple[Work, ...]
    before: Work
    after: Work
    width: int = 0
    vocab: int = 0
    first: frozenset[str] = frozenset()
    passages: Mapping[str, tuple[Passage, ...]] = field(default_factory=dict)
    used: frozenset[str] | None = None


@dataclass(frozen=True, eq=False)
class BuiltShape:
    """Everything about a built model that sizes and costs depend on: what ModelShape is for families with a row.

    model_type: of its config, or the class of a module of one's own. source: where this was read, in words.
    names: of the blocks, in their order. held: weights of each of them. outer: those outside of blocks. Every
    parameter is there once, a tied one by its first name. tied: the head's weight is the embedding's.
    front, back: names of outer modules that fully_shard makes units of: a large embedding; the head with its norm.
    facts: as its config says them, what is left to defaults too. active_parameters: that one token uses.
    plan_of: (with sequence parallelism) -> style by pattern; raises ConfigError where none is known.
    run_of: (rows, tokens of a row, dtype, whether dropout is fused as on a GPU) -> what a microbatch takes.
    run_without: the same where modules inside of blocks run again in backward, by their names; with True their results
    of products and attention are kept. words, inside: of each block, what its tower takes in, and modules in it.
    why_estimated: why that is no count; "": it is. rotary_width: of keys that heads of a latent attention share.
    gathered_of: (ranks along cp, rows, tokens of a row, dtype) -> what context parallelism gathers in a microbatch.
    aliases: further names of tied parameters -> their first ones.
    """

    model_type: str
    source: str
    facts: ModelFacts
    names: tuple[str, ...]
    held: tuple[tuple[Weight, ...], ...]
    outer: tuple[Weight, ...]
    hidden: int
    vocab: int
    tied: bool
    experts: int
    experts_per_token: int
    active_parameters: int
    front: tuple[str, ...]
    back: tuple[str, ...]
    plan_of: Callable[[bool], Mapping[str, str | tuple[str, ...]]]
    run_of: Callable[[int, int, str, bool], Run]
    run_without: Callable[[int, int, str, bool, tuple[str, ...], bool], Run]
    gathered_of: Callable[[int, int, int, str], tuple[Gathered, ...]]
    why_estimated: str = ""
    rotary_width: int = 0
    words: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return len(self.names)

    @property
    def heads(self) -> int | None:
        return self.facts.num_heads

    @property
    def kv_heads(self) -> int | None:
        return self.facts.num_kv_heads

    @property
    def intermediate(self) -> int | None:
        return self.facts.intermediate_size

    @property
    def expert_width(self) -> int:
        """Of an expert's hidden layer; 0: not known."""
        return self.facts.expert_width or 0

    @cached_property
    def sparse(self) -> tuple[bool, ...]:
        """Of each block, whether it holds experts that can be split."""
        return tuple(any(weight.expert for weight in weights) for weights in self.held)

    @cached_property
    def parameters(self) -> int:
        return sum(map(_elements, (*self.held, self.outer)))

    @cached_property
    def _kind_of(self) -> tuple[int, ...]:
        """Of each block, the first one that holds the same weights."""
        firsts: dict[tuple[Weight, ...], int] = {}
        return tuple(firsts.setdefault(weights, index) for index, weights in enumerate(self.held))

    def kind(self, layer: int) -> int:
        """The kind of a block."""
        return self._kind_of[layer]

    def kinds(self, first: int = 0, last: int | None = None) -> dict[int, int]:
        """How many of the blocks first to last - 1 are of each kind."""
        found: dict[int, int] = {}
        for kind in self._kind_of[first:last]:
            found[kind] = found.get(kind, 0) + 1
        return found

    def block_name(self, layer: int) -> str:
        """The name of a block in the whole model."""
        return self.names[layer]

    def block_weights(self, kind: int) -> tuple[Weight, ...]:
        """Weights of a block of a kind, in the order in which backward has their gradients."""
        return self.held[kind]

    def outer_weights(self) -> tuple[Weight, ...]:
        """Weights outside of blocks, by their names in the whole model."""
        return self.outer

    def outer_units(self, least: int) -> tuple[tuple[Weight, ...], tuple[Weight, ...], tuple[Weight, ...]]:
        """Outer weights of the embedding's unit, of the head's, and of the root; units from ``least`` elements on."""
        front = tuple(weight for weight in self.outer if _is_in(weight.name, self.front))
        back = tuple(weight for weight in self.outer if _is_in(weight.name, self.back))
        if not front or not back or min(_elements(front), _elements(back)) < least:
            return (), (), self.outer
        return front, back, tuple(weight for weight in self.outer if weight not in (*front, *back))

    def parts_named(self, names: list[str]) -> tuple[str, ...]:
        """Which parts outside of blocks a pipeline stage holds that is given by the names of its modules."""
        leaves = {name.rpartition(".")[2] for name in names}
        held = [weight.part for weight in self.outer if leaves & set(weight.name.split("."))]
        return tuple(dict.fromkeys(held))

    def plan(self, sequence_parallel: bool) -> Mapping[str, str | tuple[str, ...]]:
        """Tensor-parallel styles by pattern. Raises ConfigError where none are known."""
        return self.plan_of(sequence_parallel)


def _elements(weights: tuple[Weight, ...]) -> int:
    return sum(weight.count for weight in weights)


def _is_in(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def estimated_run(shape: BuiltShape, rows: int, length: int, item: int) -> Run:
    """What a microbatch takes by the sizes of weights alone, for a model whose forward cannot be counted.

    A matrix keeps what it returns, a norm a float32 copy, its result and what reads that; attention is as wide as the
    stream. item: bytes of an element.
    """
    tokens, wide = rows * length, shape.hidden
    blocks = tuple(_estimated(shape, weights, rows, length, item) for weights in shape.held)
    head = 2.0 * tokens * shape.vocab * wide
    after = Work(
        saved_stream=tokens * wide * (_FP32 + 2 * item), matmul=head, moved=6 * tokens * wide * item, kernels=8
    )
    before = Work(moved=2 * tokens * wide * item, kernels=4)
    return Run(blocks, before, after, wide, shape.vocab, passages=_estimated_passages(shape, tokens, item))


def _estimated_passages(shape: BuiltShape, tokens: int, item: int) -> dict[str, tuple[Passage, ...]]:
    """One call of each layer with a matrix, and of each module of experts, on all tokens."""
    found: dict[str, tuple[Passage, ...]] = {}
    parts = [(shape.names[layer], layer, weights) for layer, weights in enumerate(shape.held)]
    for block, part, weights in (*parts, ("", shape.layers, shape.outer)):
        for weight in _matrices(weights):
            name = f"{block}.{weight.name}".strip(".").rpartition(".")[0]
            is_table = weight.layer == "Embedding"
            takes, gives = (shape.hidden, shape.hidden) if weight.expert else (weight.shape[-1], weight.shape[0])
            takes, gives = (
                (0, weight.shape[-1]) if is_table else (gives, takes) if weight.layer == "Conv1D" else (takes, gives)
            )
            given = [Given("input", tokens * takes * item, takes, True)] if takes else []
            given += [Given("weights", tokens * shape.experts_per_token * _FP32, 1, True)] if weight.expert else []
            where = -1 if weight.part == "embedding" else part
            # Of two layers that close a row, the second is the last of its block.
            found.setdefault(name, (Passage(where, tuple(given), tokens * gives * item, gives, again=False),))
    return found


def _estimated(shape: BuiltShape, weights: tuple[Weight, ...], rows: int, length: int, item: int) -> Work:
    tokens, wide = rows * length, shape.hidden
    share = shape.experts_per_token / shape.experts if shape.experts else 1.0
    results = matmul = 0.0
    for weight in _matrices(weights):
        part = share if weight.expert else 1.0
        results += part * (prod(weight.shape[:-1]) if weight.expert else weight.shape[0])
        matmul += 2.0 * part * weight.count * tokens
    norms = sum(weight.shape == (wide,) for weight in weights if weight.name.endswith("weight"))
    stream, inner = int(norms * tokens * wide * (_FP32 + 2 * item)), int(results * tokens * item)
    return Work(
        saved_stream=stream,
        saved_inner=inner,
        kept_inner=inner,
        entered=tokens * wide * item,
        keys_and_values=2 * tokens * wide * item,
        queries_and_outputs=2 * tokens * wide * item,
        matmul=matmul,
        attention=4.0 * tokens * length * wide,
        moved=3 * (stream + inner),
        kernels=8 * len(weights),
    )


def _matrices(weights: tuple[Weight, ...]) -> Iterator[Weight]:
    return (weight for weight in weights if len(weight.shape) > 1 and not (weight.expert and len(weight.shape) == 2))
