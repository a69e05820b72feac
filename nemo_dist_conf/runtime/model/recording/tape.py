"""What a constructor did to the values of its tensors, operator by operator, and which of it a tensor depends on.

A tensor on the meta device has a shape and a storage without memory. The tape knows, for every such storage, the
operators that wrote it, or its values where they are constants. Views need no entry: an operator's arguments are kept
as what they are of their storages.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

__all__ = ["Constant", "Op", "Ref", "Stored", "Tape", "as_bytes", "leaves", "mapped"]


class Stored:
    """A storage of the constructor.

    meta: it, kept so that its number is not given to another one. real: its values on the CPU, while they are known.
    is_shared: an entry of the tape reads ``real``, so that it has to be copied before it is written.
    array: one of numpy that the constructor was given, in the memory of ``real``.
    writes: entries of the tape that wrote it, as (index, whether nothing of what was there before is left).
    """

    __slots__ = ("meta", "real", "is_shared", "array", "writes")

    def __init__(self, meta: torch.UntypedStorage, real: torch.UntypedStorage | None = None) -> None:
        self.meta, self.real, self.is_shared = meta, real, False
        self.array: Callable[[], Any] = lambda: None
        self.writes: list[tuple[int, bool]] = []

    @property
    def nbytes(self) -> int:
        return self.meta.nbytes()

    @property
    def is_open(self) -> bool:
        """The constructor may write ``real`` without an operator, in an array of numpy or the like."""
        return self.real is not None and (self.array() is not None or not self.real.resizable())

    @property
    def is_unset(self) -> bool:
        """Nothing was ever written to it."""
        return self.real is None and not self.writes


class Ref(NamedTuple):
    """A tensor as a part of its storage."""

    stored: Stored
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """The same part of another storage."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.size, self.stride
        )

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its storage, each element once."""
        if self.nbytes != self.stored.nbytes or self.offset:
            return False
        if not self.nbytes:
            return True
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class Constant:
    """An argument whose values are known."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Op:
    """An entry of the tape.

    func: None: the constant is the storage's new content. args, kwargs: tensors in them are Refs and Constants.
    outs: new tensors that it returned, each with its place among all that it returned.
    written: storages that it wrote, those of outs included. fresh: those of them whose earlier content does not matter.
    is_random: it draws numbers, from a generator seeded by its key, or from one in this state (``state``).
    again: the draw whose numbers it draws once more, because the constructor put its generator back.
    only_moves: it moves or fills values without computing with them, so any device gives the same.
    takes_device: it has to be told where to make what it returns.
    """

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.outs: list[tuple[int, Ref]] = []
        self.written: list[Stored] = []
        self.fresh: list[Stored] = []
        self.is_random = self.only_moves = self.takes_device = False
        self.state: Tensor | None = None
        self.again: Op | None = None
        self._key = ""

    @property
    def key(self) -> str:
        return self._key if self.again is None else self.again.key

    @key.setter
    def key(self, key: str) -> None:
        if self.again is None:
            self._key = key
        else:
            self.again.key = key

    @functools.cached_property
    def reads(self) -> list[Stored]:
        """Storages whose earlier content it needs."""
        found = [leaf.stored for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]
        return [stored for stored in found if stored not in self.fresh]


class Tape:
    """Everything that a constructor did to values, in order."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def add(self, op: Op) -> None:
        index = len(self.ops)
        self.ops.append(op)
        for stored in op.written:
            stored.writes.append((index, stored in op.fresh))

    def slice_of(self, refs: Iterable[Ref]) -> list[int]:
        """Indices of the operators that these tensors' values depend on, in order.

        What was overwritten as a whole before it was read is left out, as torch's own start of a layer that the model
        then sets otherwise.
        """
        needed: set[int] = set()
        seen: set[tuple[int, int]] = set()
        todo = [(ref.stored, len(self.ops)) for ref in refs if ref.stored.real is None]
        while todo:
            stored, before = todo.pop()
            for index, overwrites in reversed(stored.writes):
                if index >= before:
                    continue
                if (id(stored), index) in seen:
                    break
                seen.add((id(stored), index))
                if index not in needed:
                    needed.add(index)
                    todo.extend((read, index) for read in self.ops[index].reads)
                if overwrites:
                    break
        return sorted(needed)

    def name_draws(self, named: Mapping[str, Ref], called: Callable[[str], str] = lambda name: name) -> list[list[str]]:
        """Give every operator that draws a key: the first name that it flows into, and its number there.

        So what is drawn depends neither on how the model is laid out nor on its other layers, and values derived from
        it (a copy, a norm, parts of one draw) see the same numbers wherever they are played back.
        called: what a name is in a key, for names that are not the model's own.
        Returns the names in groups: those together that come from one large draw, which is then drawn once. A group's
        values are at most twice as large as that draw, so that memory stays bounded.
        """
        groups: list[list[str]] = []
        sizes: list[int] = []
        group_of: dict[int, int] = {}  # by the number of a draw
        for name, ref in named.items():
            draws = [index for index in self.slice_of([ref]) if self.ops[index].is_random]
            for number, index in enumerate(draws):
                self.ops[index].key = self.ops[index].key or f"{called(name)}/{number}"
            drawn = {index: sum(stored.nbytes for stored in self.ops[index].written) for index in draws}
            large = [index for index in draws if drawn[index] >= ref.nbytes]
            limit = 2 * max((drawn[index] for index in large), default=0)
            known = sorted({group_of[index] for index in large if index in group_of})
            group = next((group for group in known if sizes[group] + ref.nbytes <= limit), len(groups))
            if group == len(groups):
                groups.append([])
                sizes.append(0)
            groups[group].append(name)
            sizes[group] += ref.nbytes
            group_of.update(dict.fromkeys(large, group))
        return groups


def leaves(value: Any) -> Iterator[Any]:
    """What stands in the arguments of an operator."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (tuple, list, dict)) and not isinstance(item, Ref):
            yield from leaves(item)
        else:
            yield item


def mapped(value: Any, kinds: tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """The arguments of an operator, or what it returned, with every leaf of these classes changed."""
    if isinstance(value, kinds):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, kinds, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: mapped(item, kinds, change) for key, item in value.items()} if value else {}
    return value


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
