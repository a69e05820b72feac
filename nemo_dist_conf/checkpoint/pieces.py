"""What of a model and its optimizer this rank holds, under names and places that do not depend on the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nemo_dist_conf.errors import DataError, Problem
from nemo_dist_conf.runtime.boxes import Box, box_of, local_values
from nemo_dist_conf.runtime.megatron_fsdp import is_wrapped, show_shards, take_over_weights
from nemo_dist_conf.runtime.unwrap import unwrapped

__all__ = [
    "Piece",
    "Stored",
    "group_settings",
    "optimizer_pieces",
    "set_group_settings",
    "set_weights",
    "weight_pieces",
]

_MODEL, _OPTIMIZER = "model.", "optimizer."

#: Settings of a group that say how its update is computed, not what it is; what one layout can run another may not.
_EXECUTION = ("foreach", "fused")


class Piece:
    """This rank's part of a tensor, as torch.distributed.checkpoint asks for it.

    values: the part itself, on any device. shape: of the whole tensor.
    """

    def __init__(self, values: Tensor, box: Box, shape: Iterable[int]) -> None:
        self.values, self.box, self.shape = values, box, torch.Size(shape)

    def size(self) -> torch.Size:
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.box.is_empty:
            return []
        return [ChunkStorageMetadata(torch.Size(self.box.offsets), torch.Size(self.box.sizes))]

    def __create_write_items__(self, name: str, piece: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.values.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


@dataclass(frozen=True)
class Stored:
    """A tensor that a checkpoint holds: dtype and shape of the whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def weight_pieces(model: nn.Module) -> dict[str, Piece]:
    """Parameters and persistent buffers by ``model.`` and their name in the user's model; tied ones once."""
    return {f"{_MODEL}{name}": _piece(value) for name, value in _named_state(model).items()}


def _named_state(model: nn.Module) -> dict[str, Tensor]:
    if is_wrapped(model):
        show_shards(model)
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, value in unwrapped(model).state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            state[name] = value
    return state


def _piece(value: Tensor) -> Piece:
    return Piece(local_values(value), box_of(value), value.shape)


def optimizer_pieces(
    model: nn.Module, optimizer: Optimizer, stored: Mapping[str, Stored] | None = None
) -> dict[str, Piece]:
    """The optimizer's tensors by ``optimizer.``, the parameter's name, and the key of its state.

    stored: what a checkpoint holds; state that it has and the optimizer not yet is made, to be filled. None: as it is.
    Raises DataError for state of a sharded parameter that is neither of its shape nor one number.
    """
    names = {id(parameter): name for name, parameter in _named_state(model).items()}
    keys: dict[str, list[str]] = {}
    for full in stored or ():
        if full.startswith(_OPTIMIZER):
            owner, _, key = full.removeprefix(_OPTIMIZER).rpartition("/")
            keys.setdefault(owner, []).append(key)
    pieces: dict[str, Piece] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            if stored is not None:
                state = optimizer.state.get(parameter, {})
                for key in [key for key in state if isinstance(state[key], Tensor) and key not in keys.get(name, ())]:
                    del state[key]  # of steps that the checkpoint has not made
                for key in keys.get(name, ()):
                    _make(optimizer, group, parameter, key, stored[f"{_OPTIMIZER}{name}/{key}"])
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    pieces[f"{_OPTIMIZER}{name}/{key}"] = _state_piece(parameter, value)
    return pieces


def _state_piece(parameter: Tensor, value: Tensor) -> Piece:
    """State of a parameter's shape lies as the parameter does; the rest is the same on every rank."""
    if value.shape == parameter.shape:
        return Piece(local_values(value), box_of(parameter), parameter.shape)
    return _piece(value)


def _make(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, key: str, stored: Stored) -> None:
    """State for the checkpoint to fill, where torch.optim would make it in its first step."""
    state = optimizer.state[parameter]
    found = state.get(key)
    if isinstance(found, Tensor) and tuple(found.shape) == stored.shape:
        return
    if isinstance(parameter, DTensor) and stored.shape not in ((), (1,), tuple(parameter.shape)):
        kind = type(optimizer).__name__
        what = f"{kind} keeps {key} in the shape {list(stored.shape)}, which cannot be split as its parameter is"
        raise DataError(Problem(what, f"optimizer {kind}", "adamw, sgd; strategy=ddp", "strategy=ddp"))
    if stored.shape == tuple(parameter.shape):
        state[key] = torch.zeros_like(parameter.detach(), dtype=stored.dtype)
    else:
        on_device = group.get("capturable") or group.get("fused")
        device = parameter.device if on_device else torch.device("cpu")
        state[key] = torch.zeros(stored.shape, dtype=stored.dtype, device=device)


def set_weights(model: nn.Module) -> None:
    """Let what was put into the parameters take effect, where a library keeps copies of them."""
    if is_wrapped(model):
        take_over_weights(model)


# ------------------------------------------------------------------------------------------------ settings of groups


def group_settings(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups: their settings, the names of their parameters under ``params``, and under ``values``
    what the optimizer keeps of a parameter that is not a tensor."""
    names = {id(parameter): name for name, parameter in _named_state(model).items()}
    groups = []
    for group in optimizer.param_groups:
        held = {names[id(parameter)]: parameter for parameter in group["params"] if id(parameter) in names}
        states = {name: optimizer.state.get(parameter, {}) for name, parameter in held.items()}
        values = {
            name: {key: value for key, value in state.items() if value is not None and not isinstance(value, Tensor)}
            for name, state in states.items()
        }
        settings = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": list(held), "values": {n: found for n, found in values.items() if found}})
    return groups


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def set_group_settings(
    model: nn.Module, optimizer: Optimizer, stored: Iterable[Mapping[str, Any]], only_values: bool = False
) -> None:
    """Give each of the optimizer's groups the settings that its parameters had, and parameters their ``values``.

    Which of torch's kernels make the update stays as this run chose it.
    only_values: groups keep the settings that they have.
    Raises DataError where the parameters of one group had different ones.
    """
    names = {id(parameter): name for name, parameter in _named_state(model).items()}
    of_name = {name: group for group in stored for name in group["params"]}
    for group in optimizer.param_groups:
        held = {names[id(p)]: p for p in group["params"] if names.get(id(p)) in of_name}
        found = [{k: v for k, v in of_name[name].items() if k not in ("params", "values")} for name in held]
        if any(other != found[0] for other in found) and not only_values:
            what = f"the optimizer has {next(iter(held))} in one group with others that had other settings when saved"
            raise DataError(Problem(what, "load(folder, model, optimizer)", "the groups saved", "load(folder, model)"))
        for key, value in (found[0] if found and not only_values else {}).items():
            if key in _EXECUTION:
                continue
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
        for name, parameter in held.items():
            optimizer.state[parameter].update(of_name[name]["values"].get(name, {}))
