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

from nemo_dist_conf.checkpoint.json_values import refuse_tensor
from nemo_dist_conf.errors import ConfigError, DataError, Problem
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.model.shard_boxes import Box, Placed, boxes_of, local_values
from nemo_dist_conf.runtime.own_names import without_wrappers, wrappers_in

__all__ = [
    "EXTRA",
    "MODEL",
    "ModelState",
    "OPTIMIZER",
    "Piece",
    "Stored",
    "group_settings",
    "optimizer_pieces",
    "parameter_names",
    "set_group_settings",
    "set_weights",
    "state_of",
    "weight_pieces",
    "whole_piece",
]

MODEL, OPTIMIZER = "model.", "optimizer."
#: Ends the name of what a module's ``get_extra_state`` gives, in torch's state dictionaries.
EXTRA = "_extra_state"

#: Settings of a group that say how its update is computed, not what it is; what one layout can run another may not.
_EXECUTION = ("foreach", "fused")


class Piece:
    """This rank's part of a tensor, as torch.distributed.checkpoint asks for it.

    values: the part itself, on any device. boxes: where it lies in the whole. shape: of the whole tensor.
    """

    def __init__(self, values: Tensor, boxes: Iterable[Placed], shape: Iterable[int]) -> None:
        self.values, self.shape = values, torch.Size(shape)
        self.boxes = tuple(one for one in boxes if not one.box.is_empty)

    def size(self) -> torch.Size:
        return self.shape

    def at(self, offsets: Iterable[int] | None) -> Tensor:
        """The values of the box that begins there, a view; of the first without offsets."""
        begin = None if offsets is None else tuple(offsets)
        found = next(one for one in self.boxes if begin is None or one.box.offsets == begin)
        return found.here.of(self.values)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o.box.offsets), torch.Size(o.box.sizes)) for o in self.boxes]

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


@dataclass(frozen=True)
class ModelState:
    """Parameters and persistent buffers by their names in the user's model, whatever is wrapped in what.

    Tied ones once. foreign: names in the state dictionary of what is neither, so that it cannot be filled in place.
    """

    tensors: Mapping[str, Tensor]
    foreign: tuple[str, ...]


def state_of(model: nn.Module) -> ModelState:
    """What a checkpoint keeps of a model. Every rank calls it."""
    engine_of(model).show_shards(model)
    inner = unwrapped(model)
    wrappers = wrappers_in(inner)
    state = inner.state_dict(keep_vars=True)  # first: after a forward without backward it shards the parameters again
    own = {id(tensor) for held in (inner.parameters(), inner.buffers()) for tensor in held}
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    foreign: list[str] = []
    for name, value in state.items():
        if name.endswith(EXTRA) or id(value) in seen:
            continue
        seen.add(id(value))
        if id(value) in own:
            tensors[without_wrappers(name, wrappers)] = value
        else:
            foreign.append(name)
    return ModelState(tensors, tuple(foreign))


def weight_pieces(state: Mapping[str, Tensor], prefix: str = MODEL) -> dict[str, Piece]:
    """What this rank holds of a model's tensors, by ``prefix`` and name."""
    for name, value in state.items():
        refuse_tensor(value, f"{prefix}{name}")
    return {f"{prefix}{name}": _piece_of(value) for name, value in state.items() if value.numel()}


def whole_piece(values: Tensor) -> Piece:
    """All of a tensor that this rank alone has, or every rank."""
    box = Box((0,) * values.dim(), tuple(values.shape))
    return Piece(values, [Placed(box, box)], values.shape)


def _piece_of(value: Tensor) -> Piece:
    """What this rank holds of a tensor."""
    return Piece(local_values(value), boxes_of(value), value.shape)


def parameter_names(states: Mapping[str, Mapping[str, Tensor]]) -> dict[int, str]:
    """id of a tensor -> prefix and name. states: tensors of models, by prefix."""
    found: dict[int, str] = {}
    for prefix, state in states.items():
        for name, value in state.items():
            found.setdefault(id(value), f"{prefix}{name}")
    return found


