"""Ways into a model besides its forward, under fully_shard: methods, and modules inside that are called by themselves.

fully_shard gathers the root's parameters around the root's forward only. Here each way in does so once: a call from
inside of another is a plain call. What is entered is found out: a module that holds parameters of the root, when it is
called; a method, where its code names parameters, when it is called. Methods that only call such modules need nothing.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.engines.refused_copies import RefusesCopy, RefusesPickle
from nemo_dist_conf.runtime.model.replaced_forwards import Around, public_methods
from nemo_dist_conf.runtime.torch_inside import (
    before_backward,
    given_parameters,
    is_as_sharded,
    is_gathered_for_forward,
    own_parameters,
    replaced_parameter,
    run_as_forward,
    tree_iter,
    written_parameters,
)

__all__ = ["open_entries"]

#: In what torch says where a parameter is used that is not gathered.
_MIXED = "mixed torch.Tensor and DTensor"
#: In what torch says where tensors of two dtypes meet, or of one that a function does not take.
_OF_DTYPES = ("same dtype", "Unsupported dtype", "not implemented for")


def open_entries(
    root: nn.Module, before_forward: Callable[[], None] | None = None, param_dtype: torch.dtype | None = None
) -> None:
    """Let methods and inner modules of a model that fully_shard was applied to be called by themselves; in place.

    before_forward: called each time that the model is entered, in whatever way. param_dtype: what its parameters are
    cast to.
    """
    door = _Door(root, before_forward, param_dtype)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            vars(module)["__deepcopy__"] = RefusesCopy(module)  # torch's own refusal names no way on
            vars(module)["__reduce_ex__"] = RefusesPickle(module)
            _OwnParameters(module)
            if module is not root:
                for name, method in public_methods(module):
                    setattr(module, name, _MethodOfUnit(method, root))
    root.forward = _RootForward(root.forward, door)
    inner = list(_of_root(root))
    names = {key for module in (root, *inner) for key in own_parameters(module)}
    for module in inner:
        if next(module.parameters(), None) is not None:
            module.forward = _Entry(module.forward, door)
    for module in (root, *inner):
        for name, method in public_methods(module):
            if _names(method, type(module), names):
                setattr(module, name, _Entry(method, door))


def _of_root(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below that no unit has."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield child
            yield from _of_root(child)


class _OwnParameters:
    """That a unit's modules hold the parameters that are gathered, and that those are only read."""

    def __init__(self, unit: nn.Module) -> None:
        self.given = given_parameters(unit)
        self._only_set: set[int] = set()
        unit.register_forward_pre_hook(self._before, prepend=True)  # before it is gathered
        unit.register_forward_hook(self._after, prepend=True)  # before it is freed
        before_backward(unit, _refuse_second_derivatives)

    @torch.compiler.disable
    def _before(self, unit: nn.Module, args: Any) -> None:
        replaced = replaced_parameter(self.given)
        if replaced is not None:
            raise _replaced(*replaced)
        self._after()

    @torch.compiler.disable
    def _after(self, *_: Any) -> None:
        for number in written_parameters(self.given):
            if number not in self._only_set:
                owner, name, known = self.given[number]
                if not is_as_sharded(known):
                    raise _changed(owner, name)
                self._only_set.add(number)  # peft parametrizes a weight for each forward, and sets it to itself


def _refuse_second_derivatives() -> None:
    """A backward with create_graph=True keeps what was gathered, which is freed behind it: torch reads freed memory."""
    if torch.is_grad_enabled():
        what = "gradients of gradients (create_graph=True) need the whole parameters after backward"
        allowed = "strategy=ddp, where every rank holds them"
        raise ConfigError(
            Problem(
                what=what, asked="strategy=fsdp2, which frees them in backward", allowed=allowed, instead="strategy=ddp"
            )
        )


