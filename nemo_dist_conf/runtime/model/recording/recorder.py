"""Watches a constructor: its tensors are made on the meta device, and what it does to their values goes on a tape.

Nothing of the size of a model is held or drawn. Small values that no random number goes into (steps, frequencies,
masks, zeros) are computed at once, on the CPU, where the constructor would have them. Where it needs values (``item``,
``if``) they are played back.
"""

from __future__ import annotations

import itertools
import weakref
import zlib
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor

from nemo_dist_conf.runtime.model.recording.playback import Player
from nemo_dist_conf.runtime.model.recording.tape import Constant, Op, Ref, Stored, Tape, as_bytes, mapped
from nemo_dist_conf.runtime.torch_inside import (
    COLLECTIVE_NAMESPACES,
    QuickDispatchMode,
    is_plain,
    replace_trunc_normal,
    schema_of,
    storage_id,
)

__all__ = ["NotRecorded", "Recorder"]

_aten = torch.ops.aten
_CPU, _META = torch.device("cpu"), torch.device("meta")

#: torch's generator starts from this and the seed of the run, and has another seed of ours after each draw. Where it
#: has none of these, the constructor seeded it; where it has one for the second time, the constructor put it back.
_OWN_SEED = int.from_bytes(b"record", "big")

#: Values up to this size are computed while they are recorded: they are less than the entries of a tape.
_SMALL_BYTES = 2**16

