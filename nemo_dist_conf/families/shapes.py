"""The weights of a decoder by name and shape, read from a transformers config without transformers or torch."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Mapping

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.plans import complete_plan
from nemo_dist_conf.families.registry import families, find_family
from nemo_dist_conf.families.spec import Family, Places
from nemo_dist_conf.wording import assigned, unknown_name

if TYPE_CHECKING:
    from nemo_dist_conf.families.built_shape import BuiltShape

__all__ = ["ModelShape", "Weight", "shape_of", "weights"]


@dataclass(frozen=True)
class Weight:
    """A parameter of the model. expert: the first dimension counts experts. name: relative to its block, if it has one.

    part: ``embedding``, ``attention``, ``mlp``, ``norm``, ``final_norm`` or ``head``; "": not told.
    layer: the class of torch.nn that it is of; "": as the part says, an Embedding or a Linear.
    trained: it gets a gradient; not one that is frozen, or that what is trained on does not depend on.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    expert: bool = False
    layer: str = ""
    trained: bool = True

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """Everything about a decoder that sizes and costs depend on.

    sparse: of each layer, whether experts take the place of its MLP. experts: 0 for a dense model.
    expert_width: of one expert's hidden layer. window: of sliding attention, None: all tokens before. whole_rows: of
    each layer, whether its mixer is run on whole rows under context parallelism. attention_dropout: probability that a
    weight of attention is 0 in training.
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
    whole_rows: tuple[bool, ...] = ()
    attention_dropout: float = 0.0

    @property
    def places(self) -> Places:
        """Where the parts of the model are."""
        return _row(self.model_type).places

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> those by which they are counted once."""
        places = self.places
        tie = {f"{places.head}.weight": f"{places.in_base(places.embedding)}.weight"}
        return tie if self.tied else {}

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

    def kind(self, layer: int) -> bool:
        """The kind of a layer: whether it is sparse."""
        return self.sparse[layer]

    def kinds(self, first: int = 0, last: int | None = None) -> dict[bool, int]:
        """How many of the layers first to last - 1 are dense (False) and sparse (True); those that occur."""
        held = self.sparse[first:last]
        return {kind: held.count(kind) for kind in (False, True) if kind in held}

    def block_name(self, layer: int) -> str:
        """The name of a layer in the whole model."""
        return self.places.block(layer)

    def block_weights(self, kind: int) -> tuple[Weight, ...]:
        """Weights of one layer of a kind, in the order in which backward has their gradients."""
        found: tuple[Weight, ...] = _weights_of(self.model_type).block_weights(self, bool(kind))
        return found

    def outer_weights(self) -> tuple[Weight, ...]:
        """Embedding, final norm and head, by their names in the whole model; tied ones once, as the embedding."""
        found: tuple[Weight, ...] = _weights_of(self.model_type).outer_weights(self)
        return found

    def outer_units(self, least: int) -> tuple[tuple[Weight, ...], tuple[Weight, ...], tuple[Weight, ...]]:
        """Outer weights of the embedding's unit, of the head's, and of the root.

        An embedding and a head have units of their own from ``least`` elements on, where they are not one parameter.
        """
        outer = self.outer_weights()
        is_large = not self.tied and self.vocab * self.hidden >= least
        return (outer[:1], outer[1:], ()) if is_large else ((), (), outer)

    def parts_named(self, names: list[str]) -> tuple[str, ...]:
        """Which parts outside of layers a pipeline stage holds that is given by the names of its modules."""
        leaves = {name.rpartition(".")[2] for name in names}
        places = self.places
        parts = ((places.embedding, "embedding"), (places.final_norm, "final_norm"), (places.head, "head"))
        return tuple(part for place, part in parts if place.rpartition(".")[2] in leaves)

    def plan(self, sequence_parallel: bool) -> Mapping[str, str]:
        """Tensor-parallel styles by pattern; empty where the family has none."""
        plans = (complete_plan(self.model_type, sequence_parallel=asked) for asked in (sequence_parallel, False))
        return next(filter(None, plans), {})  # without one that splits the sequence, the stream is followed


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a transformers config describes. Raises ConfigError for a family or a size that cannot be.

    config: its fields; what is absent has transformers' default.
    """
    family = find_family(config.get("model_type"))
    if family is None or family.shapes is None:
        raise ConfigError(_unknown(config.get("model_type")))
    fields, shapes = family.fields, family.shapes
    given = fields.own_names({key: value for key, value in config.items() if value is not None})
    said = {**shapes.defaults, **given}
    _refuse_sizes(family, said)
    layers, heads = said[fields.layers], said[fields.heads]
    sparse = tuple(shapes.is_sparse is not None and shapes.is_sparse(said, index) for index in range(layers))
    asks_for_none = fields.kv_heads in config and config[fields.kv_heads] is None
    window = bool(fields.window) and (not fields.window_switch or said.get(fields.window_switch))
    return ModelShape(
        model_type=family.name,
        hidden=said[fields.hidden],
        intermediate=said[fields.intermediate],
        layers=layers,
        heads=heads,
        kv_heads=heads if asks_for_none else said.get(fields.kv_heads, heads),
        head_dim=said.get(fields.head_dim, said[fields.hidden] // heads),
        vocab=said[fields.vocab],
        tied=bool(said.get(fields.tied)),
        qkv_bias=shapes.qkv_bias or bool(said.get(fields.attention_bias)),
        out_bias=bool(said.get(fields.attention_bias)),
        mlp_bias=bool(said.get(fields.mlp_bias)),
        qk_norm=shapes.qk_norm,
        experts=said.get(fields.experts, 0) if any(sparse) else 0,
        experts_per_token=said.get(fields.experts_per_token, 0) if any(sparse) else 0,
        expert_width=said[fields.expert_width] if any(sparse) else 0,
        sparse=sparse,
        window=said.get(fields.window) if window else None,
        whole_rows=tuple(any(kinds) for kinds in zip(*(mixer.layers(said, layers) for mixer in family.mixers))),
        attention_dropout=float(said.get("attention_dropout") or 0.0),
    )


def _unknown(model_type: object) -> Problem:
    return unknown_name(
        model_type,
        [family.name for family in families() if family.shapes is not None],
        what=f"sizes of a model of type {model_type} are not known",
        asked=assigned("model.config.model_type", model_type),
        offer=lambda known: assigned("model.config.model_type", known),
        # Fields of one family are not those of another; a model of the recipe brings its own.
        otherwise="model=llama3_8b",
    )


def _refuse_sizes(family: Family, said: Mapping[str, Any]) -> None:
    """ConfigError for every size that is no whole number above 0."""
    fields = family.fields
    sizes = [fields.vocab, fields.hidden, fields.intermediate, fields.layers, fields.heads]
    found = {key: said.get(key) for key in sizes}
    ConfigError.raise_if(
        Problem(
            what=f"model.config.{key}={value} is not a size",
            asked=f"model.config.{key}={value}",
            allowed="a whole number, 1 or more",
            instead=f"model.config.{key}={family.defaults.get(key, 1)}",
        )
        for key, value in found.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    )


def _row(model_type: str) -> Family:
    family = find_family(model_type)
    if family is None:
        raise AssertionError(f"{model_type} has a shape, so it has a row")
    return family


@functools.cache
def _weights_of(model_type: str) -> Any:
    """The module that knows the weights of a family that has shapes."""
    shapes = _row(model_type).shapes
    if shapes is None:
        raise AssertionError(f"{model_type} has a shape, so its row says how it is read")
    return importlib.import_module(shapes.weights)


def weights(shape: ModelShape | BuiltShape) -> list[tuple[str, Weight]]:
    """(name in the whole model, weight) of every parameter."""
    inside = [
        (f"{shape.block_name(layer)}.{weight.name}", weight)
        for layer in range(shape.layers)
        for weight in shape.block_weights(shape.kind(layer))
    ]
    return [*inside, *((weight.name, weight) for weight in shape.outer_weights())]