class _Door:
    """Whether the model is being run, and how it is entered where it is not."""

    def __init__(
        self, root: nn.Module, before: Callable[[], None] | None, param_dtype: torch.dtype | None = None
    ) -> None:
        self.root, self.before, self.param_dtype = root, before, param_dtype
        self.is_inside = False
        self.meshes = {parameter.device_mesh for parameter in root.parameters() if isinstance(parameter, DTensor)}

    def enter(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_inside:
            return call(*args, **kwargs)
        found = run_as_forward(self.root, _Forward(call, self), args, kwargs)
        if any(isinstance(leaf, Tensor) and _is_freed(leaf) for leaf in tree_iter(found)):
            raise _given_out(getattr(call, "__name__", "a method"))
        return found


class _Forward(Around):
    """Inside for as long as it runs; what gathers is around it."""

    def __init__(self, method: Callable[..., Any], door: _Door) -> None:
        super().__init__(method)
        self.door = door

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        door = self.door
        if door.before is not None:
            door.before()
        was, door.is_inside = door.is_inside, True
        try:
            found = self.__wrapped__(*args, **kwargs)
            if not was and inspect.isgenerator(found) | inspect.isawaitable(found):
                raise _runs_later(getattr(self.__wrapped__, "__name__", type(found).__name__))
            return found
        except RuntimeError as error:
            if _MIXED in str(error) and not was:
                raise _used_outside(door.root) from error
            if door.param_dtype is not None and not was and any(word in str(error) for word in _OF_DTYPES):
                raise _not_in(door.param_dtype, door.root, error) from error
            raise
        finally:
            door.is_inside = was


class _RootForward(_Forward):
    """Called by the model, with what gathers around it; or by itself, as ``model.forward(x)``, without."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.door.is_inside or is_gathered_for_forward(self.door.root):
            found = super().__call__(*args, **kwargs)
        else:
            found = self.door.enter(self.__wrapped__, args, kwargs)
        if any(isinstance(leaf, DTensor) and leaf.device_mesh in self.door.meshes for leaf in tree_iter(found)):
            raise _used_outside(self.door.root)  # in a sum, say, which torch takes here and fails at in backward
        return found


class _Entry(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.door.enter(self.__wrapped__, args, kwargs)


class _MethodOfUnit(Around):
    """Runs while the unit is gathered, or is refused: a reversible block's own backward, say, runs when it is not."""

    def __init__(self, method: Callable[..., Any], root: nn.Module) -> None:
        super().__init__(method)
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.__wrapped__(*args, **kwargs)
        except RuntimeError as error:
            if _MIXED in str(error):
                raise _used_outside(self.root) from error
            raise


def _not_in(dtype: torch.dtype, root: nn.Module, error: RuntimeError) -> ConfigError:
    word, key = str(dtype).removeprefix("torch."), "strategy.mp_policy"
    said = str(error).partition("\n")[0]
    what = f"{_kind(root)} cannot compute with parameters in {word} as it is written: {said}"
    allowed = f"{key}=null, which computes in the dtype of the parameters; a model that casts (buffer.to(x.dtype))"
    return ConfigError(Problem(what=what, asked=f"{key}.param_dtype={word}", allowed=allowed, instead=f"{key}=null"))


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")


def _used_outside(root: nn.Module) -> ConfigError:
    what = f"{_kind(root)} uses a parameter of a block outside of the block's forward"
    allowed = "strategy=ddp, where every rank holds all of it; or blocks= (blocks that hold what uses them)"
    return ConfigError(
        Problem(
            what=what,
            asked="strategy=fsdp2, which gathers it while the block runs",
            allowed=allowed,
            instead="strategy=ddp",
        )
    )


def _replaced(owner: nn.Module, name: str) -> ConfigError:
    what = f"{name} of {_kind(owner)} was replaced after the model was sharded, as functional_call does it"
    allowed = "the model's own parameters; strategy=ddp, which takes others for a call"
    return ConfigError(
        Problem(
            what=what, asked="strategy=fsdp2, which gathers the one it knows", allowed=allowed, instead="strategy=ddp"
        )
    )


def _changed(owner: nn.Module, name: str) -> ConfigError:
    what = f"{name} of {_kind(owner)} was changed in place while it was gathered, and the change is lost"
    allowed = "a buffer for what forward changes; a change between steps, of the sharded parameter; strategy=ddp"
    return ConfigError(
        Problem(
            what=what,
            asked="strategy=fsdp2, which gathers it anew from the shards",
            allowed=allowed,
            instead="strategy=ddp",
        )
    )


def _is_freed(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one, that was gathered and is not any more."""
    if isinstance(tensor, DTensor) or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return False
    return tensor.untyped_storage().nbytes() == 0


def _given_out(name: str) -> ConfigError:
    what = f"{name} returns a parameter, or a view of one, which is freed when {name} ends"
    allowed = "strategy.reshard_after_forward=false, which keeps parameters; or a method that computes with it"
    asked = "strategy=fsdp2, which gathers a parameter while a method runs"
    return ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="strategy.reshard_after_forward=false"))


def _runs_later(name: str) -> ConfigError:
    what = f"{name} is a generator or a coroutine: it uses parameters after the call, when they are freed"
    allowed = "strategy=ddp, where every rank holds them; or a method that returns a list"
    return ConfigError(
        Problem(
            what=what,
            asked="strategy=fsdp2, which gathers them while a method runs",
            allowed=allowed,
            instead="strategy=ddp",
        )
    )


def _names(method: Callable[..., Any], kind: type, names: set[str]) -> bool:
    """Whether a method's code, or that of methods and functions it names or has closed over, has one of these names."""
    waiting: list[Any] = [method]
    seen: set[int] = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen:
            continue
        seen.add(id(code))
        words = set(_words(code))
        if words & names:
            return True
        own = [getattr(kind, word, None) for word in words if not hasattr(nn.Module, word)]
        beside = [getattr(function, "__globals__", {}).get(word) for word in words]
        closed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
        waiting += [found for found in (*own, *closed) if isinstance(found, types.FunctionType)]
        waiting += [f for f in beside if isinstance(f, types.FunctionType) and f.__module__ == function.__module__]
    return False


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _words(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _words(constant)
