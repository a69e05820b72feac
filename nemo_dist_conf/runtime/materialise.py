"""Weights that depend on the seed and the module's name only, drawn into whatever shards a rank holds."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["Template", "can_materialise", "materialise", "retie", "template_of", "tied_names"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """What a model on meta was before it was parallelised: full shapes and initialisers, module by module.

    owners: copies of the modules that own tensors, by name. ties: names that are one parameter.
    """

    model: nn.Module
    owners: dict[str, nn.Module]
    ties: list[list[str]]


def template_of(model: nn.Module) -> Template:
    """The template of a model on meta. Call it before any wrapping."""
    return Template(model, {name: _copy(module) for name, module in _owners(model)}, tied_names(model))


def _copy(module: nn.Module) -> nn.Module:
    """A module with tensor slots of its own; without children the rest can be shared, which is much cheaper."""
    if module._modules:
        return copy.deepcopy(module)
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = dict(module._parameters)
    copied.__dict__["_buffers"] = dict(module._buffers)
    return copied


def can_materialise(model: nn.Module) -> bool:
    """Whether every module that owns tensors knows how to initialise them (reset_parameters, transformers)."""
    if _initialiser(model, nn.Module()) is not None:
        return True
    return all(_initialiser(model, module) is not None for _, module in _owners(model))


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def materialise(
    model: nn.Module, template: Template, seed: int, device: torch.device, store: torch.device | None = None
) -> None:
    """Give a parallelised model on meta its storage and its initial weights, the same for every layout.

    Each module's tensors are drawn in full on ``device`` from a generator seeded by (seed, module name), one module
    at a time, and every rank keeps its own shard; no rank ever holds the whole model.
    store: where parameters live (the CPU under offload); None: on ``device``.
    """
    model.to_empty(device=store or device)
    targets = dict(model.named_modules())
    followers = {name for group in template.ties for name in group[1:]}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for name, module in template.owners.items():
            _fill(targets[name], name, module, template.model, seed, device, followers)
    retie(model, template.ties)
    log.debug("materialised on %s, seed %d", store or device, seed)


def retie(model: nn.Module, ties: list[list[str]]) -> None:
    """Make each group of names one parameter again (to_empty makes copies)."""
    for first, *others in ties:
        kept = model.get_parameter(first)
        for other in others:
            path, _, leaf = other.rpartition(".")
            module = model.get_submodule(path)
            if getattr(module, leaf) is not kept:
                setattr(module, leaf, kept)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a parameter or a buffer themselves."""
    for name, module in model.named_modules():
        if any(p is not None for p in (*module._parameters.values(), *module._buffers.values())):
            yield name, module


def _initialiser(model: nn.Module, module: nn.Module) -> Callable[[], Any] | None:
    """What initialises one module: the model's own ``_init_weights`` as transformers has it, or reset_parameters."""
    own = getattr(model, "_init_weights", None)
    if callable(own):
        return lambda: own(module)
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            return reset
    return None


def _fill(
    target: nn.Module,
    name: str,
    module: nn.Module,
    model: nn.Module,
    seed: int,
    device: torch.device,
    followers: set[str],
) -> None:
    owned: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
    shapes = [dict(tensors) for tensors in owned]
    for tensors in owned:
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            empty = torch.empty_like(tensor, device=device)
            if empty.is_floating_point():
                empty.fill_(torch.nan)  # so that what the initialiser forgets is seen
            is_parameter = tensors is module._parameters
            tensors[key] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    initialise = _initialiser(model, module)
    if initialise is None:
        raise AssertionError(f"{name} cannot initialise itself; can_materialise was not asked")
    # Not torch.manual_seed: on a CPU it queues a seed and a stack trace for each kind of device that may come later.
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(_seed(seed, name))
    initialise()
    for tensors, targets in ((module._parameters, target._parameters), (module._buffers, target._buffers)):
        for key, value in tensors.items():
            # A tied parameter has the values drawn for its first name, whether or not it is still tied here.
            if value is not None and f"{name}.{key}" not in followers:
                _check_set(value, name, key, module)
                _copy_shard(targets[key], value)
    for tensors, before in zip(owned, shapes):
        tensors.update(before)  # back to meta: at most one module is ever whole


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def _check_set(value: torch.Tensor, name: str, key: str, module: nn.Module) -> None:
    if value.is_floating_point() and bool(value.isnan().any()):
        what = f"{type(module).__name__} does not set its {key} ({name}.{key}) when it is initialised"
        raise ConfigError(
            Problem(
                what,
                "a model built on the meta device",
                "reset_parameters that sets every parameter and buffer of the module",
                "nemo_dist_conf.instantiate(cfg, model=built_module)",
            )
        )


def _copy_shard(target: torch.Tensor | None, full: torch.Tensor) -> None:
    if target is None:
        raise AssertionError("a tensor of the template is missing in the model")
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        source = full.detach().to(mesh.device_type)
        # Every rank drew the same values, so none is sent: src_data_rank=None.
        shard = distribute_tensor(source, mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(full)
