"""Sequence parallelism for a model whose plan splits features only: its residual stream followed in a run.

A plan of tensor parallelism says which layers share their features, and nothing of what lies between them. What does
is seen in one run of the plain twin: what the blocks hand on [batch, seq, hidden] is the stream, and each module of a
block, and each module after the blocks, has one of a few parts in it (``_in_block``, ``_outside``). Code between the
modules works on the stream as it is, a DTensor that is split over the sequence, or ends in an error. Nothing of this is
believed: tensor/trial.py holds each way against the plain model, and the first that computes the same is taken.

Names of sizes: B rows, S tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.families.styles import SEQUENCE_STYLES, sequence_twin
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.model.trial import differ, noted, standing_for, tensors_of
from nemo_dist_conf.runtime.torch_inside import holds_experts

__all__ = ["CannotFollow", "not_followed", "refuse_shared_parameters", "sequence_ways"]

#: Styles whose layers take a DTensor of any layout, so that they gather the stream for themselves.
_TAKES_STREAM = frozenset({"colwise", "colwise_gather_output", "packed_colwise"})

_Styles = dict[str, Any]


class CannotFollow(Exception):
    """There is no residual stream to split, in words."""


@dataclass(frozen=True)
class _Call:
    """One call of a module, with the tensors themselves, so that their memory is not used again."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def given(self) -> list[Tensor]:
        """Tensors that are arguments themselves, not parts of one."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    @property
    def returned(self) -> Tensor | None:
        return next(iter(tensors_of(self.output)), None)


def sequence_ways(
    model: nn.Module, blocks: list[str], styles: Mapping[str, Any], inputs: Mapping[str, Any]
) -> list[_Styles]:
    """Styles of tensor and sequence parallelism by module name, in several ways, that of the least traffic first.

    model: a plain twin that runs on ``inputs``; its modules are called as the model's. blocks: their names. styles:
    those of tensor parallelism. Raises CannotFollow.
    """
    calls = noted(model, inputs, _Call)
    stack = _split_blocks(blocks, styles)
    made = {call.name: call for call in calls}
    run = [name for name in stack if name in made]
    standing = standing_for(model, stack)
    entries = {name: _entry(made[name], styles) for name in run}
    ways = []
    for fused, ends_split in ((True, True), (False, True), (False, False)):
        way = dict(styles)
        for name in stack:
            alike = standing.get(name, name)
            inside = [call for call in calls if call.name.startswith(f"{alike}.")]
            found = _in_block(model, alike, inside, styles, fused) if alike in made else {}
            way |= {name + part.removeprefix(alike): style for part, style in found.items()}
            way[name] = entries[alike] if alike in entries else "scatter_input"
        way |= _outside(model, calls, run, styles, ends_split)
        _refuse_shared(model, way)
        if way not in ways:
            ways.append(way)
    return ways


def refuse_shared_parameters(model: nn.Module, blocks: list[str]) -> None:
    """CannotFollow for a parameter of several blocks: in each of them its gradients would be of another kind."""
    for names in tied_names(model):
        if len({block for name in names for block in blocks if name.startswith(f"{block}.")}) > 1:
            raise CannotFollow(f"{names[0]} and {names[1]} are one parameter, of several blocks")


def _refuse_shared(model: nn.Module, way: _Styles) -> None:
    """A module of several blocks would be split once for each of them."""
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        known = names[id(module)]
        if known != name and any(f"{styled}.".startswith((f"{name}.", f"{known}.")) for styled in way):
            raise CannotFollow(f"{known} and {name} are one {type(module).__name__}")


# What was called with what.


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two are one tensor: what drops nothing out hands on what it was given."""
    return one is not None and other is not None and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _is_stream(x: Tensor | None, like: torch.Size | None = None) -> bool:
    """Whether a tensor is [batch, seq, ..., features], of the same rows and tokens as another."""
    if x is None or x.dim() < 3 or not x.is_floating_point():
        return False
    return like is None or x.shape[:2] == like[:2]


def _stream_of(call: _Call) -> Tensor:
    x = next(iter(call.given), None)
    if x is None or not _is_stream(x):
        shape = "no tensor" if x is None else list(x.shape)
        raise CannotFollow(f"{call.name} ({type(call.module).__name__}) is given {shape}, not [batch, seq, hidden]")
    return x


