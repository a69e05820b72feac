"""Where a model's blocks are: the repeated layers that are sharded, recomputed and compiled one by one."""

from __future__ import annotations

import fnmatch
import logging
from typing import Iterable

from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import nearest
from nemo_dist_conf.runtime.torch_inside import block_classes

__all__ = ["Blocks", "find_blocks"]

log = logging.getLogger(__name__)

#: Blocks by their name in the model, in the order of forward.
Blocks = dict[str, nn.Module]


def find_blocks(model: nn.Module, declared: str | Iterable[str] | None = None) -> Blocks:
    """The model's blocks by name, outermost only, in module order.

    Looked for in this order: ``declared`` (a path or several, ``*`` allowed; a list of modules stands for its
    members), the attribute ``distributed_blocks`` of the model, the class names in ``_no_split_modules`` (the
    declaration of transformers' models) with the repeated layers of towers in which it names nothing, and else the
    repeated layers: members of a ModuleList or Sequential that holds two modules or more of one class. Empty where a
    model has no repetition.
    Raises ConfigError where a declared path matches nothing.
    """
    paths = declared if declared is not None else getattr(model, "distributed_blocks", None)
    if paths is not None:
        found = _declared(model, [paths] if isinstance(paths, str) else list(paths))
    else:
        found = _by_class(model, block_classes(model))
        found |= {name: module for name, module in _repeated(model).items() if not _is_beside(name, found)}
    found = {path: block for name, module in found.items() for path, block in _called(name, module).items()}
    order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    outermost: Blocks = {}
    for name, module in sorted(found.items(), key=lambda block: order[block[0]]):
        if not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    log.debug("%d blocks: %s", len(outermost), ", ".join(list(outermost)[:3]))
    return outermost


def _called(name: str, module: nn.Module) -> Blocks:
    """The module; of a container that cannot be called, as a ModuleDict of a level's parts, what it contains."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module).forward is not nn.Module.forward:
        return {name: module}
    members = {f"{name}.{key}": child for key, child in module.named_children()}
    found = {path: block for key, child in members.items() for path, block in _called(key, child).items()}
    return {path: block for path, block in found.items() if next(block.parameters(), None) is not None}


def _declared(model: nn.Module, paths: list[str]) -> Blocks:
    modules = dict(model.named_modules())
    found: Blocks = {}
    for path in paths:
        names = [name for name in modules if name and fnmatch.fnmatchcase(name, path)]
        if not names:
            likely = nearest(path, [name for name in modules if name]) or _containers(model)
            raise ConfigError(
                Problem(
                    what=f"blocks: no module of {type(model).__name__} is named {path}",
                    asked=f"blocks={path}",
                    allowed=", ".join(likely) or "names from model.named_modules()",
                    instead=f"blocks={likely[0] if likely else 'null'}",
                )
            )
        for name in names:
            module = modules[name]
            members = dict(module.named_children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else None
            found.update({f"{name}.{key}": m for key, m in members.items()} if members else {name: module})
    return found


def _by_class(model: nn.Module, class_names: Iterable[str] | None) -> Blocks:
    wanted = set(class_names or ())
    return {name: module for name, module in model.named_modules() if name and type(module).__name__ in wanted}


def _is_beside(name: str, found: Blocks) -> bool:
    """Whether anything is declared in the tower whose list a repeated layer is in, or around that: it says what the
    blocks are there."""
    tower = name.rpartition(".")[0].rpartition(".")[0]
    inside = f"{tower}." if tower else ""
    return any(other.startswith(inside) or name.startswith(f"{other}.") for other in found)


def _containers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and _is_repetition(module)]


def _is_repetition(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    members = [m for m in module.children() if next(m.parameters(), None) is not None]
    # Plain Linear layers one after the other are the inside of a block, not blocks.
    return len(members) > 1 and len({type(m) for m in members}) == 1 and next(members[0].children(), None) is not None


def _repeated(model: nn.Module) -> Blocks:
    found: Blocks = {}
    for name, module in model.named_modules():
        if _is_repetition(module):
            members = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
            found.update({path: child for path, child in members.items() if next(child.parameters(), None) is not None})
    return found
