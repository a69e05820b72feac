"""Which part of every parameter a rank holds: exact, for any rank, without building anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Iterator

from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.shapes import ModelShape, Weight
from nemo_dist_conf.families.styles import STYLES
from nemo_dist_conf.plan.job import Job, Stage, Styles

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Place",
    "Unit",
    "gathered_bytes",
    "held_elements",
    "padded",
    "stage_units",
    "tp_shape",
    "trained_part",
    "trained_units",
    "units_of",
]

#: Layers of units that are outside of layers: the root, or in its place an embedding and a head with the final norm.
_ROOT, EMBEDDING, HEAD = -1, -2, -3


@dataclass(frozen=True)
class Place:
    """A rank's index along the axes that split parameters: tp, shards of the dense part, ep and ep_shard."""

    tp: int = 0
    shard: int = 0
    ep: int = 0
    ep_shard: int = 0


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that are gathered and reduced together. layer: _ROOT, EMBEDDING or HEAD for what is outside of layers.

    count: how many such units a stage has. weights: (name in the whole model of one of them, weight).
    expert: split over ep first, then over ep_shard along the second dimension.
    has_last: one is in the stage's last block.
    """

    title: str
    layer: int
    count: int
    weights: tuple[tuple[str, Weight], ...]
    expert: bool = False
    has_last: bool = False


@dataclass(frozen=True)
class _Split:
    """How a job splits parameters: ranks of each kind, and whether they rest in shards."""

    styles: Styles
    tp: int
    shards: int
    ep: int
    ep_shard: int
    rests_sharded: bool


def _chunk(size: int, parts: int, index: int) -> int:
    """Rows of part ``index`` when torch cuts ``size`` rows into ``parts``: the first ones are full, the last may be 0.

    Source: torch.chunk, which DTensor and fully_shard follow.
    """
    each = -(-size // parts)
    return max(0, min(each, size - each * index))


def padded(size: int, parts: int) -> int:
    """The same size made divisible, as collectives need it."""
    return -(-size // parts) * parts


def units_of(job: Job, stage: Stage) -> tuple[Unit, ...]:
    """The units of a stage, as the strategy makes them."""
    return job.costs.units(job, stage)


@lru_cache(maxsize=4096)
def stage_units(
    model: ModelShape | BuiltShape, stage: Stage, splits_experts: bool = False, outer_from: int | None = None
) -> tuple[Unit, ...]:
    """A unit for each block of a stage, for a block's experts where they are split apart, and for the rest.

    outer_from: elements from which on an embedding, and a head with the final norm, are units of their own; None: they
    are none. The same arguments give the same objects, by which other answers are remembered.
    """
    found: list[Unit] = []
    for kind, count in model.kinds(stage.first, stage.last).items():
        layer = next(i for i in range(stage.first, stage.last) if model.kind(i) == kind)
        block = model.block_name(layer)
        held = tuple((f"{block}.{w.name}", w) for w in model.block_weights(kind))
        experts = tuple(entry for entry in held if entry[1].expert and splits_experts)
        title, is_last = "sparse block" if model.sparse[layer] else "block", kind == model.kind(stage.last - 1)
        rest = tuple(entry for entry in held if entry not in experts)
        found.append(Unit(title, layer, count, rest, has_last=is_last))
        if experts:
            found.append(Unit("experts", layer, count, experts, expert=True, has_last=is_last))
    tied = {"head": "embedding"} if model.tied else {}  # the last stage has a copy
    parts = {tied.get(part, part) for part in stage.outer}
    front, back, root = model.outer_units(outer_from) if outer_from is not None else ((), (), model.outer_weights())
    for title, number, weights in (("embedding", EMBEDDING, front), ("head", HEAD, back), ("root", _ROOT, root)):
        outer = tuple((w.name, w) for w in weights if w.part in parts)
        found += [Unit(title, number, 1, outer)] if outer else []
    return tuple(found)


def trained_units(job: Job, stage: Stage) -> tuple[Unit, ...]:
    """The units of a stage without what is not trained or gets no gradient.

    Blocks of which other parts are trained count apart.
    """
    return tuple(part for unit in units_of(job, stage) for part in trained_part(job, stage, unit))


def trained_part(job: Job, stage: Stage, unit: Unit) -> tuple[Unit, ...]:
    """What is trained of all units of a kind."""
    return _trained(job.model, stage, unit, job.untrained)


@lru_cache(maxsize=4096)
def _trained(model: ModelShape | BuiltShape, stage: Stage, unit: Unit, untrained: frozenset[str]) -> tuple[Unit, ...]:
    if not untrained and all(weight.trained for _, weight in unit.weights):
        return (unit,)
    if unit.layer < 0:
        held = tuple((name, weight) for name, weight in unit.weights if weight.trained and name not in untrained)
        return (replace(unit, weights=held),) if held else ()
    first, kind = model.block_name(unit.layer), model.kind(unit.layer)
    found: dict[tuple[int, ...], list[int]] = {}
    for layer in (layer for layer in range(stage.first, stage.last) if model.kind(layer) == kind):
        names = [model.block_name(layer) + name.removeprefix(first) for name, _ in unit.weights]
        trained = (one.trained and name not in untrained for name, (_, one) in zip(names, unit.weights))
        kept = tuple(place for place, is_trained in enumerate(trained) if is_trained)
        found.setdefault(kept, []).append(layer)
    return tuple(
        replace(unit, count=len(layers), weights=tuple(unit.weights[place] for place in kept))
        for kept, layers in found.items()
        if kept
    )


def tp_shape(styles: Styles, tp: int, name: str, weight: Weight, index: int) -> tuple[int, ...]:
    """A weight's shape on rank ``index`` of an axis of ``tp`` ranks. name: in the whole model."""
    style = STYLES.get(styles.of(name)) if tp > 1 else None
    if style is None:
        return weight.shape
    layer = weight.layer or ("Embedding" if weight.part == "embedding" else "Linear")
    dim, packed = style.split_dim(layer, len(weight.shape)), style.packed
    if packed > 1 and name.endswith(".bias") and not styles.of_module(name):
        return weight.shape  # of a layer that is several in one, every rank's in full
    return tuple(
        packed * _chunk(size // packed, tp, index) if d == dim else size for d, size in enumerate(weight.shape)
    )


def _split_of(job: Job) -> _Split:
    return _Split(job.styles, job.tp, job.shards, job.ep, job.ep_shard, job.costs.rests_sharded(job))


def held_elements(job: Job, unit: Unit, place: Place) -> int:
    """Elements of one such unit on a rank, sharded as they rest between steps."""
    return _held(unit, _split_of(job), place)


@lru_cache(maxsize=65536)
def _held(unit: Unit, split: _Split, place: Place) -> int:
    index = place.ep_shard if unit.expert else place.shard
    return sum(
        outer * (_chunk(size, parts, index) if split.rests_sharded else size)
        for outer, size, parts in _dimensions(unit, split, place.tp, place.ep)
    )


def _dimensions(unit: Unit, split: _Split, tp: int, ep: int) -> Iterator[tuple[int, int, int]]:
    """For each weight after tp and ep: elements beside the dimension that shards cut, its size, and the shards.

    Shards cut experts along the second dimension, because ep cuts the first, and everything else along the first.
    """
    for name, weight in unit.weights:
        if not weight.shape:  # whole on every rank
            yield 1, 1, 1
        elif unit.expert:
            experts, size, *rest = weight.shape
            yield _chunk(experts, split.ep, ep) * prod(rest), size, split.ep_shard
        else:
            size, *rest = tp_shape(split.styles, split.tp, name, weight, tp)
            yield prod(rest), size, split.shards


def gathered_bytes(job: Job, unit: Unit, item: int, tp: int = 0) -> int:
    """Bytes of one such unit when it is gathered, padded for equal parts.

    item: bytes of an element; tp: the rank's index on that axis.
    """
    return item * _gathered(unit, _split_of(job), tp)


@lru_cache(maxsize=65536)
def _gathered(unit: Unit, split: _Split, tp: int) -> int:
    return sum(outer * padded(size, parts) for outer, size, parts in _dimensions(unit, split, tp, 0))
