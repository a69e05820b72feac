"""Ways into a model besides its forward, under fully_shard: methods, and modules inside that are called by themselves.

fully_shard gathers the root's parameters around the root's forward only. Here each way in does so once: a call from
inside of another is a plain call. What is entered is found out: a module that holds parameters of the root, when it is
called; a method, where its code names parameters, when it is called. Methods that only call such modules need nothing.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, Callable, Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.copies import RefusesCopy
from nemo_dist_conf.runtime.forwards import Around, public_methods
from nemo_dist_conf.runtime.torch_inside import is_gathered_for_forward, run_as_forward

__all__ = ["open_entries"]


def open_entries(root: nn.Module, before_forward: Callable[[], None] | None = None) -> None:
    """Let methods and inner modules of a model that fully_shard was applied to be called by themselves; in place.

    before_forward: called each time that the model is entered, in whatever way.
    """
    door = _Door(root, before_forward)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            vars(module)["__deepcopy__"] = RefusesCopy(module)  # torch's own refusal names no way on
    root.forward = _RootForward(root.forward, door)
    inner = list(_of_root(root))
    names = {key for module in (root, *inner) for key in module._parameters}
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


class _Door:
    """Whether the model is being run, and how it is entered where it is not."""

    def __init__(self, root: nn.Module, before: Callable[[], None] | None) -> None:
        self.root, self.before = root, before
        self.is_inside = False

    def enter(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_inside:
            return call(*args, **kwargs)
        return run_as_forward(self.root, _Forward(call, self), args, kwargs)


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
            return self.__wrapped__(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" in str(error) and not was:
                raise _used_outside(door.root) from error
            raise
        finally:
            door.is_inside = was


class _RootForward(_Forward):
    """Called by the model, with what gathers around it; or by itself, as ``model.forward(x)``, without."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.door.is_inside or is_gathered_for_forward(self.door.root):
            return super().__call__(*args, **kwargs)
        return self.door.enter(self.__wrapped__, args, kwargs)


class _Entry(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.door.enter(self.__wrapped__, args, kwargs)


def _used_outside(root: nn.Module) -> ConfigError:
    what = f"{type(root).__name__.removeprefix('FSDP')} uses a parameter of a block outside of the block's forward"
    allowed = "strategy=ddp, where every rank holds all of it; or blocks= (blocks that hold what uses them)"
    return ConfigError(Problem(what, "strategy=fsdp2, which gathers it while the block runs", allowed, "strategy=ddp"))


def _names(method: Callable[..., Any], kind: type, names: set[str]) -> bool:
    """Whether a method's code, or that of methods it names, has one of these names in it."""
    waiting = [inspect.unwrap(method)]
    seen: set[str] = set()
    while waiting:
        code = getattr(waiting.pop(), "__code__", None)
        for word in _words(code) if code is not None else ():
            if word in names:
                return True
            found = getattr(kind, word, None)
            if word not in seen and isinstance(found, types.FunctionType) and not hasattr(nn.Module, word):
                waiting.append(inspect.unwrap(found))
            seen.add(word)
    return False


def _words(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _words(constant)
