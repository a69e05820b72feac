"""Memory and values for a model that was built without: each rank has its shards, and one whole tensor at a time."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.model.construct import Record, become, named_tensors
from nemo_dist_conf.runtime.model.recording.playback import Player
from nemo_dist_conf.runtime.model.shard_boxes import local_part
from nemo_dist_conf.runtime.torch_inside import (
    local_tensor,
    own_buffers,
    own_parameters,
    replace_tensors,
    storage_id,
    with_local_tensor,
)

__all__ = ["initialise_in_turn", "materialise", "retie", "tied_names"]

log = logging.getLogger(__name__)


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def materialise(
    model: nn.Module, record: Record, store: torch.device | None = None, loaded: Collection[str] = ()
) -> None:
    """Give a parallelised model its storage, where it is on meta, and its initial values, the same for every layout.

    Each tensor is played back in full on the record's device, one after the other, and every rank keeps its own shard:
    a rank holds its shards, the largest of the model's tensors, and what that is made of.
    model: the one that was recorded, parallelised by now, or a pipeline stage of it.
    store: where parameters live (the CPU under offload); None: where they are played back.
    loaded: names whose values come from elsewhere.
    """
    targets = _give_storage(model, store or record.device)
    filled: set[int] = set()
    with Player(record.tape, record.seed, record.device) as player:
        for group in record.groups:
            names = [name for name in group if name in targets and name not in loaded]
            # A stage has stand-ins for what it does not hold; tied names are one tensor.
            names = [name for name in names if id(targets[name]) not in filled]
            wanted = {id(targets[name]): name for name in reversed(names)}
            filled.update(wanted)
            _play(player, record, {name: targets[name] for name in wanted.values()})
    log.debug("materialised on %s, seed %d", store or record.device, record.seed)


def _play(player: Player, record: Record, targets: Mapping[str, Tensor]) -> None:
    if not targets:
        return
    refs = [record.refs[name] for name in targets]
    places = [None if isinstance(target, DTensor) else target for target in targets.values()]
    for target, place, value in zip(targets.values(), places, player.play(refs, places)):
        if isinstance(target, DTensor):
            local_tensor(target).copy_(local_part(value, target))
        elif place is None or value.data_ptr() != place.data_ptr() or not value.numel():
            target.copy_(value)


def _give_storage(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """``model.to_empty`` for what is on meta, without asking DTensor how an empty tensor is sharded: like that one.

    Whole tensors stay the objects that they are, with their hooks and attributes, so that whatever else refers to them
    goes on doing so. Returns the model's parameters and buffers by name.
    """
    named = named_tensors(model)
    tensors = list(dict.fromkeys(named.values()))
    whole = [tensor for tensor in tensors if tensor.is_meta and not isinstance(tensor, DTensor)]
    users = Counter(map(storage_id, whole))
    memory: dict[int, torch.UntypedStorage] = {}
    for tensor in whole:
        id_, real = storage_id(tensor), _empty(tensor, device)
        if users[id_] > 1:  # several tensors in one memory stay so
            if id_ not in memory:
                memory[id_] = torch.UntypedStorage(tensor.untyped_storage().nbytes(), device=device)
            real = real.set_(memory[id_], tensor.storage_offset(), tensor.shape, tensor.stride())
        become(tensor, real)
    if not any(tensor.is_meta for tensor in tensors):
        return named
    ties = tied_names(model)

    def empty(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if not isinstance(tensor, DTensor):
            return _empty(tensor, device)
        return with_local_tensor(tensor, _empty(local_tensor(tensor), device))

    with torch.no_grad():
        replace_tensors(model, empty)
    retie(model, ties)
    return named_tensors(model)


def _empty(like: Tensor, device: torch.device) -> Tensor:
    # Not empty_like, for which torch runs a millisecond of Python when the tensor is on meta.
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def initialise_in_turn(model: nn.Module, record: Record) -> None:
    """Let each module of a model on meta have its values played back when it is asked to reset itself.

    For a library that calls reset_parameters module by module and keeps this rank's shard of each. Modules that own
    buffers only are filled at once, because nothing would ask them. No parameters may be tied.
    """

    def playing(module: nn.Module, names: Mapping[str, str]) -> Callable[[], None]:
        def play() -> None:
            own: dict[str, Any] = {**own_parameters(module), **own_buffers(module)}
            with Player(record.tape, record.seed, record.device) as player:
                for name, key in names.items():
                    _play(player, record, {name: own[key]})

        return play

    for path, module in model.named_modules():
        own = {**own_parameters(module), **own_buffers(module)}
        names = {f"{path}.{key}" if path else key: key for key, tensor in own.items() if tensor is not None}
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters = playing(module, names)
        elif names:
            module.to_empty(device=record.device, recurse=False)
            playing(module, names)()


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