def _entry(block: _Call, styles: Mapping[str, Any]) -> str | tuple[str, ...]:
    """How a block takes the stream, what else it is given that is [batch, seq, ...], and parameters of its own."""
    x = _stream_of(block)
    several = sum(_is_stream(given, x.shape) for given in block.given) > 1
    entry = "scatter_inputs" if several else "scatter_input"
    own = [key for key, _ in block.module.named_parameters(recurse=False) if f"{block.name}.{key}" not in styles]
    return (entry, "sequence_parameters") if own else entry


def _split_blocks(blocks: list[str], styles: Mapping[str, Any]) -> list[str]:
    """The blocks of each list of which one has a layer that is split: the stream runs through all of them."""
    lists = {name.rpartition(".")[0] for name in blocks if _inside(name, styles)}
    found = [name for name in blocks if name.rpartition(".")[0] in lists]
    if not found:
        raise CannotFollow("its plan splits no layer of a repeated block")
    return found


def _inside(name: str, styles: Mapping[str, Any]) -> _Styles:
    return {other: style for other, style in styles.items() if other.startswith(f"{name}.")}


# What each module does with the stream.


def _in_block(model: nn.Module, block: str, calls: list[_Call], styles: Mapping[str, Any], fused: bool) -> _Styles:
    """Styles of the parts of a block, and of the layers in them that give their sum split.

    fused: parts of which only layers that gather for themselves take the stream get one DTensor for all of them, whose
    gradient is summed and split at once; else every part gets a plain tensor.
    """
    found: _Styles = {}
    made: dict[str, list[_Call]] = {}
    for call in calls:
        made.setdefault(call.name, []).append(call)
    for name in _parts(block, model.get_submodule(block), made):
        call, style, inner = made[name][0], styles.get(name), _inside(name, styles)
        style = None if style == "gather_input" else style  # which is found again where it fits
        x = next((given for given in call.given if _is_stream(given)), None)
        if x is None:
            continue
        if style in _TAKES_STREAM or (isinstance(style, str) and sequence_twin(style) != style):
            found[name] = sequence_twin(style)
        elif style is not None:  # what it does as well
            found[name] = (style, _whole(call, x))
        elif not inner:
            if not isinstance(call.module, nn.Dropout):  # which takes a DTensor as it is
                found[name] = _unsplit(call, x)
        else:
            summed = [last for last, its in inner.items() if its == "rowwise" and _ends_in(call, made.get(last))]
            readers = [c for c in calls if c.name.startswith(f"{name}.") and any(_same(x, other) for other in c.given)]
            leaves = [c.name for c in readers if next(c.module.children(), None) is None]
            if fused and summed and leaves and all(inner.get(leaf) in _TAKES_STREAM for leaf in leaves):
                found[name] = "gather_input"
            else:
                found[name] = _whole(call, x, bool(summed))
            found |= {last: sequence_twin("rowwise") for last in summed}
    return found


def _parts(name: str, module: nn.Module, made: Mapping[str, Any]) -> Iterator[str]:
    """The outermost modules inside that were called: of a list of modules its members."""
    for key, child in module.named_children():
        inner = f"{name}.{key}"
        if inner in made:
            yield inner
        else:
            yield from _parts(inner, child, made)


def _ends_in(call: _Call, layer: list[_Call] | None) -> bool:
    return (
        layer is not None and len(layer) == 1 and _is_stream(call.returned) and _same(call.returned, layer[0].returned)
    )


def _whole(call: _Call, x: Tensor, is_split: bool = False) -> str:
    """A part that needs whole rows; is_split: what it returns is split already."""
    back, flat = call.returned, (x.shape[:2].numel(), *x.shape[2:])
    is_stream = back is not None and back.shape in (x.shape, flat)
    return "whole_sequence" if is_stream and not is_split else "whole_inputs"


