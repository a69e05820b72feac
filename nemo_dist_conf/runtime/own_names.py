"""Names in the user's model of what wrappers, checkpointed blocks and pipeline stages call otherwise."""

from __future__ import annotations

from typing import Iterable

from torch import nn

from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.torch_inside import own_children

__all__ = ["own_named_parameters", "raw_names", "without_wrappers", "wrappers_in"]

#: What torch's checkpoint wrapper adds to names; its state dictionary is without.
_CHECKPOINTED = "_checkpoint_wrapped_module."


def own_named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name in the user's model, parameter) of all that a wrapped model has on this rank, as torch lists them."""
    wrappers = wrappers_in(model)
    return [(_own_name(model, name, wrappers), parameter) for name, parameter in model.named_parameters()]


def raw_names(model: nn.Module) -> dict[str, str]:
    """Names of ``named_parameters``, ``named_buffers``, ``state_dict`` that are others in the user's model -> those."""
    wrappers = wrappers_in(model)
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    found = {}
    for raw in dict.fromkeys([*(name for one in named for name, _ in one), *model.state_dict(keep_vars=True)]):
        name = _own_name(model, raw, wrappers)
        if name != raw:
            found[raw] = name
    return found


def _own_name(model: nn.Module, raw: str, wrappers: Iterable[str]) -> str:
    return engine_of(model).own_name(without_wrappers(raw, wrappers).replace(_CHECKPOINTED, ""))


def wrappers_in(model: nn.Module) -> list[str]:
    """Beginnings of names of what wrappers in a model hold; inner ones first, which have the outer ones' in them."""
    # Asking DDP for its module counts as a use of it beside forward.
    holding = ((path, one) for path, one in model.named_modules() if "module" in own_children(one))
    found = [path for path, one in holding if unwrapped(one) is not one]
    return [f"{path}.module." if path else "module." for path in reversed(found)]


def without_wrappers(name: str, wrappers: Iterable[str]) -> str:
    """A name as it is where nothing is wrapped. wrappers: of ``wrappers_in``."""
    for begin in wrappers:
        if name.startswith(begin):
            name = begin.removesuffix("module.") + name.removeprefix(begin)
    return name
