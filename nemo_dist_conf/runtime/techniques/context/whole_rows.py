"""Modules that mix the tokens of a row by themselves: every rank runs them on whole rows, and keeps its own tokens.

For recurrences, convolutions and attentions that do not go through the registry of transformers. What such a module is
given is gathered over the cp ranks, in the order of the row; of what it returns, a rank goes on with its own tokens.
Backward scatters the gradients of what was gathered. Of a parameter, each rank has the gradient of its own tokens'
outputs, so that the sum over ranks is that of whole rows, as for every other parameter of the model. It is exact, and
saves neither time nor memory inside of the module.

Which tensors have tokens, and along which dim, is found by running the model on rows of two lengths.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, H heads.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.techniques.context.exchange import Exchange, RowMask

__all__ = ["COUNT", "Dims", "FLAT", "OnWholeRows", "TokenDims", "kept_tokens", "token_dims", "tokens_given"]

#: What has tokens: (), nothing; (d,), dim d; (d, e), two dims, as in a mask; FLAT, dim 0 is rows times tokens; COUNT, a
#: number that is how many tokens a row has.
Dims = tuple[int, ...]
FLAT: Dims = (-1,)
COUNT: Dims = (-2,)


@dataclass(frozen=True)
class TokenDims:
    """Of all that the forward of a class of modules takes and returns, by its place there, which dims are tokens."""

    given: Mapping[str, Dims]
    returned: Mapping[str, Dims]


def token_dims(model: nn.Module, kind: type, runs: Mapping[int, Callable[[], Any]], rows: int) -> TokenDims:
    """Of the modules of class ``kind``, by what they are given and return on rows of two lengths.

    runs: what runs the model on ``rows`` rows of so many tokens.
    Raises NotImplementedError where something has another number for every length that is not the length, or where
    what is returned is of rows: every rank would have it, and a loss of it would count several times.
    """
    (short, first), (long, second) = ((length, _shapes(model, kind, run)) for length, run in runs.items())
    if len(first) != len(second) or not first:
        raise NotImplementedError(f"{kind.__name__} is not run as often for rows of another length")
    found: tuple[dict[str, Dims], dict[str, Dims]] = ({}, {})
    for calls in zip(first, second):
        for side, (one, other) in enumerate(zip(*calls)):
            for place, shape in one.items():
                dims = _varying(place, shape, other.get(place), (short, long), rows, is_returned=side == 1)
                if found[side].setdefault(place, dims) != dims:
                    raise NotImplementedError(f"{place} of {kind.__name__} is not the same in every call")
    if not any(dims and dims != COUNT for dims in found[1].values()):
        raise NotImplementedError(f"{kind.__name__} returns nothing for each of a row's tokens")
    return TokenDims(*found)


def _shapes(model: nn.Module, kind: type, run: Callable[[], Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each call of a module of this class: the shapes that it was given, and those that it returned."""
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((_described(_by_name(module, args, kwargs)), _described(output)))

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules() if type(m) is kind]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _described(value: Any) -> dict[str, Any]:
    """Shapes of the tensors and the whole numbers in it, by their places."""
    found: dict[str, Any] = {}

    def describe(leaf: Any, place: str) -> None:
        if isinstance(leaf, Tensor):
            found[place] = tuple(leaf.shape)
        elif type(leaf) is int:
            found[place] = leaf

    _mapped(value, describe)
    return found