def optimizer_pieces(
    names: Mapping[int, str],
    optimizer: Optimizer,
    stored: Mapping[str, Stored] | None = None,
    prefix: str = OPTIMIZER,
) -> dict[str, Piece]:
    """The optimizer's tensors by ``prefix``, the parameter's name, and the key of its state.

    names: of all its parameters, by id. stored: what a checkpoint holds; state that it has and the optimizer not yet is
    made, to be filled. None: as it is.
    Raises DataError for state of a sharded parameter that is neither of its shape nor one number.
    """
    keys: dict[str, list[str]] = {}
    for full in stored or ():
        if full.startswith(prefix):
            owner, _, key = full.removeprefix(prefix).rpartition("/")
            keys.setdefault(owner, []).append(key)
    pieces: dict[str, Piece] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if stored is not None:
                state = optimizer.state.get(parameter, {})
                for key in [key for key in state if isinstance(state[key], Tensor) and key not in keys.get(name, ())]:
                    del state[key]  # of steps that the checkpoint has not made
                for key in keys.get(name, ()):
                    _make(optimizer, group, parameter, key, stored[f"{prefix}{name}/{key}"])
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel():
                    refuse_tensor(value, f"{prefix}{name}/{key}")
                    pieces[f"{prefix}{name}/{key}"] = _state_piece(parameter, value)
    return pieces


def _state_piece(parameter: Tensor, value: Tensor) -> Piece:
    """State of a parameter's shape lies as the parameter does; the rest is the same on every rank."""
    if value.shape == parameter.shape:
        return Piece(local_values(value), boxes_of(parameter), parameter.shape)
    return _piece_of(value)


def _make(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, key: str, stored: Stored) -> None:
    """State for the checkpoint to fill, where torch.optim would make it in its first step."""
    state = optimizer.state[parameter]
    found = state.get(key)
    if isinstance(found, Tensor) and tuple(found.shape) == stored.shape:
        return
    if isinstance(parameter, DTensor) and stored.shape not in ((), (1,), tuple(parameter.shape)):
        kind = type(optimizer).__name__
        what = f"{kind} keeps {key} in the shape {list(stored.shape)}, which cannot be split as its parameter is"
        raise DataError(
            Problem(what=what, asked=f"optimizer {kind}", allowed="adamw, sgd; strategy=ddp", instead="strategy=ddp")
        )
    if stored.shape == tuple(parameter.shape):
        state[key] = torch.zeros_like(parameter.detach(), dtype=stored.dtype)
    else:
        on_device = group.get("capturable") or group.get("fused")
        device = parameter.device if on_device else torch.device("cpu")
        state[key] = torch.zeros(stored.shape, dtype=stored.dtype, device=device)


def set_weights(model: nn.Module) -> None:
    """Let what was put into the parameters take effect, where a library keeps copies of them."""
    engine_of(model).weights_changed(model)


# ------------------------------------------------------------------------------------------------ settings of groups


def group_settings(names: Mapping[int, str], optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups: their settings, the names of their parameters under ``params``, and under ``values``
    what the optimizer keeps of a parameter that is not a tensor.

    Raises ConfigError for an optimizer that keeps something of no parameter."""
    groups = []
    for key in optimizer.state:
        if not isinstance(key, Tensor):
            kind = type(optimizer).__name__
            what = f"{kind} keeps {key!r} in its state, which is of no parameter"
            raise ConfigError(
                Problem(what=what, asked=f"optimizer {kind}", allowed="state of parameters", instead="optimizer=adamw")
            )
    for group in optimizer.param_groups:
        held = {names[id(parameter)]: parameter for parameter in group["params"]}
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
    names: Mapping[int, str],
    optimizer: Optimizer,
    stored: Iterable[Mapping[str, Any]],
    only_values: bool = False,
) -> None:
    """Give each of the optimizer's groups the settings that its parameters had, and parameters their ``values``.

    Which of torch's kernels make the update stays as this run chose it.
    only_values: groups keep the settings that they have.
    Raises DataError where the parameters of one group had different ones.
    """
    of_name = {name: group for group in stored for name in group["params"]}
    for group in optimizer.param_groups:
        held = {names[id(p)]: p for p in group["params"] if names[id(p)] in of_name}
        found = [{k: v for k, v in of_name[name].items() if k not in ("params", "values")} for name in held]
        if any(other != found[0] for other in found) and not only_values:
            what = f"the optimizer has {next(iter(held))} in one group with others that had other settings when saved"
            raise DataError(
                Problem(
                    what=what,
                    asked="load(folder, model, optimizer)",
                    allowed="the groups saved",
                    instead="load(folder, model)",
                )
            )
        for key, value in (found[0] if found and not only_values else {}).items():
            if key in _EXECUTION:
                continue
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
        for name, parameter in held.items():
            optimizer.state[parameter].update(of_name[name]["values"].get(name, {}))
