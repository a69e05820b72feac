"""A model out of what makes it: recorded without values, or, where that cannot be, built with them on every rank."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import random
import sys
import traceback
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nemo_dist_conf.runtime.model.recording.playback import Player
from nemo_dist_conf.runtime.model.recording.python_answers import Answers
from nemo_dist_conf.runtime.model.recording.recorder import NotRecorded, Recorder
from nemo_dist_conf.runtime.model.recording.tape import Constant, Ref, Tape, leaves
from nemo_dist_conf.runtime.model.tensor_attributes import tensors_beside
from nemo_dist_conf.runtime.torch_inside import RESETS, generator_of, is_view, of_same_class, own_buffers

__all__ = ["Record", "become", "construct", "named_tensors", "record", "record_resets"]

#: Of tensors beside parameters and buffers, before it is worth the time to look whether they are garbage.
_FEW_BYTES = 2**20


@dataclass(frozen=True)
class Record:
    """What it takes to give a model on the meta device its initial values.

    refs: every parameter and buffer by name; names of tied ones are all there. groups: names that are played back
    together. seed: of what is drawn; device: where that is done.
    """

    tape: Tape
    refs: Mapping[str, Ref]
    groups: list[list[str]]
    seed: int
    device: torch.device

    @property
    def unset(self) -> list[str]:
        """Names of tensors that nothing ever wrote to; they start at 0."""
        return [name for name, ref in self.refs.items() if ref.stored.is_unset and ref.nbytes]

    def mark(self, names: Iterable[str]) -> str:
        """A checksum of these tensors and of all that gives them their values."""
        digest = hashlib.sha256(self._what(names).encode())
        for constant in self._constants(names):
            memory = constant.cpu().untyped_storage()
            if memory.nbytes():
                digest.update((ctypes.c_ubyte * memory.nbytes()).from_address(memory.data_ptr()))
        return digest.hexdigest()

    def sums(self, names: Iterable[str]) -> tuple[str, list[tuple[float, float]]]:
        """The same without the last bits of constants, in which kinds of CPUs differ: (all else, sums over them)."""
        return self._what(names), [_sums(constant) for constant in self._constants(names)]

    def _what(self, names: Iterable[str]) -> str:
        refs = {name: self.refs[name] for name in names}
        words = [f"{name} {ref[1:]} {ref.stored.real is None}" for name, ref in refs.items()]
        for index in self.tape.slice_of(refs.values()):
            op = self.tape.ops[index]
            words.append(f"{op.func} {op.key}")
            for leaf in leaves((op.args, op.kwargs)):
                number = isinstance(leaf, (int, float, complex, str))
                words.append(format(leaf, ".6g" if isinstance(leaf, (float, complex)) else "") if number else "")
        return "\n".join(words)

    def _constants(self, names: Iterable[str]) -> Iterator[Tensor]:
        refs = [self.refs[name] for name in names]
        yield from (ref.of(ref.stored.real) for ref in refs if ref.stored.real is not None)
        for index in self.tape.slice_of(refs):
            op = self.tape.ops[index]
            if op.state is not None:
                yield op.state
            yield from (leaf.tensor for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, Constant))


def _sums(tensor: Tensor) -> tuple[float, float]:
    """Weighted sums of what is positive, and of all without its sign: neither loses digits."""
    values = tensor.detach().cpu().flatten()
    values = torch.view_as_real(values).flatten() if values.is_complex() else values
    values = values.double().nan_to_num(0.5, 1.5, -1.5) * (torch.arange(len(values)) % 7 + 1)
    return float(values.clamp(min=0).sum()), float(values.abs().sum())


def construct(factory: Callable[[], Any], seed: int) -> Any:
    """What the factory returns, with values; the same on every rank, as far as generators can make it so."""
    with _seeded(seed):
        return factory()


def record(
    factory: Callable[[], Any], seed: int, device: torch.device, called: Callable[[str], str] = lambda name: name
) -> tuple[Any, Record | None]:
    """(what the factory returns, its parameters and buffers on the meta device; how to give them their values).

    Tensors that the constructor keeps elsewhere (plain attributes, caches) have their values. None where the factory
    returned no module. called: what a tensor's name is in the key of what is drawn for it.
    Raises NotRecorded, or whatever the factory raises, where it has to be built with values.
    """
    recorder = Recorder(seed, device)
    with _only_new_objects() as new_objects:
        model = None
        try:
            with _seeded(seed), recorder, Answers(recorder):
                model = factory()
            if recorder.why_not:
                raise NotRecorded(recorder.why_not)
            if not isinstance(model, nn.Module):
                return model, None
            return model, _finished(model, recorder, seed, device, new_objects, called)
        except Exception as error:
            model = None
            _give_values_to_what_is_left(error, recorder, new_objects)
            if recorder.why_not:
                raise NotRecorded(recorder.why_not) from None
            raise


def record_resets(model: nn.Module, seed: int, device: torch.device) -> Record:
    """How to give a module that came on the meta device the values that its modules' ``reset_parameters`` draw.

    As torch's convention for such modules is; a model of transformers initialises itself.
    Raises NotRecorded where a module that owns tensors has no such function, or a tensor is not set by one.
    """
    recorder = Recorder(seed, device)
    for tensor in named_tensors(model).values():
        recorder.register(tensor)
    with _only_new_objects() as new_objects:
        with _seeded(seed), torch.no_grad(), recorder, Answers(recorder):
            if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
                model.initialize_weights()  # type: ignore[operator]
            else:
                for name, module in model.named_modules():
                    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                        _reset_of(name, module)()
        if recorder.why_not:
            raise NotRecorded(recorder.why_not)
        made = _finished(model, recorder, seed, device, new_objects)
    unset = [*made.unset, *(name for name, _, _, tensor in tensors_beside(model) if tensor.is_meta)]
    if unset:
        raise NotRecorded(f"nothing sets {unset[0]}")
    return made


def _reset_of(name: str, module: nn.Module) -> Callable[[], Any]:
    for reset in RESETS:
        if callable(getattr(module, reset, None)):
            return getattr(module, reset)
    raise NotRecorded(f"{name or type(module).__name__} has no reset_parameters")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, and after them buffers; tied ones by all of their names."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _finished(
    model: nn.Module,
    recorder: Recorder,
    seed: int,
    device: torch.device,
    new_objects: Callable[[], list[Any]],
    called: Callable[[str], str] = lambda name: name,
) -> Record:
    """The record of a model whose constructor has run; tensors elsewhere have their values then."""
    named = named_tensors(model)
    refs: dict[str, Ref] = {}
    others: dict[Tensor, Tensor] = {}  # loaded from a file, or made in another thread, and what stands for each
    if named and not any(is_lazy(tensor) or recorder.holds(tensor) for tensor in named.values()):
        raise NotRecorded("it returns a model that has its values already")
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise NotRecorded(f"{name} has no shape yet")
        if recorder.holds(tensor):
            refs[name] = recorder.ref(tensor)
        elif tensor.is_meta:
            raise NotRecorded(f"{name} was not made by the constructor")
        else:
            if tensor not in others:
                others[tensor] = recorder.adopt(tensor)
            refs[name] = recorder.ref(others[tensor])
    made = Record(recorder.tape, refs, recorder.tape.name_draws(refs, called), seed, device)
    _give_values_elsewhere(model, recorder, made, new_objects, [*named.values(), *others.values()])
    _take_over(model, others)
    return made


def _take_over(model: nn.Module, others: Mapping[Tensor, Tensor]) -> None:
    """Put tensors on meta in the place of those that the constructor did not make.

    As ``Module.to`` does: a parameter stays the object that it is; a buffer, which may be a table that others use too,
    is replaced in the model.
    """
    buffers = set(map(id, model.buffers()))
    parameters = {tensor: meta for tensor, meta in others.items() if id(tensor) not in buffers}
    taken: list[tuple[Tensor, Tensor]] = []
    for tensor, meta in parameters.items():
        values = tensor.detach()
        if not become(tensor, meta):
            for earlier, real in taken:
                become(earlier, real)
            raise NotRecorded("it takes a parameter that others have views of")
        taken.append((tensor, values))
    for module in model.modules():
        own = own_buffers(module)
        own.update({key: others[buffer] for key, buffer in own.items() if buffer is not None and buffer in others})


def _give_values_to_what_is_left(
    error: BaseException, recorder: Recorder, new_objects: Callable[[], list[Any]]
) -> None:
    """After a constructor that could not be recorded: what it left in caches is used again when it runs with values."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__context__
    gc.collect()
    tensors = [found for found in new_objects() if issubclass(type(found), Tensor) and not is_lazy(found)]
    tensors = [tensor for tensor in tensors if tensor.is_meta and recorder.holds(tensor)]
    for tensor, value in zip(tensors, recorder.values(*tensors)):
        become(tensor, value)


