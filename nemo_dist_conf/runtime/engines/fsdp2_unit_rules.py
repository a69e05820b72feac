"""What fully_shard cannot put into one unit: which parameters go to another one, or stay whole on every rank.

A unit's parameters are gathered, computed and reduced as one, so torch wants them of one dtype, with a dimension to
split, contiguous, and of no other unit (torch/distributed/fsdp/_fully_shard, 2.11 to 2.13).
"""

from __future__ import annotations

import logging
from typing import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.blocks import Blocks

__all__ = [
    "input_embeddings",
    "lay_in_order",
    "of_other_dtype",
    "output_embeddings",
    "scalars",
    "unshared",
]

log = logging.getLogger(__name__)


def unshared(model: nn.Module, blocks: Blocks) -> Blocks:
    """The blocks that can be units: all but those that hold a parameter or module which also stands outside of them.

    What those hold is gathered with the root.
    """
    regions = {id(block): name for name, block in blocks.items()}
    places: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for region, module in _in_regions(model, regions):
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), set()).add(region)
            names.setdefault(id(parameter), key)
    kept: Blocks = {}
    for name, block in blocks.items():
        common = [(key, p) for key, p in block.named_parameters() if len(places[id(p)]) > 1]
        if not common:
            kept[name] = block
            continue
        key, parameter = common[0]
        others = sorted((places[id(parameter)] - {name}) or {""})
        log.info("%s is no unit of its own: its %s is also a parameter of %s", name, key, others[0] or "the model")
    return kept


def _in_regions(model: nn.Module, regions: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """(block that it is in, or "", module) for every place where a module stands."""
    seen: set[tuple[str, int]] = set()
    waiting = [("", model)]
    while waiting:
        region, module = waiting.pop()
        region = region or regions.get(id(module), "")
        if (region, id(module)) not in seen:
            seen.add((region, id(module)))
            yield region, module
            waiting += [(region, child) for child in module.children()]


def scalars(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Parameters without a dimension, or without elements, each as (its module, its name there)."""
    return [
        (module, key)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.dim() == 0 or parameter.numel() == 0
    ]


def lay_in_order(model: nn.Module) -> None:
    """Let parameters lie in memory in the order of their dimensions: channels_last weights do not, say."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def of_other_dtype(
    unit: nn.Module, ignored: Iterable[nn.Parameter], casts: bool
) -> tuple[list[nn.Module], list[tuple[nn.Module, str]]]:
    """What of a unit is not of the dtype that most of it has: (modules to be units of their own, parameters to be kept
    whole on every rank, each as (module, name)).

    casts: whether units compute in another dtype than they store; what is kept whole would not be cast.
    Raises ConfigError for a module with parameters of several dtypes under such a policy.
    """
    left_out = {id(parameter) for parameter in ignored}
    owned: list[tuple[nn.Module, dict[str, torch.dtype]]] = []
    elements: dict[torch.dtype, int] = {}
    for module in _managed(unit):
        dtypes = {}
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if casts and parameter.is_complex():
                raise _several_dtypes(f"{type(module).__name__} has complex parameters ({key})")
            if parameter.requires_grad and id(parameter) not in left_out:
                dtypes[key] = parameter.dtype
                elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
        if dtypes:
            owned.append((module, dtypes))
    if len(elements) < 2:
        return [], []
    most = max(elements, key=lambda dtype: elements[dtype])
    apart: list[nn.Module] = []
    whole: list[tuple[nn.Module, str]] = []
    for module, dtypes in owned:
        others = [key for key, dtype in dtypes.items() if dtype != most]
        if len(set(dtypes.values())) == 1 and others and module is not unit and not any(module.children()):
            apart.append(module)
        elif others:
            whole += [(module, key) for key in others]
    if whole and casts:
        module, key = whole[0]
        dtype = _word(module.get_parameter(key))
        raise _several_dtypes(f"{type(module).__name__} has parameters of several dtypes ({key} is {dtype})")
    return apart, whole


def _several_dtypes(what: str) -> ConfigError:
    key = "strategy.mp_policy"
    return ConfigError(
        Problem(
            what=what, asked=f"{key}.param_dtype", allowed=f"{key}=null: each in its own dtype", instead=f"{key}=null"
        )
    )


def _managed(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules that fully_shard would take into a unit."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _managed(child)


def _word(parameter: nn.Parameter | None) -> str:
    return str(parameter.dtype if parameter is not None else None).removeprefix("torch.")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The embedding of a transformers model; None where the model does not say which it is, or has several."""
    return _asked(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a transformers model; None likewise."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, name: str) -> nn.Module | None:
    try:
        found = getattr(model, name, lambda: None)()
    except (NotImplementedError, AttributeError):  # of models with several towers, or without text
        return None
    return found if isinstance(found, nn.Module) else None
