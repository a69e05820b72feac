"""What running a module changes besides its output, so that a second run of it can leave no trace."""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.torch_inside import own_buffers

__all__ = ["ForwardState", "Taken", "generators_kept"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class _Slot:
    """Where a value is: an attribute or buffer of a module, or one of Python's generators (module None)."""

    module: nn.Module | None
    key: str

    def get(self) -> Any:
        if self.module is None:
            return random.getstate() if self.key == "random" else _numpy().random.get_state(legacy=False)
        buffers = own_buffers(self.module)
        return buffers[self.key] if self.key in buffers else vars(self.module).get(self.key)

    def set(self, value: Any) -> None:
        if self.module is None:
            random.setstate(value) if self.key == "random" else _numpy().random.set_state(value)
        elif self.key in own_buffers(self.module):
            own_buffers(self.module)[self.key] = value
        else:
            vars(self.module)[self.key] = value


@dataclass(frozen=True)
class _Value:
    """What a slot held; of a tensor also its values, which may be written over in place."""

    held: Any
    values: Tensor | None = None

    @classmethod
    def of(cls, slot: _Slot) -> _Value:
        held = slot.get()
        return cls(held, held.detach().clone()) if isinstance(held, Tensor) else cls(held)

    def is_now_in(self, slot: _Slot) -> bool:
        now = slot.get()
        if self.values is not None:  # not by the version: batch norm leaves it as it is
            return now is self.held and torch.equal(now, self.values)
        if slot.module is None and slot.key == "numpy":
            ours, theirs = now["state"], self.held["state"]
            return ours["pos"] == theirs["pos"] and bool((ours["key"] == theirs["key"]).all())
        return type(now) is type(self.held) and bool(now == self.held)

    def put_into(self, slot: _Slot) -> None:
        if slot.get() is not self.held:
            slot.set(self.held)
        if self.values is not None:
            self.held.data.copy_(self.values)  # .data: what autograd has saved of it is not to count as changed


Taken = dict[_Slot, _Value]


@dataclass
class ForwardState:
    """Buffers and plain attributes of a module and those inside it, and Python's and numpy's generators.

    changing: of these, what a run was seen to change; None before the first. Lists, dicts and other objects are not
    looked into.
    """

    module: nn.Module
    changing: list[_Slot] | None = field(default=None, init=False)

    def take(self) -> Taken:
        """The state now: all of it before the first run, then what runs change."""
        slots = list(self._slots()) if self.changing is None else self.changing
        return {slot: _Value.of(slot) for slot in slots}

    def learn(self, before: Taken) -> None:
        """Note what has changed since ``before``, which keeps no more than that."""
        if self.changing is None:
            self.changing = [slot for slot, value in before.items() if not value.is_now_in(slot)]
        for slot in set(before) - set(self.changing):
            del before[slot]

    @contextlib.contextmanager
    def as_it_was(self, before: Taken) -> Iterator[None]:
        """Inside, the state is the one taken; afterwards, the one that there was."""
        now = {slot: _Value.of(slot) for slot in before}
        for slot, value in before.items():
            value.put_into(slot)
        try:
            yield
        finally:
            for slot, value in now.items():
                value.put_into(slot)

    def _slots(self) -> Iterator[_Slot]:
        for module in self.module.modules():
            yield from (_Slot(module, key) for key, buffer in own_buffers(module).items() if buffer is not None)
            for key, value in vars(module).items():
                if key not in _OF_EVERY_MODULE and isinstance(value, (Tensor, *_PLAIN)):
                    yield _Slot(module, key)
        yield from _generators()


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards torch's on the CPU, Python's and numpy's are as they were."""
    before = {slot: slot.get() for slot in _generators()}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for slot, state in before.items():
                slot.set(state)


def _generators() -> Iterator[_Slot]:
    yield _Slot(None, "random")
    if "numpy" in sys.modules:
        yield _Slot(None, "numpy")


def _numpy() -> Any:
    return sys.modules["numpy"]