def _varying(place: str, one: Any, other: Any, lengths: tuple[int, int], rows: int, is_returned: bool) -> Dims:
    """Which dims of two shapes are the two lengths.

    Of what is returned it is the first one: of weights of queries and keys, a rank has its queries and all keys.
    """
    if type(one) is not type(other) or (isinstance(one, tuple) and len(one) != len(other)):
        raise NotImplementedError(f"{place} is not the same for rows of another length")
    if isinstance(one, int):
        if one == other:
            return ()
        if (one, other) == lengths:
            return COUNT
        raise NotImplementedError(f"{place} is {one} for {lengths[0]} tokens, and {other} for {lengths[1]}")
    dims = tuple(dim for dim, sizes in enumerate(zip(one, other)) if sizes[0] != sizes[1])
    sizes = [(one[dim], other[dim]) for dim in dims]
    if dims == (0,) and sizes[0] == (rows * lengths[0], rows * lengths[1]):
        return FLAT
    if is_returned:
        dims = dims[: sizes.index(lengths) + 1][-1:] if lengths in sizes else dims
    if len(dims) > 2 or any(one[dim] != lengths[0] for dim in dims):
        raise NotImplementedError(f"{place} has the shape {one} for {lengths[0]} tokens, {other} for {lengths[1]}")
    return dims


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward is given, by the names of its arguments."""
    return _signature(type(module).forward).bind(module, *args, **kwargs).arguments


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _mapped(value: Any, change: Callable[[Any, str], Any], place: str = "") -> Any:
    """The same with each leaf changed; what a leaf is in is a list, a tuple or a mapping. change: (leaf, its place)."""
    if isinstance(value, Mapping):
        changed = {key: _mapped(item, change, f"{place}.{key}") for key, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, change, f"{place}.{index}") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value, place.lstrip("."))


class OnWholeRows:
    """The forward of such a module."""

    def __init__(self, module: nn.Module, exchange: Exchange, dims: TokenDims) -> None:
        self.forward, self.exchange, self.dims = module.forward, exchange, dims
        self.kind = type(module)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        exchange = self.exchange
        if exchange.on_whole_rows:  # inside of another one
            return self.forward(*args, **kwargs)
        if exchange.row is None:
            raise exchange.refuse(f"{self.kind.__name__} was run outside of the model's forward", "model(input_ids)")
        length = exchange.row.length
        bound = _signature(self.kind.forward).bind(None, *args, **kwargs)
        bound.arguments = _mapped(bound.arguments, functools.partial(self._whole, length))
        with exchange.whole_rows():
            output = self.forward(*bound.args[1:], **bound.kwargs)
        return _mapped(output, functools.partial(self._own, length))

    def _whole(self, length: int, leaf: Any, place: str) -> Any:
        dims, exchange = self.dims.given.get(place), self.exchange
        if isinstance(leaf, RowMask):
            return leaf.tensor if dims or not leaf.may_be_none else None
        if dims == COUNT:
            return leaf * exchange.size
        if not isinstance(leaf, Tensor):
            return leaf
        if dims == ():
            return leaf
        if dims == FLAT and leaf.size(0) % length == 0:
            return exchange.whole(leaf.unflatten(0, (-1, length)), 1).flatten(0, 1)
        if dims and leaf.dim() > max(dims) and leaf.size(dims[0]) == length:
            if len(dims) == 1:
                return exchange.whole(leaf, dims[0])
            if leaf.size(dims[1]) == length * exchange.size:
                return exchange.whole(leaf, dims[0])
        what = f"{self.kind.__name__}, which is run on whole rows, was given {place} of shape {tuple(leaf.shape)}"
        raise exchange.refuse(f"{what}: it says nothing of other ranks' tokens", f"a part of {length} tokens of it")

    def _own(self, length: int, leaf: Any, place: str) -> Any:
        dims, exchange = self.dims.returned.get(place), self.exchange
        if dims == COUNT:
            return length
        if not isinstance(leaf, Tensor) or dims == ():
            return leaf
        if dims == FLAT:
            whole = length * exchange.size
            return exchange.own(leaf.unflatten(0, (-1, whole)), 1).flatten(0, 1)
        if dims and leaf.dim() > max(dims):
            return exchange.own(leaf, dims[0])
        what = f"{self.kind.__name__}, which is run on whole rows, returned {place or 'a tensor'}"
        raise exchange.refuse(f"{what} of shape {tuple(leaf.shape)}", "what it returned when it was tried")


def tokens_given(module: nn.Module, args: Any, kwargs: Mapping[str, Any], dims: TokenDims) -> list[Tensor]:
    """Of what a module that is run on whole rows is given, the tensors that are gathered for it.

    Without masks, of which every rank makes those for whole rows.
    """
    found: list[Tensor] = []

    def look(leaf: Any, place: str) -> None:
        token_dims = dims.given.get(place, ())
        if isinstance(leaf, Tensor) and len(token_dims) == 1 and token_dims != COUNT:
            found.append(leaf)

    _mapped(_by_name(module, args, kwargs), look)
    return found


def kept_tokens(output: Any, before: Any, dims: TokenDims, rows: int, length: int, changed: int) -> Any:
    """``before`` with the tokens of ``output`` at the place ``changed``; of what has no tokens, as before.

    What a module would return that mixes nothing: for a trial that looks for mixing elsewhere.
    """
    leaves: dict[str, Any] = {}
    _mapped(output, lambda leaf, place: leaves.setdefault(place, leaf))

    def put(leaf: Any, place: str) -> Any:
        found = dims.returned.get(place, ())
        if not isinstance(leaf, Tensor) or found in ((), COUNT):
            return leaf
        kept, new = leaf.clone(), leaves[place]
        view, other = (t.unflatten(0, (rows, length)) if found == FLAT else t for t in (kept, new))
        dim = 1 if found == FLAT else found[0]
        view.select(dim, changed).copy_(other.select(dim, changed))
        return kept

    return _mapped(before, put)
