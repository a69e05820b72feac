"""The parts of a model that a pipeline places: its blocks, and the outermost modules that hold none of them."""

from __future__ import annotations

from typing import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.torch_inside import own_buffers, own_children, own_parameters, with_own_places

__all__ = ["copied", "loose_parameters", "no_chain", "parts_of", "short", "without_values"]


def parts_of(model: nn.Module, blocks: Blocks, opened: Collection[str] = ()) -> dict[str, nn.Module]:
    """The blocks and the outermost modules that hold no block, by name, in the order of attributes.

    A module without a forward (a list) is no part, its members are. opened: further such, whose members are used one
    by one.
    """
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            is_open = path in opened or type(child).forward is nn.Module.forward
            if path not in blocks and (is_open or any(block.startswith(f"{path}.") for block in blocks)):
                walk(child, f"{path}.")
            else:
                found[path] = child

    walk(model, "")
    return found


def loose_parameters(model: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters outside of the parts, by name: of the model itself and of the containers of its blocks."""
    inside = tuple(f"{part}." for part in parts)
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not name.startswith(inside)}


def copied(
    module: nn.Module,
    parts: Mapping[str, nn.Module],
    replace: Callable[[str, nn.Module], nn.Module | None],
    loose: Callable[[str, nn.Parameter], Tensor | None] = lambda name, parameter: None,
    prefix: str = "",
    trial: bool = False,
) -> nn.Module:
    """The module with each of its parts replaced; containers of parts are copied, hooks and all.

    loose: what a container has as an attribute in place of one of its own parameters; None: the parameter stays.
    trial: buffers of the containers that are on meta are zeros on the CPU.
    """
    own = with_own_places(module)
    children, parameters = own_children(own), own_parameters(own)
    for name, parameter in list(parameters.items()):
        instead = None if parameter is None else loose(f"{prefix}{name}", parameter)
        if instead is not None:
            del parameters[name]
            own.__dict__[name] = instead
    if trial:
        buffers = own_buffers(own)
        buffers.update({key: _on_cpu(buffer) for key, buffer in buffers.items() if buffer is not None})
    for name, child in children.items():
        path = f"{prefix}{name}"
        if child is None:
            continue
        if path in parts:
            children[name] = replace(path, child)
        else:
            children[name] = copied(child, parts, replace, loose, f"{path}.", trial)
    return own


def without_values(module: nn.Module) -> nn.Module:
    """What tells of a module all but its values: the module itself where it is on meta, else a likeness."""
    if all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    own = with_own_places(module)
    own.__dict__.pop("forward", None)
    for tensors in (own_parameters(own), own_buffers(own)):
        tensors.update({key: None if one is None else _on_meta(one) for key, one in tensors.items()})
    children = own_children(own)
    children.update({key: None if child is None else without_values(child) for key, child in children.items()})
    return own


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)


def _on_cpu(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        return torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return buffer.detach().to("cpu", copy=True)


def no_chain(model: nn.Module, why: str, allowed: str = "") -> ConfigError:
    return ConfigError(
        Problem(
            what=f"{type(model).__name__} cannot be split into pipeline stages: {why}",
            asked="parallelism.pp_size above 1",
            allowed=allowed or "a forward in which each block takes what its modules before have returned",
            instead="parallelism.pp_size=1",
        )
    )


def short(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