def _give_values_elsewhere(
    model: nn.Module, recorder: Recorder, made: Record, new_objects: Callable[[], list[Any]], besides: list[Tensor]
) -> None:
    """Let tensors have their values, wherever they are kept; ``besides``: those that get them otherwise."""
    registered = set(map(id, besides))
    owned = {ref.stored for ref in made.refs.values()}

    def elsewhere() -> list[Tensor]:
        tensors = [found for found in new_objects() if issubclass(type(found), Tensor)]
        tensors = [tensor for tensor in tensors if id(tensor) not in registered and not is_lazy(tensor)]
        return [tensor for tensor in tensors if tensor.is_meta and recorder.holds(tensor)]

    tensors = elsewhere()
    if not tensors:
        return
    shared = [recorder.ref(tensor).stored in owned for tensor in tensors]
    if any(shared) or sum(tensor.nbytes for tensor in tensors) > _FEW_BYTES:
        tensors.clear()
        gc.collect()  # some may be alive only because they refer to each other
        tensors = elsewhere()
        shared = [recorder.ref(tensor).stored in owned for tensor in tensors]
    if any(is_shared and _is_referred_to(tensors, number) for number, is_shared in enumerate(shared)):
        raise NotRecorded("it keeps a tensor that shares memory with a parameter or buffer")
    tensors = [tensor for tensor, is_shared in zip(tensors, shared) if not is_shared]
    names = {id(tensor): name for name, _, _, tensor in tensors_beside(model)}
    tensors.sort(key=lambda tensor: (id(tensor) not in names, names.get(id(tensor), "")))
    refs = [recorder.ref(tensor) for tensor in tensors]
    known = [names.get(id(tensor), f"elsewhere/{number}") for number, tensor in enumerate(tensors)]
    recorder.tape.name_draws(dict(zip(known, refs)))
    values = _on_device(made, refs)
    # What was computed with gradients, and views, come first: what they were made of is often free then.
    order = sorted(range(len(tensors)), key=lambda n: (tensors[n].is_leaf, not is_view(tensors[n])))
    for number in order:
        if not become(tensors[number], values[number]) and _is_referred_to(tensors, number):
            raise NotRecorded("it keeps a tensor in a way that cannot be followed")


