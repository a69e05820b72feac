"""Weights that depend on the seed and the module's name only, drawn into whatever shards a rank holds."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist_conf.runtime.boxes import local_part

__all__ = [
    "Template",
    "Writes",
    "can_materialise",
    "draw_in_place",
    "give_storage",
    "initialise_in_turn",
    "materialise",
    "retie",
    "template_of",
    "tied_names",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """What a model was before it was parallelised: full shapes and initialisers, module by module.

    owners: copies of the modules that own tensors, on meta, by name. ties: names that are one parameter.
    """

    model: nn.Module
    owners: dict[str, nn.Module]
    ties: list[list[str]]


def template_of(model: nn.Module) -> Template:
    """The template of a model whose values do not matter (on meta, or not initialised). Call it before any wrapping."""
    return Template(model, {name: _copy(module) for name, module in _owners(model)}, tied_names(model))


def _copy(module: nn.Module) -> nn.Module:
    """A module with tensor slots of its own, on meta; without children the rest is shared, which is much cheaper."""
    if module._modules:
        return copy.deepcopy(module).to("meta")
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = {key: _on_meta(tensor) for key, tensor in module._parameters.items()}
    copied.__dict__["_buffers"] = {key: _on_meta(tensor) for key, tensor in module._buffers.items()}
    return copied


def _on_meta(tensor: Any) -> Any:
    if tensor is None or tensor.is_meta:
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


#: Writes of values alone: a tensor on meta has none, and torch takes up to a millisecond of Python for each.
_VALUES_ONLY = frozenset(f"aten::{name}_" for name in ("normal", "uniform", "fill", "zero", "copy", "mul", "add"))


class Writes(TorchDispatchMode):
    """Counts, while it is entered, how often each tensor's storage is written to; meta tensors count like others."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            key = args[0].untyped_storage()._cdata
            self._counts[key] = self._counts.get(key, 0) + 1
            if args[0].is_meta and func._schema.name in _VALUES_ONLY:
                return args[0]
        return func(*args, **(kwargs or {}))

    def of(self, tensor: torch.Tensor) -> int:
        return self._counts.get(tensor.untyped_storage()._cdata, 0)