#: Operators that write a tensor without reading it.
_OVERWRITES = frozenset(("fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "exponential_", "log_normal_"))

#: In-place operators that leave shapes alone: torch takes up to a millisecond of Python for each on meta.
_ELEMENTWISE = _OVERWRITES | {"mul_", "add_", "sub_", "div_", "erfinv_", "clamp_", "exp_", "log_", "neg_"}

#: Operators that give the same values on any device, because they compute nothing.
_MOVES = frozenset(("fill_", "zero_", "copy_", "clone", "_to_copy"))

#: Places of arguments that an operator writes although its schema does not say so.
_ALSO_WRITTEN = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}

_EMPTY = frozenset(("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"))

#: What makes a tensor by writing an empty one: the operator that writes it, and with what.
_FILLED: dict[str, Callable[[Any], tuple[Any, tuple[Any, ...]]]] = {
    "zeros": lambda args: (_aten.zero_.default, ()),
    "ones": lambda args: (_aten.fill_.Scalar, (1,)),
    "full": lambda args: (_aten.fill_.Scalar, args[-1:]),
    "rand": lambda args: (_aten.uniform_.default, (0.0, 1.0)),
    "randn": lambda args: (_aten.normal_.default, (0.0, 1.0)),
}
_FILLED |= {f"{name}_like": write for name, write in _FILLED.items()}
_FILLED |= {f"new_{name}": _FILLED[name] for name in ("zeros", "ones", "full")}


class NotRecorded(Exception):
    """A constructor does what a tape cannot hold; the text says what."""


class _Info:
    """What the recorder has to know of an operator."""

    def __init__(self, func: Any) -> None:
        schema = schema_of(func)
        self.name = schema.name.partition("::")[2]
        self.is_collective = func.namespace in COLLECTIVE_NAMESPACES
        also = _ALSO_WRITTEN.get(self.name, ())
        noted = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        self.written = [(i, a.name) for i, a in enumerate(schema.arguments) if noted[i] or i in also]
        self.is_view = not self.written and any(value.alias_info is not None for value in schema.returns)
        #: Changes what a tensor is of its storage, or the size of that.
        self.is_structural = torch.Tag.inplace_view in func.tags
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        self.has_device = any(argument.name == "device" for argument in schema.arguments)
        self.returns_tensors = any("Tensor" in str(value.type) for value in schema.returns)
        self.returns_self = self.written[:1] == [(0, schema.arguments[0].name)] and len(schema.returns) == 1
        is_out = bool(self.written) and not also and all(schema.arguments[i].kwarg_only for i, _ in self.written)
        self.overwrites = is_out or self.name in _OVERWRITES or str(func) == "aten.bernoulli_.float"
        self.keeps_shape = self.name in _ELEMENTWISE
        self.only_moves = self.name in _MOVES
        self.is_empty = self.name in _EMPTY and not self.written
        self.is_filled = self.name in _FILLED and not self.written


#: Of operators met so far. torch keeps each for good; to hash one takes longer than most of what is done with it.
_INFOS: dict[int, _Info] = {}

#: It is written, and drawn, as a normal distribution is.
_TRUNC_NORMAL = _Info(_aten.normal_.default)


class _Call:
    """An operator and its arguments.

    tensors: all that are among the arguments; stored: their storages, None for tensors that are not the constructor's.
    written: those that it writes; targets: their storages that are the constructor's; fresh: those of these of which
    nothing is left that was there before.
    """

    __slots__ = ("func", "info", "args", "kwargs", "tensors", "stored", "written", "targets", "fresh")

    def __init__(self, func: Any, info: _Info, args: Any, kwargs: Any) -> None:
        self.func, self.info, self.args, self.kwargs = func, info, args, kwargs
        self.tensors = _tensors((*args, *kwargs.values()) if kwargs else args)
        self.stored: list[Stored | None] = []
        self.written: list[Tensor] = []
        self.targets: list[Stored] = []
        self.fresh: list[Stored] = []

    def find(self, stored_of: Callable[[Tensor], Stored | None]) -> None:
        """Look up the storages of all tensors."""
        self.stored = [stored_of(tensor) for tensor in self.tensors]
        info, args = self.info, self.args
        if not info.written:
            return
        self.written = _tensors([args[i] if i < len(args) else self.kwargs.get(name) for i, name in info.written])
        for tensor in self.written:
            stored = stored_of(tensor)
            if stored is None:
                continue
            self.targets.append(stored)
            if info.overwrites and self.stored.count(stored) == 1 and _is_whole(tensor, stored):
                self.fresh.append(stored)

    @property
    def generator(self) -> torch.Generator | None:
        """The one that it was given."""
        given = (*self.args, *self.kwargs.values())
        return next((value for value in given if isinstance(value, torch.Generator)), None)

    def with_tensors(
        self, kwargs: dict[str, Any], tensors: Iterable[Any], generator: torch.Generator | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments with these in place of its tensors, in order, and with this generator for its own.

        kwargs: those of ``placed``, or its own.
        """
        new = iter(tensors)
        values = [_replaced(value, new, generator) for value in (*self.args, *kwargs.values())]
        count = len(self.args)
        return tuple(values[:count]), dict(zip(kwargs, values[count:]))

    def placed(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments that let it make its tensors here."""
        placed = {key: value for key, value in self.kwargs.items() if key != "pin_memory"}
        if self.info.has_device and (device is _META or placed.get("device") is not None):
            placed["device"] = device
        return placed


class Recorder(QuickDispatchMode):
    """Records what happens while it is entered.

    seed: of what is drawn. device: where values are played back.
    is_idle: what runs is not the constructor's, and nothing is recorded.
    torch's generator is seeded anew: the caller puts it back.
    Raises NotRecorded, out of whatever the constructor called, for what cannot be recorded; the reason is in
    ``why_not`` too, should the constructor have caught it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.tape, self.why_not = Tape(), ""
        self._seed, self._device, self._reads = seed, device, 0
        self._draws: dict[int, Op | None] = {(_OWN_SEED + seed) % 2**63: None}
        self.is_idle = False
        self._stored: dict[int, Stored] = {}
        self._captured: dict[int, list[Constant]] = {}
        self._plain_trunc_normal: Any = None

    def __enter__(self) -> Recorder:
        super().__enter__()
        torch.default_generator.manual_seed(next(iter(self._draws)))
        self._plain_trunc_normal = replace_trunc_normal(self._trunc_normal)
        return self

    def __exit__(self, *error: Any) -> None:
        replace_trunc_normal(self._plain_trunc_normal)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_idle:
            return func(*args, **(kwargs or {}))
        self.is_idle = True
        try:
            return self._run(func, args, kwargs or {})
        finally:
            self.is_idle = False

    # What others ask.

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is a tensor of the constructor."""
        return self._of(tensor) is not None

    def ref(self, tensor: Tensor) -> Ref:
        return _ref(self._stored[storage_id(tensor)], tensor)

    def register(self, tensor: Tensor) -> None:
        """Let a tensor on meta that was there before be one of the constructor's, never written so far."""
        if not self.holds(tensor):
            self._new(tensor)

    def adopt(self, real: Tensor) -> Tensor:
        """A tensor of the constructor that has these values."""
        meta = _like(real)
        storage, values = meta.untyped_storage(), real.untyped_storage()
        if real.device != _CPU or real.storage_offset() or values.nbytes() != storage.nbytes():
            copied = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
            values = copied.copy_(real.detach()).untyped_storage()
        self._stored[storage_id(meta)] = Stored(storage, values)
        return meta

    def values(self, *tensors: Tensor) -> list[Tensor]:
        """What tensors of the constructor hold at this moment."""
        refs = [self.ref(tensor) for tensor in tensors]
        for op in map(self.tape.ops.__getitem__, self.tape.slice_of(refs)):
            if op.is_random and not op.key:
                op.key, self._reads = f"read/{self._reads}", self._reads + 1
        with Player(self.tape, self._seed, self._device) as player:
            return player.play(refs)

    def value(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """(what a tensor holds, whether writing there writes the tensor)"""
        was_idle, self.is_idle = self.is_idle, True
        try:
            stored = self._stored[storage_id(tensor)]
            self._own(stored)
            return self.values(tensor)[0], stored.real is not None
        finally:
            self.is_idle = was_idle

    def hand_out(self, tensor: Tensor, array: Any) -> None:
        """Note that the constructor has an array in which it can write a tensor's values."""
        self._stored[storage_id(tensor)].array = weakref.ref(array)

    def give_up(self, why: str) -> NotRecorded:
        self.why_not = self.why_not or why
        return NotRecorded(why)

    # Operators.

    def _of(self, tensor: Tensor) -> Stored | None:
        return self._stored.get(storage_id(tensor)) if tensor.layout is torch.strided else None

    def _new(self, meta: Tensor) -> Tensor:
        self._refuse_special(meta)
        self._stored[storage_id(meta)] = Stored(meta.untyped_storage())
        return meta

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        info = _INFOS.get(id(func))
        if info is None:
            info = _INFOS[id(func)] = _Info(func)
        call = _Call(func, info, args, kwargs)
        self._refuse(call)
        call.find(self._of)
        if any(stored is None and tensor.is_meta for tensor, stored in zip(call.tensors, call.stored)):
            raise self.give_up("it uses a tensor on the meta device that it did not make")
        if info.name == "lift_fresh" and call.stored == [None]:
            return self.adopt(args[0])
        if call.tensors and not any(call.stored):
            if kwargs.get("device") == _META:  # where a tensor of the constructor is, to torch
                call.kwargs = {**kwargs, "device": _CPU}
            return self._run_plain(call)
        if info.is_empty:
            return self._new(func(*args, **call.placed(_META)))
        if info.is_filled:
            return self._fill(call)
        if info.is_view or info.is_structural:
            return self._run_view(call)
        if len(call.targets) < len(call.written):
            return self._run_plain(call)
        if info.is_random:
            return self._draw(call)
        if self._is_known(call):
            return self._compute(call)
        if not info.returns_tensors and not info.written:  # item, equal
            return self._run_real(call)
        return self._note(call)

    def _refuse(self, call: _Call) -> None:
        if call.info.is_collective:
            raise self.give_up(f"it communicates ({call.func})")
        for tensor in call.tensors:
            self._refuse_special(tensor)
        if call.kwargs.get("layout") not in (None, torch.strided):
            raise self.give_up(f"it makes a tensor of a special kind ({call.kwargs['layout']})")

    def _refuse_special(self, tensor: Tensor) -> None:
        is_usual = tensor.layout is torch.strided and is_plain(type(tensor))
        if not is_usual or tensor.is_conj() or tensor.is_neg():
            raise self.give_up(f"it uses a tensor of a special kind ({type(tensor).__name__}, {tensor.layout})")

    def _run_plain(self, call: _Call) -> Any:
        """An operator on tensors that have values of their own, such as those of a file, or one that writes these."""
        for tensor in call.written:
            for constant in self._captured.pop(storage_id(tensor), ()):
                constant.tensor = constant.tensor.clone()
        return self._run_real(call)

    def _fill(self, call: _Call) -> Tensor:
        """zeros, randn, ones_like and their kind: an empty tensor, and the write that they come down to."""
        name, args, kwargs = call.info.name, call.args, call.kwargs
        write, values = _FILLED[name](args)
        options = {key: kwargs[key] for key in ("dtype", "memory_format") if key in kwargs}
        if name.endswith("_like"):
            made = _aten.empty_like.default(args[0], **options, device=_META)
        elif name.startswith("new_"):
            made = _aten.new_empty.default(args[0], args[1], **options, device=_META)
        else:
            if name == "full" and options.get("dtype") is None:
                options["dtype"] = torch.full((), args[1]).dtype
            made = torch.empty(args[0], **options, device=_META)
        given = {} if call.generator is None else {"generator": call.generator}
        self._run(write, (self._new(made), *values), given)
        return made

    def _run_view(self, call: _Call) -> Any:
        """An operator on what tensors are of their storages."""
        if call.info.name == "set_" and any(isinstance(arg, torch.UntypedStorage) for arg in call.args):
            raise self.give_up("it takes memory that was filled elsewhere, as torch.load does")
        try:
            result = call.func(*call.args, **call.kwargs)
        except Exception as error:
            raise self.give_up(f"{call.func} cannot be recorded: {error}") from error
        for stored in call.stored if call.info.is_structural else ():
            if stored is not None and stored.real is not None and stored.real.nbytes() < stored.nbytes:  # resized
                self._refuse_open(stored)
                grown = torch.UntypedStorage(stored.nbytes)
                as_bytes(grown)[: stored.real.nbytes()] = as_bytes(stored.real)
                stored.real, stored.is_shared = grown, False
        return result

    def _is_known(self, call: _Call) -> bool:
        """Whether all values that go into an operator are constants, and small enough to compute it at once."""
        for stored in call.stored:
            if stored is None or stored.real is not None:
                continue
            if stored.nbytes > _SMALL_BYTES or not (stored.is_unset or stored in call.fresh):
                return False
        return True

    def _compute(self, call: _Call) -> Any:
        """Run an operator on constants."""
        func, info = call.func, call.info
        for stored in call.targets:
            if stored.real is None:
                stored.real, stored.is_shared = torch.UntypedStorage(stored.nbytes), False
                if stored not in call.fresh:
                    as_bytes(stored.real).zero_()
            self._own(stored)
        known = [_constant(tensor, stored) for tensor, stored in zip(call.tensors, call.stored)]
        args, kwargs = call.with_tensors(call.placed(_CPU), known)
        result = func(*args, **kwargs)
        if info.returns_self:
            return call.written[0]
        if info.written:
            return self._without_values(call)
        sources = dict(zip(map(storage_id, known), call.stored))
        limit = max([_SMALL_BYTES, *(stored.nbytes for stored in call.stored if stored is not None)])
        outs: list[tuple[int, Ref]] = []
        count = itertools.count()

        def recorded(made: Tensor) -> Tensor:
            self._refuse_special(made)
            place, source = next(count), sources.get(storage_id(made))
            if source is not None:  # a view, whatever its schema says
                return _ref(source, made).of(source.meta)
            if made.nbytes <= limit:
                return self.adopt(made)
            meta = self._new(_like(made))
            outs.append((place, self.ref(meta)))
            return meta

        result = mapped(result, (Tensor,), recorded)
        if outs:
            self.tape.add(self._op(call, outs))
        return result

    def _own(self, stored: Stored) -> None:
        """Let constants of the tape stay what they are when this storage is written."""
        if stored.is_shared and stored.real is not None:
            stored.real, stored.is_shared = stored.real.clone(), False

    def _refuse_open(self, stored: Stored) -> None:
        """The values of a storage are about to be in another memory than these."""
        if stored.is_open:
            raise self.give_up("it has an array of numpy in the memory of a tensor that it writes")

    def _note(self, call: _Call, state: Tensor | None = None, found: Any = None) -> Any:
        """Put an operator on the tape; returns what it would return, without values.

        state: of the generator that it draws from, where that is one of the constructor's own; found: what it gave.
        """
        info = call.info
        if info.returns_self and (found is not None or info.keeps_shape and _fits(call)):
            result = call.args[0]
        elif found is not None and not info.written:
            result = mapped(found, (Tensor,), _like)
        else:
            result = self._without_values(call)
        for stored in call.targets:
            if stored.real is not None and stored not in call.fresh:
                load = Op(None, (Constant(as_bytes(stored.real)),), {})
                load.only_moves, load.written, load.fresh = True, [stored], [stored]
                self.tape.add(load)
            self._refuse_open(stored)
            stored.real = None
        outs = []
        if not info.returns_self:
            for place, tensor in enumerate(_tensors(result if isinstance(result, (tuple, list)) else (result,))):
                if not self.holds(tensor):
                    outs.append((place, self.ref(self._new(tensor))))
        if outs or call.written:
            op = self._op(call, outs)
            op.is_random, op.state = info.is_random, state
            if op.is_random and state is None:
                self._move_on(op)
            self.tape.add(op)
        return result

    def _op(self, call: _Call, outs: list[tuple[int, Ref]]) -> Op:
        """The entry of the tape for an operator that returns these new tensors."""
        entries: list[Ref | Constant] = []
        for tensor, stored in zip(call.tensors, call.stored):
            if stored is None:
                entries.append(Constant(tensor.detach()))
                self._captured.setdefault(storage_id(tensor), []).append(entries[-1])  # type: ignore[arg-type]
            elif stored.real is None:
                entries.append(_ref(stored, tensor))
            else:
                known = _ref(stored, tensor).of(stored.real)
                stored.is_shared = stored.is_shared or not stored.is_open
                entries.append(Constant(known.clone() if stored.is_open else known))
        kept = {key: value for key, value in call.kwargs.items() if key not in ("device", "pin_memory")}
        op = Op(call.func, *call.with_tensors(kept, entries))
        made = [out.stored for _, out in outs]
        op.outs, op.only_moves = outs, call.info.only_moves
        op.takes_device = call.info.has_device and not call.tensors
        op.written, op.fresh = call.targets + made, call.fresh + made
        return op

    def _without_values(self, call: _Call) -> Any:
        """What an operator returns, as far as that can be told on meta; else its values are computed to see."""
        on_meta = (tensor if tensor.is_meta else tensor.detach().to(_META) for tensor in call.tensors)
        args, kwargs = call.with_tensors(call.placed(_META), on_meta)
        try:
            return call.func(*args, **kwargs)
        except Exception:
            real = self._run_real(call)
        if call.info.returns_self:
            return call.args[0]
        if call.info.written:
            raise self.give_up(f"{call.func} cannot be recorded")
        return mapped(real, (Tensor,), _like)

    def _run_real(self, call: _Call, on_cpu: bool = False) -> Any:
        """An operator on values, those of the constructor played back; what it writes to these is lost."""
        held = [tensor for tensor, stored in zip(call.tensors, call.stored) if stored is not None]
        values = iter([value.clone() for value in self.values(*held)] if held else ())
        tensors = [tensor if stored is None else next(values) for tensor, stored in zip(call.tensors, call.stored)]
        if on_cpu:
            tensors = [tensor.cpu() for tensor in tensors]
        args, kwargs = call.with_tensors(call.placed(_CPU) if on_cpu else call.kwargs, tensors, call.generator)
        return call.func(*args, **kwargs)

    def _draw(self, call: _Call) -> Any:
        """An operator that draws numbers.

        Out of a generator that the constructor seeded itself they are constants: drawn as it would, which also moves
        that generator on.
        """
        generator = call.generator
        is_default = generator is None or generator is torch.default_generator
        if is_default and torch.default_generator.initial_seed() in self._draws:
            return self._note(call)
        if generator is not None and generator.device != _CPU:
            raise self.give_up(f"it draws from a generator of its own on {generator.device}")
        state = (generator or torch.default_generator).get_state()
        return self._note(call, state, self._run_real(call, on_cpu=True))

    def _move_on(self, op: Op) -> None:
        """Let torch's generator stand behind a draw, as it would; where it stood there before, it is the same draw."""
        seed = torch.default_generator.initial_seed()
        op.again = self._draws[seed]
        if op.again is None:
            self._draws[seed] = op
        what = zlib.crc32(repr((str(op.func), [stored.nbytes for stored in op.written])).encode())
        following = (seed * 6364136223846793005 + what * 2654435761 + 1442695040888963407) % 2**63
        self._draws.setdefault(following, None)
        torch.default_generator.manual_seed(following)

    def _trunc_normal(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """torch's way to draw it again and again until it fits, as if it were one operator."""
        func, was_idle = self._plain_trunc_normal, self.is_idle
        self.is_idle = True
        try:
            if not was_idle and self.holds(tensor):
                call = _Call(func, _TRUNC_NORMAL, (tensor, *args), kwargs)
                call.find(self._of)
                return self._draw(call)
        finally:
            self.is_idle = was_idle
        return func(tensor, *args, **kwargs)


def _like(real: Tensor) -> Tensor:
    return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=_META)


def _ref(stored: Stored, tensor: Tensor) -> Ref:
    return Ref(stored, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def _constant(tensor: Tensor, stored: Stored | None) -> Tensor:
    """The values of an argument that is known; it shares their memory."""
    if stored is None:
        return tensor.detach()
    if stored.real is None:  # never written: a constructor that reads it reads anything
        stored.real = torch.UntypedStorage(stored.nbytes)
        as_bytes(stored.real).zero_()
    return _ref(stored, tensor).of(stored.real)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments of an operator; these are lists at most one deep."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _replaced(value: Any, new: Iterator[Any], generator: torch.Generator | None) -> Any:
    if isinstance(value, Tensor):
        return next(new)
    if isinstance(value, torch.Generator):
        return generator
    if isinstance(value, (list, tuple)):
        return [next(new) if isinstance(item, Tensor) else item for item in value]
    return value


def _is_whole(tensor: Tensor, stored: Stored) -> bool:
    """Whether a tensor is all of its storage, each element once."""
    if tensor.numel() * tensor.element_size() != stored.nbytes:
        return False
    return tensor.is_contiguous() or _ref(stored, tensor).is_whole


def _fits(call: _Call) -> bool:
    """Whether the other tensors of an in-place operator can be broadcast to the first."""
    shape = call.args[0].shape
    return all(
        len(other.shape) <= len(shape) and all(o in (1, s) for o, s in zip(other.shape[::-1], shape[::-1]))
        for other in call.tensors[1:]
    )