def _on_device(made: Record, refs: list[Ref]) -> list[Tensor]:
    """Values of tensors, in as many memories as they have on meta."""
    with Player(made.tape, made.seed, made.device) as player:
        values = player.play(refs)
    storages = {ref.stored: value.untyped_storage() for ref, value in zip(refs, values)}
    for stored, storage in storages.items():
        if storage.device != made.device:
            storages[stored] = torch.UntypedStorage(storage.nbytes(), device=made.device).copy_(storage)
    return [ref.of(storages[ref.stored]) for ref in refs]


def _is_referred_to(tensors: list[Tensor], number: int) -> bool:
    """Whether anything in Python but this list refers to one of them; torch itself may, where it has views of it."""
    return any(found is not tensors for found in gc.get_referrers(tensors[number]))


def become(tensor: Tensor, real: Tensor) -> bool:
    """Let a tensor have another device and values, for everything that refers to it; False where it cannot."""
    requires_grad = tensor.requires_grad and tensor.is_leaf
    other = of_same_class(tensor, real.detach(), requires_grad)
    other.__dict__.update(tensor.__dict__)
    try:
        torch.utils.swap_tensors(tensor, other)
    except RuntimeError:  # a view of it, or a graph that it is part of, is alive
        return False
    return True


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every generator that a constructor may draw from starts the same on all ranks, and is as before afterwards."""
    numpy: Any = sys.modules.get("numpy.random")
    states = random.getstate(), numpy and numpy.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        for device in (torch.device("cpu"), *(torch.device("cuda", index) for index in devices)):
            generator_of(device).manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.set_state(states[1])


@contextlib.contextmanager
def _only_new_objects() -> Iterator[Callable[[], list[Any]]]:
    """Gives a function that lists what was made inside and still lives, a few older things among it."""
    was_enabled = gc.isenabled()
    gc.disable()  # what is collected grows older, and all objects of a process are too many to look at
    before = _collections()
    try:
        yield lambda: gc.get_objects(generation=0) if _collections() == before else gc.get_objects()
    finally:
        if was_enabled:
            gc.enable()


def _collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())