def _unsplit(call: _Call, x: Tensor) -> str:
    """Experts see all tokens on every rank, because how these spread over them is counted and balanced; what drops out
    does too, because ranks that have drawn other numbers of tokens would no longer draw the same."""
    needs_all = any(holds_experts(module) or isinstance(module, nn.Dropout) for module in call.module.modules())
    return "sequence_parallel" if not needs_all and _is_by_token(call, x) else _whole(call, x)


def _is_by_token(call: _Call, x: Tensor) -> bool:
    """Whether a module does the same to each token alone, as tried on the two halves of a row."""
    given, returned = tensors_of((call.args, call.kwargs)), tensors_of(call.output)
    if len(given) != len(call.given) or not returned or x.size(1) < 2:
        return False
    if not all(_is_stream(tensor, x.shape) for tensor in (*given, *returned)):
        return False
    with torch.no_grad():
        try:
            halves = [tensors_of(_again(call, half)) for half in range(2)]
        except Exception:  # whatever a module's own code raises of half a row
            return False
    joined = [torch.cat(parts, dim=1) for parts in zip(*halves)]
    return len(joined) == len(returned) and not any(
        one.shape != other.shape or differ(one, other) for one, other in zip(returned, joined)
    )


def _again(call: _Call, half: int) -> Any:
    def cut(value: Any) -> Any:
        return value.tensor_split(2, dim=1)[half] if isinstance(value, Tensor) else value

    return call.module(*map(cut, call.args), **{key: cut(value) for key, value in call.kwargs.items()})


def _outside(
    model: nn.Module, calls: list[_Call], blocks: list[str], styles: Mapping[str, Any], ends_split: bool
) -> _Styles:
    """Styles of what stands before and after the blocks.

    ends_split: what follows the last block works on its part of the sequence where it does the same to each token.
    """
    order = [call.name for call in calls]
    first, last = (calls[order.index(name)] for name in (blocks[0], blocks[-1]))
    outer = {c.name: c for c in calls if not any(f"{c.name}.".startswith(f"{block}.") for block in blocks)}
    after = {id(call) for call in calls[order.index(blocks[-1]) + 1 :]}
    before = [call for call in outer.values() if id(call) not in after]
    found: _Styles = {}
    split = [last.returned]
    for name in sorted(_outer_parts(model, "", outer, blocks), key=order.index):
        call, style = outer[name], styles.get(name)
        x = next((given for given in call.given if _is_stream(given)), None)
        if id(call) not in after:
            if style == "embedding_rowwise" and _same(call.returned, _stream_of(first)):
                readers = (c.module for c in before if any(_same(call.returned, given) for given in c.given))
                if not any(next(reader.parameters(), None) is not None for reader in readers):
                    found[name] = sequence_twin(style)
        elif x is not None and style not in _TAKES_STREAM:
            is_norm = call.returned is not None and call.returned.size(-1) == x.size(-1)  # and not the head
            alone = (
                style in (None, "replicated") and not _inside(name, styles) and not isinstance(call.module, nn.Linear)
            )
            is_read = ends_split and any(_same(x, one) for one in split)
            is_next = is_read and alone and is_norm and _is_by_token(call, x)
            found[name] = "sequence_parallel" if is_next else "whole_inputs"
            split += [call.returned] if is_next else []
    return found


def _outer_parts(module: nn.Module, prefix: str, made: Mapping[str, _Call], blocks: list[str]) -> Iterator[str]:
    """The outermost modules without a block inside that were called."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if any(block == name for block in blocks):
            continue
        if any(block.startswith(f"{name}.") for block in blocks) or name not in made:
            yield from _outer_parts(child, f"{name}.", made, blocks)
        else:
            yield name


def not_followed(model: nn.Module, why: str, typed_plan: str) -> Problem:
    """The refusal of sequence parallelism where the residual stream ends. typed_plan: words of a plan, or none."""
    what = "sequence_parallel is on, but no entry of the model's tp_plan splits the sequence, and the residual stream "
    what += f"of {type(model).__name__} cannot be followed: {why}"
    asked = f"strategy.sequence_parallel=true{f' {typed_plan}' if typed_plan else ''}"
    allowed = f"the plan without it, or one with at least one of {', '.join(sorted(SEQUENCE_STYLES))}"
    return Problem(what=what, asked=asked, allowed=allowed, instead="strategy.sequence_parallel=false")
