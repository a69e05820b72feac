"""What stands in the place of a module's method and does something around it."""

from __future__ import annotations

import inspect
import types
from typing import Any, Callable, Iterator

import torch
from torch import nn

__all__ = ["Around", "Autocast", "code_of_forward", "public_methods"]

#: Classes whose methods are not the user's: what they do with a model they do for themselves.
_LIBRARIES = (
    "torch.",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "peft.",
    "megatron_fsdp.",
)


class Around:
    """A callable in place of a method, with the signature of that.

    Not a functools.partial, which torch.compile passes over without a word (torch 2.13), and not a closure: copying the
    model would leave the copy with the original's method.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.__wrapped__ = method


class Autocast(Around):
    """Runs the method under torch.autocast."""

    def __init__(self, method: Callable[..., Any], device_type: str, dtype: torch.dtype) -> None:
        super().__init__(method)
        self.device_type, self.dtype = device_type, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.__wrapped__(*args, **kwargs)


def code_of_forward(module: nn.Module) -> types.CodeType | None:
    """The code of the forward that the module's class defines; None where it is not Python's, as in TorchScript."""
    forward = None if isinstance(module, torch.jit.ScriptModule) else type(module).forward
    return getattr(inspect.unwrap(forward), "__code__", None)  # type: ignore[arg-type]  # of None as well


def public_methods(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, method) of what the module's own classes define besides forward and what every module has.

    The method is bound to the module, or is what stands in its place there; one bound to this module alone is one, too.
    """
    seen: set[str] = set()
    for name, value in list(vars(module).items()):
        if isinstance(value, types.MethodType) and value.__self__ is module and not hasattr(nn.Module, name):
            if name[0] != "_" and not f"{value.__module__}.".startswith(_LIBRARIES):
                seen.add(name)
                yield name, value
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return
        if f"{kind.__module__}.".startswith(_LIBRARIES):
            continue
        for name, value in vars(kind).items():
            if name[0] == "_" or name in seen or hasattr(nn.Module, name):
                continue
            seen.add(name)
            if isinstance(value, types.FunctionType):  # neither a class nor a static method
                yield name, getattr(module, name)
