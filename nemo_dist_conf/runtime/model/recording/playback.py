"""Values of tensors, played back from a tape (runtime/model/recording/tape.py)."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any, Sequence

import torch
from torch import Tensor

from nemo_dist_conf.runtime.model.recording.tape import Constant, Op, Ref, Stored, Tape, as_bytes, leaves, mapped
from nemo_dist_conf.runtime.torch_inside import generator_of

__all__ = ["Player"]

_CPU = torch.device("cpu")


class Player:
    """Plays tensors back, inside a ``with``; torch's generators are as before after it.

    What is drawn comes from (seed, the draw's key) and is drawn on ``device``. What is computed from constants alone is
    computed on the CPU, as a constructor does, so that it is exact.
    """

    def __init__(self, tape: Tape, seed: int, device: torch.device) -> None:
        self._tape, self._seed, self._device = tape, seed, device
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Player:
        cuda = [self._device] if self._device.type == "cuda" else []
        self._context.enter_context(torch.random.fork_rng(devices=cuda))
        self._context.enter_context(torch.no_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()

    def play(self, refs: Sequence[Ref], into: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """The tensors' values at the end of the tape; those of one storage share memory.

        Memory is freed as soon as nothing needs it any more.
        into: tensors in whose memory values may be made at once; only what is returned counts.
        """
        if all(ref.stored.real is not None for ref in refs):
            return [ref.of(ref.stored.real) for ref in refs if ref.stored.real is not None]
        usable = [(ref, target) for ref, target in zip(refs, into) if target is not None and _is_place(ref, target)]
        places = {ref.stored: target.untyped_storage() for ref, target in usable}
        ops = [self._tape.ops[index] for index in self._tape.slice_of(refs)]
        last: dict[Stored, Op] = {stored: op for op in ops for stored in (*op.written, *op.reads)}
        for ref in refs:
            last.pop(ref.stored, None)
        run = _Run(self._device, self._seed, places)
        for op in ops:
            run.step(op)
            for stored in {*op.written, *op.reads}:
                if last.get(stored) is op:
                    run.storages.pop(stored, None)
        return [ref.of(run.storage(ref.stored) if ref.stored.real is None else ref.stored.real) for ref in refs]


def _is_place(ref: Ref, target: Tensor) -> bool:
    if not ref.is_whole or target.dtype != ref.dtype:
        return False
    same = tuple(target.shape) == ref.size and target.stride() == ref.stride and not target.storage_offset()
    return same and target.untyped_storage().nbytes() == ref.stored.nbytes


class _Run:
    """The storages of one playback.

    drawn: those that a random number went into; the others stay exact.
    """

    def __init__(self, device: torch.device, seed: int, places: dict[Stored, torch.UntypedStorage]) -> None:
        self.device, self.seed, self.places = device, seed, places
        self.storages: dict[Stored, torch.UntypedStorage] = {}
        self.drawn: set[Stored] = set()

    def storage(self, stored: Stored) -> torch.UntypedStorage:
        if stored not in self.storages:
            as_bytes(self.make(stored, self.device)).zero_()  # read before anything was written to it
        return self.storages[stored]

    def make(self, stored: Stored, device: torch.device) -> torch.UntypedStorage:
        made = self.places.get(stored)
        if made is None or made.device != device:
            made = torch.UntypedStorage(stored.nbytes, device=device)
        self.storages[stored] = made
        return made

    def step(self, op: Op) -> None:
        device = self.place(op)
        returned = [out.stored for _, out in op.outs]
        for stored in op.written:
            if stored in op.fresh:
                if stored not in returned:
                    self.make(stored, device)
            elif self.storage(stored).device != device:
                moved = self.storages.pop(stored)
                self.make(stored, device).copy_(moved)
        if op.func is None:
            self.storages[op.written[0]].copy_(op.args[0].tensor.untyped_storage())
            return
        if op.is_random:
            self.seed_draw(op, device)

        def value(leaf: Ref | Constant) -> Tensor:
            return (leaf.of(self.storage(leaf.stored)) if isinstance(leaf, Ref) else leaf.tensor).to(device)

        options = mapped(op.kwargs, (Ref, Constant), value)
        if op.takes_device:
            options["device"] = device
        found = op.func(*mapped(op.args, (Ref, Constant), value), **options)
        if op.outs:
            results = [leaf for leaf in leaves((found,)) if isinstance(leaf, Tensor)]
            for place, out in op.outs:
                self.take(out, results[place])

    def seed_draw(self, op: Op, device: torch.device) -> None:
        if op.state is not None:
            torch.default_generator.set_state(op.state)
        else:
            digest = hashlib.sha256(f"{self.seed}/{op.key}".encode()).digest()
            generator_of(device).manual_seed(int.from_bytes(digest[:7], "big"))

    def place(self, op: Op) -> torch.device:
        """Where an operator runs; notes what random numbers go into."""
        read = op.reads
        if (op.is_random and op.state is None) or not self.drawn.isdisjoint(read):
            self.drawn.update(op.written)
            return self.device
        self.drawn.difference_update(op.written)
        if op.only_moves:
            return self.storage(read[0]).device if read else self.device
        return _CPU

    def take(self, out: Ref, real: Tensor) -> None:
        """Keep what an operator returned, laid out as it was on meta."""
        storage = real.untyped_storage()
        same = real.stride() == out.stride and real.storage_offset() == out.offset
        if same and storage.nbytes() == out.stored.nbytes:
            self.storages[out.stored] = storage
        else:
            out.of(self.make(out.stored, real.device)).copy_(real)
