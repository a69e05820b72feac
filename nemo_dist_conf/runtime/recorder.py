"""Watches a constructor: its tensors are made on the meta device, and what it does to their values goes on a tape.

Nothing of the size of a model is held or drawn. Small values that no random number goes into (steps, frequencies,
masks, zeros) are computed at once, on the CPU, where the constructor would have them. To the constructor its tensors
say that they are on the CPU, and where it asks for values (``item``, ``tolist``, ``if``) they are played back.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist_conf.runtime.playback import Player
from nemo_dist_conf.runtime.tape import Constant, Op, Ref, Stored, Tape, leaves, mapped
from nemo_dist_conf.runtime.torch_inside import is_plain, replace_trunc_normal, schema_of, storage_id

__all__ = ["NotRecorded", "Recorder"]

_aten = torch.ops.aten
_CPU, _META = torch.device("cpu"), torch.device("meta")

#: torch's generator is given this seed; where it has another one, the constructor gave it that itself.
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

#: Collectives: a tape is played back by each rank alone.
_COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor", "symm_mem")


class NotRecorded(Exception):
    """A constructor does what a tape cannot hold; the text says what."""


class _Info:
    """What the recorder has to know of an operator."""

    def __init__(self, func: Any) -> None:
        schema = schema_of(func)
        self.name = schema.name.partition("::")[2]
        self.is_collective = func.namespace in _COLLECTIVES
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

    def writes(self, args: Any, kwargs: Any) -> list[Tensor]:
        if not self.written:
            return []
        return _tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in self.written])


@functools.cache
def _info_of(func: Any) -> _Info:
    return _Info(func)


#: It is written, and drawn, as a normal distribution is.
_TRUNC_NORMAL = _info_of(_aten.normal_.default)


class Recorder(TorchDispatchMode):
    """Records what happens while it is entered.

    seed: of what is drawn. device: where values are played back.
    torch's generator is seeded anew: the caller puts it back.
    Raises NotRecorded, out of whatever the constructor called, for what cannot be recorded; the reason is in
    ``why_not`` too, should the constructor have caught it.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.tape, self.why_not = Tape(), ""
        self._seed, self._device, self._reads = seed, device, 0
        self._is_idle = False  # while what runs is ours
        self._stored: dict[int, Stored] = {}
        self._captured: dict[int, list[Constant]] = {}
        self._functions = _Functions(self)
        self._plain_trunc_normal: Any = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch 2.13 would import its compiler for the first operator, which takes longer than most constructors."""
        return False

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._functions.__enter__()
        torch.default_generator.manual_seed(_OWN_SEED)
        self._plain_trunc_normal = replace_trunc_normal(self._trunc_normal)
        return self

    def __exit__(self, *error: Any) -> None:
        replace_trunc_normal(self._plain_trunc_normal)
        self._functions.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_idle:
            return func(*args, **(kwargs or {}))
        self._is_idle = True
        try:
            return self._run(func, args, kwargs or {})
        finally:
            self._is_idle = False

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
        meta = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=_META)
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

    def give_up(self, why: str) -> NotRecorded:
        self.why_not = self.why_not or why
        return NotRecorded(why)

    # Operators.

    def _of(self, tensor: Tensor) -> Stored | None:
        return self._stored.get(storage_id(tensor)) if tensor.layout is torch.strided else None

    def _new(self, meta: Tensor) -> Tensor:
        self._stored[storage_id(meta)] = Stored(meta.untyped_storage())
        return meta

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        info, tensors = _info_of(func), _tensors((args, kwargs))
        if info.is_collective:
            raise self.give_up(f"it communicates ({func})")
        for tensor in tensors:
            if tensor.layout is not torch.strided or not is_plain(type(tensor)) or tensor.is_conj() or tensor.is_neg():
                raise self.give_up(f"it uses a tensor of a special kind ({type(tensor).__name__}, {tensor.layout})")
        held = [self._of(tensor) for tensor in tensors]
        if any(tensor.is_meta and stored is None for tensor, stored in zip(tensors, held)):
            raise self.give_up("it uses a tensor on the meta device that it did not make")
        if kwargs.get("layout") not in (None, torch.strided):
            raise self.give_up(f"it makes a tensor of a special kind ({kwargs['layout']})")
        if info.name == "lift_fresh" and held == [None]:
            return self.adopt(tensors[0])
        if tensors and not any(held):
            return self._run_plain(func, info, args, kwargs)
        if info.name in _EMPTY:
            return self._new(func(*args, **_placed(kwargs, info, _META)))
        if info.name in _FILLED:
            return self._fill(info, args, kwargs)
        if info.is_view or info.is_structural:
            return self._run_view(func, args, kwargs)
        if any(self._of(tensor) is None for tensor in info.writes(args, kwargs)):
            return self._run_plain(func, info, args, kwargs)
        if info.is_random:
            return self._draw(func, info, args, kwargs)
        if self._is_known(info, args, kwargs):
            return self._compute(func, info, args, kwargs)
        if not info.returns_tensors and not info.written:  # item, equal
            return self._run_real(func, args, kwargs)
        return self._note(func, info, args, kwargs)

    def _run_plain(self, func: Any, info: _Info, args: Any, kwargs: Any) -> Any:
        """An operator on tensors that have values of their own, such as those of a file, or one that writes these."""
        for tensor in info.writes(args, kwargs):
            for constant in self._captured.pop(storage_id(tensor), ()):
                constant.tensor = constant.tensor.clone()
        return self._run_real(func, args, kwargs)

    def _fill(self, info: _Info, args: Any, kwargs: Any) -> Tensor:
        """zeros, randn, ones_like and their kind: an empty tensor, and the write that they come down to."""
        write, values = _FILLED[info.name](args)
        options = {key: kwargs[key] for key in ("dtype", "memory_format") if key in kwargs}
        if info.name.endswith("_like"):
            made = _aten.empty_like.default(args[0], **options, device=_META)
        elif info.name.startswith("new_"):
            made = _aten.new_empty.default(args[0], args[1], **options, device=_META)
        else:
            if info.name == "full" and options.get("dtype") is None:
                options["dtype"] = torch.full((), args[1]).dtype
            made = torch.empty(args[0], **options, device=_META)
        generator = kwargs.get("generator")
        self._run(write, (self._new(made), *values), {} if generator is None else {"generator": generator})
        return made

    def _run_view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on what tensors are of their storages."""
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            raise self.give_up(f"{func} cannot be recorded: {error}") from error
        for tensor in _tensors(args):
            stored = self._of(tensor)
            if stored is not None and stored.real is not None and stored.real.nbytes() < stored.nbytes:  # resized
                grown = torch.UntypedStorage(stored.nbytes)
                _bytes(grown)[: stored.real.nbytes()] = _bytes(stored.real)
                stored.real, stored.is_shared = grown, False
        return result

    def _is_overwritten(self, tensor: Tensor, info: _Info, args: Any, kwargs: Any) -> bool:
        """Whether an operator leaves nothing of what a tensor that it writes was before."""
        if not info.overwrites or not self.ref(tensor).is_whole:
            return False
        id_ = storage_id(tensor)
        return sum(storage_id(other) == id_ for other in _tensors((args, kwargs))) == 1

    def _is_known(self, info: _Info, args: Any, kwargs: Any) -> bool:
        """Whether all values that go into an operator are constants, and it is worth to compute it at once."""
        written = [storage_id(tensor) for tensor in info.writes(args, kwargs)]
        for tensor in _tensors((args, kwargs)):
            stored = self._of(tensor)
            if stored is None or stored.real is not None:
                continue
            if stored.nbytes > _SMALL_BYTES:
                return False
            overwritten = storage_id(tensor) in written and self._is_overwritten(tensor, info, args, kwargs)
            if not overwritten and not stored.is_unset:
                return False
        return True

    def _compute(self, func: Any, info: _Info, args: Any, kwargs: Any) -> Any:
        """Run an operator on constants."""
        for tensor in info.writes(args, kwargs):
            stored = self._stored[storage_id(tensor)]
            if stored.real is None:
                stored.real, stored.is_shared = torch.UntypedStorage(stored.nbytes), False
                if not self._is_overwritten(tensor, info, args, kwargs):
                    stored.real.fill_(0)
            self._own(stored)
        real = mapped((args, _placed(kwargs, info, _CPU)), (Tensor,), self._constant)
        result = func(*real[0], **real[1])
        if info.returns_self:
            return info.writes(args, kwargs)[0]
        if info.written:
            return func(*args, **_placed(kwargs, info, _META))
        sources = {storage_id(self._constant(t)): self._of(t) for t in _tensors((args, kwargs))}
        op, count = Op(func, *self._template(args, kwargs)), 0
        op.only_moves, op.takes_device = info.only_moves, info.has_device and not sources
        limit = max([_SMALL_BYTES, *(stored.nbytes for stored in sources.values() if stored is not None)])

        def recorded(made: Tensor) -> Tensor:
            nonlocal count
            source, count = sources.get(storage_id(made)), count + 1
            if source is not None:  # a view, whatever its schema says
                return _ref(source, made).of(source.meta)
            if made.nbytes <= limit:
                return self.adopt(made)
            meta = self._new(torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=_META))
            op.outs.append((count - 1, self.ref(meta)))
            return meta

        result = mapped(result, (Tensor,), recorded)
        self._add(op)
        return result

    def _own(self, stored: Stored) -> None:
        """Let constants of the tape stay what they are when this storage is written."""
        if stored.is_shared and stored.real is not None:
            stored.real, stored.is_shared = stored.real.clone(), False

    def _constant(self, tensor: Tensor) -> Tensor:
        """The values of an argument that is known; it shares their memory."""
        stored = self._of(tensor)
        if stored is None:
            return tensor.detach()
        if stored.real is None:  # never written: a constructor that reads it reads anything
            stored.real = torch.UntypedStorage(stored.nbytes)
            stored.real.fill_(0)
        return self.ref(tensor).of(stored.real)

    def _note(self, func: Any, info: _Info, args: Any, kwargs: Any, state: Tensor | None = None) -> Any:
        """Put an operator on the tape; returns what it would return, without values.

        state: of the generator that it draws from, where that is one of the constructor's own.
        """
        result: Any = args[0] if info.returns_self and info.keeps_shape and _fits(args) else None
        if result is None:
            result = self._without_values(func, info, args, kwargs)
        fresh: list[Stored] = []
        for tensor in info.writes(args, kwargs):
            stored = self._stored[storage_id(tensor)]
            if self._is_overwritten(tensor, info, args, kwargs):
                fresh.append(stored)
            elif stored.real is not None:
                load = Op(None, (Constant(_bytes(stored.real)),))
                load.only_moves, load.written, load.fresh = True, [stored], [stored]
                self.tape.add(load)
            stored.real = None
        op = Op(func, *self._template(args, kwargs))
        op.only_moves, op.takes_device = info.only_moves, info.has_device and not _tensors((args, kwargs))
        op.is_random, op.state = info.is_random, state
        op.written, op.fresh = [self._stored[storage_id(t)] for t in info.writes(args, kwargs)], fresh
        for place, tensor in enumerate(_tensors(result)):
            if not self.holds(tensor):
                op.outs.append((place, self.ref(self._new(tensor))))
        self._add(op)
        return result

    def _add(self, op: Op) -> None:
        made = [out.stored for _, out in op.outs]
        op.written += made
        op.fresh += made
        if op.written:
            self.tape.add(op)

    def _template(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments as the tape keeps them."""

        def entry(tensor: Tensor) -> Ref | Constant:
            stored = self._of(tensor)
            if stored is None:
                constant = Constant(tensor.detach())
                self._captured.setdefault(storage_id(tensor), []).append(constant)
                return constant
            if stored.real is None:
                return self.ref(tensor)
            stored.is_shared = True
            return Constant(self.ref(tensor).of(stored.real))

        kept = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if kept.get("generator") is not None:
            kept["generator"] = None
        return mapped(tuple(args), (Tensor,), entry), mapped(kept, (Tensor,), entry)

    def _without_values(self, func: Any, info: _Info, args: Any, kwargs: Any) -> Any:
        """What an operator returns, as far as that can be told on meta; else its values are computed to see."""
        placed = _placed(kwargs, info, _META)
        if "generator" in placed:
            placed["generator"] = None
        try:
            on_meta = mapped((args, placed), (Tensor,), lambda t: t if t.is_meta else t.detach().to(_META))
            return func(*on_meta[0], **on_meta[1])
        except Exception:
            real = self._run_real(func, args, kwargs)
        if info.returns_self:
            return args[0]
        if info.written:
            raise self.give_up(f"{func} cannot be recorded")
        return mapped(
            real, (Tensor,), lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_META)
        )

    def _run_real(self, func: Any, args: Any, kwargs: Any, device: torch.device | None = None) -> Any:
        """An operator on values, those of the constructor played back; what it writes to these is lost."""
        held = [tensor for tensor in _tensors((args, kwargs)) if self.holds(tensor)]
        values = iter(self.values(*held) if held else ())

        def value(tensor: Tensor) -> Tensor:
            if not self.holds(tensor):
                return tensor
            found = next(values).clone()
            return found if device is None else found.to(device)

        real = mapped((args, kwargs), (Tensor,), value)
        return func(*real[0], **real[1])

    def _draw(self, func: Any, info: _Info, args: Any, kwargs: Any) -> Any:
        """An operator that draws numbers.

        Out of a generator that the constructor seeded itself they are constants: drawn as it would, which also moves
        that generator on.
        """
        generator = kwargs.get("generator")
        state = None
        if generator is not None or torch.default_generator.initial_seed() != _OWN_SEED:
            if generator is not None and generator.device != _CPU:
                raise self.give_up(f"it draws from a generator of its own on {generator.device}")
            state = (generator or torch.default_generator).get_state()
            self._run_real(func, args, _placed(kwargs, info, _CPU), _CPU)
        return self._note(func, info, args, kwargs, state)


    def _trunc_normal(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """torch's way to draw it again and again until it fits, as if it were one operator."""
        func, was_idle = self._plain_trunc_normal, self._is_idle
        self._is_idle = True
        try:
            if not was_idle and self.holds(tensor):
                return self._draw(func, _TRUNC_NORMAL, (tensor, *args), kwargs)
        finally:
            self._is_idle = was_idle
        return func(tensor, *args, **kwargs)


class _Functions(TorchFunctionMode):
    """Answers what a constructor asks its tensors in Python, before any operator runs."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, answer = self._recorder, _ANSWERS.get(func)
        if recorder._is_idle:
            return func(*args, **(kwargs or {}))
        if kwargs and kwargs.get("device") is not None or func is Tensor.to:
            places = [kwargs.get("device")] if kwargs else args[1:2]
            if any(isinstance(place, (str, torch.device)) and torch.device(place) == _META for place in places):
                raise recorder.give_up("it uses the meta device itself")
        if answer is None or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        recorder._is_idle = True
        try:
            if recorder.holds(args[0]):
                return answer(recorder, func, args, kwargs or {})
        finally:
            recorder._is_idle = False
        return func(*args, **(kwargs or {}))


def _says(value: Any) -> Callable[..., Any]:
    return lambda recorder, func, args, kwargs: value


def _with_values(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    stored = recorder.ref(tensor).stored
    recorder._own(stored)
    (value,) = recorder.values(tensor)
    result = func(value.cpu().requires_grad_(tensor.requires_grad), *args[1:], **kwargs)
    if stored.real is None and hasattr(result, "flags"):
        result.flags.writeable = False  # an array: what is written there would be lost
    return result


def _address(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> int:
    """A number by which tensors in one place are known, as an address is."""
    return storage_id(args[0]) + args[0].storage_offset() * args[0].element_size()


def _refused(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    raise recorder.give_up(f"it reaches for the memory of a tensor ({func.__name__})")


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _says(_CPU),  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: _says(False),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _says(True),  # type: ignore[attr-defined]
    Tensor.get_device: _says(-1),
    Tensor.data_ptr: _address,
}
_ANSWERS |= dict.fromkeys(
    (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__, Tensor.__format__), _with_values
)
_ANSWERS |= dict.fromkeys(
    (Tensor.untyped_storage, Tensor.storage, Tensor.__reduce_ex__, Tensor.share_memory_, Tensor.__dlpack__), _refused
)


def _ref(stored: Stored, tensor: Tensor) -> Ref:
    return Ref(stored, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def _placed(kwargs: dict[str, Any], info: _Info, device: torch.device) -> dict[str, Any]:
    """Keyword arguments that let an operator make its tensors here."""
    placed = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if info.has_device and (device is _META or placed.get("device") is not None):
        placed["device"] = device
    return placed


def _fits(args: Any) -> bool:
    """Whether the other tensors of an in-place operator can be broadcast to the first."""
    shape = args[0].shape
    return all(
        len(other.shape) <= len(shape) and all(o in (1, s) for o, s in zip(other.shape[::-1], shape[::-1]))
        for other in _tensors(args[1:])
    )


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[arg-type]