def can_materialise(model: nn.Module, construction: Writes | None = None) -> bool:
    """Whether a model can be filled module by module with the values that its constructor would give.

    Each module that owns tensors must have an initialiser that sets all of them. A constructor of the user's own may
    do more than its modules' initialisers (a smaller scale for one layer, a mask): where ``construction`` counted
    more writes than those make, or a buffer was computed, the model has to be built with values.
    """
    is_transformers = _is_transformers(model)
    construction = None if is_transformers else construction
    alike: set[Any] = set()
    for _, module in _owners(model):
        kind = _kind(module)
        if construction is None and kind in alike:
            continue
        alike.add(kind)
        copied = _copy(module)
        initialise = _initialiser(model, copied)
        if initialise is None:
            return False
        given: tuple[dict[str, Any], dict[str, Any]] = (dict(copied._parameters), dict(copied._buffers))
        # Frequencies are computed and copied into buffers, for which torch takes milliseconds of Python on meta.
        computes = is_transformers and not module._parameters
        place: Any = torch.random.fork_rng(devices=[]) if computes else torch.device("meta")
        with place, Writes() as writes, torch.no_grad():
            initialise()
        found: tuple[Any, Any] = (copied._parameters, copied._buffers)
        own: tuple[Any, Any] = (module._parameters, module._buffers)
        for tensors, before, owned in zip(found, given, own):
            for key, tensor in before.items():
                if tensor is None or tensors[key] is not tensor:
                    continue
                exact = construction is None or construction.of(owned[key]) == writes.of(tensor)
                if not exact or not writes.of(tensor):
                    return False
    return True


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What an initialiser can tell of a module; modules that are equal here set the same of their tensors."""
    tensors = [(key, t if t is None else t.shape) for key, t in (*module._parameters.items(), *module._buffers.items())]
    plain = [(key, value) for key, value in vars(module).items() if isinstance(value, (int, float, str, type(None)))]
    return type(module), tuple(tensors), tuple(plain)


def _is_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def materialise(
    model: nn.Module, template: Template, seed: int, device: torch.device, store: torch.device | None = None
) -> None:
    """Give a parallelised model its storage, where it is on meta, and its initial weights, the same for every layout.

    Each module's tensors are drawn in full on ``device`` from a generator seeded by (seed, module name), one module
    at a time, and every rank keeps its own shard; no rank ever holds the whole model.
    model: the one that the template was made of, or a pipeline stage of it.
    store: where parameters live (the CPU under offload); None: on ``device``.
    """
    give_storage(model, store or device)
    targets = dict(model.named_modules())
    followers = {name for group in template.ties for name in group[1:]}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for name, module in template.owners.items():
            if name not in targets or not _holds(targets[name], module):
                continue  # on another pipeline stage
            _fill(targets[name], name, module, template.model, seed, device, followers)
    retie(model, template.ties)
    log.debug("materialised on %s, seed %d", store or device, seed)


def draw_in_place(model: nn.Module, seed: int, device: torch.device) -> bool:
    """Draw the weights that ``materialise`` gives, where the model is, whole and with nothing ever wrapped.

    False where a module has no initialiser that sets all of its tensors, as ``can_materialise`` says: the values are
    worth nothing then.
    """
    ties = tied_names(model)
    followers = {name for group in ties for name in group[1:]}
    doubtful = False
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for name, module in _owners(model):
            named = {f"{name}.{key}": t for key, t in (*module._parameters.items(), *module._buffers.items())}
            drawn = [tensor for key, tensor in named.items() if tensor is not None and key not in followers]
            before = [tensor._version for tensor in drawn]
            initialise = _initialiser(model, module)
            if initialise is None:
                return False
            if not followers.isdisjoint(named):
                _fill(module, name, _copy(module), model, seed, device, followers)
            else:
                _seed_generator(seed, name, device)
                initialise()
            doubtful |= any(tensor._version == version for tensor, version in zip(drawn, before))
    # Writes through .data leave the version as it was.
    return not doubtful or can_materialise(model)


def give_storage(model: nn.Module, device: torch.device) -> None:
    """``model.to_empty`` for what is on meta, without asking DTensor how an empty tensor is sharded: like that one."""
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    ties = tied_names(model)

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        # Not empty_like, for which torch runs a millisecond of Python when the tensor is on meta.
        made = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device=device)
        return DTensor(made, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else made

    with torch.no_grad():
        model._apply(empty)
    retie(model, ties)


def initialise_in_turn(model: nn.Module, template: Template, seed: int, device: torch.device) -> None:
    """Let each module of a model on meta draw the weights that ``materialise`` gives when it is asked to reset itself.

    For a library that calls reset_parameters module by module and keeps this rank's shard of each. Modules that own
    buffers only are filled at once, because nothing would ask them. ``template.ties`` has to be empty.
    """
    targets = dict(model.named_modules())

    def drawing(name: str, module: nn.Module) -> Callable[[], None]:
        def draw() -> None:
            forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
            with forked, torch.no_grad():
                _fill(targets[name], name, module, template.model, seed, device, set())

        return draw

    for name, module in template.owners.items():
        if module._parameters:
            targets[name].reset_parameters = drawing(name, module)
        else:
            targets[name].to_empty(device=device, recurse=False)
            drawing(name, module)()


def _holds(target: nn.Module, module: nn.Module) -> bool:
    """Whether this is the module, and not what stands in its place."""
    return target._parameters.keys() == module._parameters.keys() and target._buffers.keys() == module._buffers.keys()


def retie(model: nn.Module, ties: list[list[str]]) -> None:
    """Make each group of names one parameter again (giving storage makes copies)."""
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for first, *others in ties:
        if not present.issuperset((first, *others)):  # on another pipeline stage
            continue
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
    """What initialises one module: ``_init_weights`` of a transformers model, else the module's reset_parameters."""
    if _is_transformers(model):
        return lambda: model._init_weights(module)  # type: ignore[operator]
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
    slots: tuple[dict[str, Any], dict[str, Any]] = (target._parameters, target._buffers)
    shapes = [dict(tensors) for tensors in owned]
    for tensors, targets in zip(owned, slots):
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            drawn = _storage_for(tensor, targets.get(key), device, f"{name}.{key}" in followers)
            is_parameter = tensors is module._parameters
            tensors[key] = nn.Parameter(drawn, tensor.requires_grad) if is_parameter else drawn
    initialise = _initialiser(model, module)
    if initialise is None:
        raise AssertionError(f"{name} cannot initialise itself; can_materialise was not asked")
    _seed_generator(seed, name, device)
    initialise()
    for tensors, targets in zip(owned, slots):
        for key, value in tensors.items():
            # A tied parameter has the values drawn for its first name, whether or not it is still tied here.
            if value is not None and f"{name}.{key}" not in followers:
                _copy_shard(targets[key], value)
    for tensors, before in zip(owned, shapes):
        tensors.update(before)  # back to meta: at most one module is ever whole


def _seed_generator(seed: int, name: str, device: torch.device) -> None:
    # Not torch.manual_seed: on a CPU it queues a seed and a stack trace for each kind of device that may come later.
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big"))


def _storage_for(meta: torch.Tensor, target: torch.Tensor | None, device: torch.device, follows: bool) -> torch.Tensor:
    """Where a tensor is drawn: at once into the model's own where that is whole, else beside it."""
    if target is None or follows or isinstance(target, DTensor) or target.device != device:
        return torch.empty(meta.shape, dtype=meta.dtype, device=device)
    if target.shape != meta.shape or target.dtype != meta.dtype:
        return torch.empty(meta.shape, dtype=meta.dtype, device=device)
    return target.detach()


def _copy_shard(target: torch.Tensor | None, full: torch.Tensor) -> None:
    if target is None:
        raise AssertionError("a tensor of the template is missing in the model")
    if isinstance(target, DTensor):
        target._local_tensor.copy_(local_part(full, target))
    elif target.data_ptr() != full.data_ptr() or target.shape != full.shape:  # else it was drawn there
        target.copy_(full)
