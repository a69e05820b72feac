"""What goes on with a run besides its model and optimizer: further ones, averaged weights, schedulers, data loaders.

A module and an optimizer are kept as the run's own are. Of anything else with a ``state_dict`` the tensors lie in the
checkpoint's files by the path at which they stand, sharded ones in parts, and the rest is JSON. What is the same on all
ranks is written once. What only some ranks hold, as under pipelines, is put together by its names. What differs is a
rank's own, and comes back to ranks that are laid out alike only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nemo_dist_conf.checkpoint.json_values import merged, refuse_tensor, renamed_keys, step_to, to_json
from nemo_dist_conf.checkpoint.rank_state import (
    EXTRA,
    Piece,
    group_settings,
    optimizer_pieces,
    parameter_names,
    state_of,
    weight_pieces,
    whole_piece,
)
from nemo_dist_conf.checkpoint.tensor_file import DTYPES, bytes_of
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.model.shard_boxes import Placed, boxes_of, local_values
from nemo_dist_conf.runtime.own_names import raw_names
from nemo_dist_conf.runtime.torch_inside import chunks_told, local_tensor, root_mesh

__all__ = [
    "Agreed",
    "BY_NAME",
    "BY_PLACE",
    "EXTRA_OF",
    "Held",
    "KEPT",
    "MODULE",
    "Models",
    "OPTIMIZER",
    "STATE",
    "agree",
    "hold",
    "own_name",
    "path_of",
    "places_of",
    "prefix_of",
    "shapes_of",
    "shard_boxes",
    "tensors_at",
]

MODULE, OPTIMIZER, STATE = "module", "optimizer", "state"
#: Words for the kinds.
KEPT = {MODULE: "a module", OPTIMIZER: "an optimizer", STATE: "an object with a state"}
#: How the parameters of an optimizer are called: as in their model, or by their place among the groups.
BY_NAME, BY_PLACE = "name", "place"

_ROOT = "objects/"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


#: Axes of a mesh along which ranks read the same rows.
_SHARING = (MeshAxisName.PP.value, MeshAxisName.CP.value, MeshAxisName.TP.value)


class Models:
    """The models that are saved or loaded together, and objects beside them: names, kinds, how they lie."""

    def __init__(self, model: nn.Module, objects: Mapping[str, Any]) -> None:
        """Every rank makes one."""
        self.main = model
        modules = {name: value for name, value in objects.items() if isinstance(value, nn.Module)}
        own, found = state_of(model), {name: state_of(module) for name, module in modules.items()}
        #: Names in the model's state dictionary that nothing could fill.
        self.foreign = own.foreign
        # A module whose state is something else than its parameters and buffers is kept as any other object.
        fillable = {name: module for name, module in modules.items() if not found[name].foreign}
        self.kinds = {name: _kind_of(value, name in fillable) for name, value in objects.items()}
        #: Prefix of a model's names -> its tensors.
        self.states = {"": own.tensors, **{prefix_of(name): found[name].tensors for name in fillable}}
        self.models = {"": model, **{prefix_of(name): module for name, module in fillable.items()}}
        self.names = parameter_names(self.states)
        self.is_split = {prefix: _is_split(one, self.states[prefix]) for prefix, one in self.models.items()}
        self.has_stages = any(engine_of(one).stages(one) for one in self.models.values())
        #: Prefixes of models whose tensors a strategy keeps alike on the ranks that hold them, and ids of those.
        self.wrapped = [p for p, one in self.models.items() if self.is_split[p] or unwrapped(one) is not one]
        self.alike = {id(value) for prefix in self.wrapped for value in self.states[prefix].values()}
        #: Names of parameters that stages on different ranks hold.
        self.on_several_stages = frozenset(engine_of(model).on_several_stages(model))
        self.objects = {**objects, **self._extras()}
        self.kinds |= dict.fromkeys(set(self.objects) - set(objects), STATE)

    def _extras(self) -> dict[str, Any]:
        """What modules of these models keep by ``get_extra_state``, as objects of their own."""
        titles = {"": "the model", **{prefix_of(name): repr(name) for name in self.kinds}}
        found = {f"{EXTRA_OF}{titles[prefix]}": _Extra(one) for prefix, one in self.models.items()}
        return {name: extra for name, extra in found.items() if extra.has_any()}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Names under wrappers -> in the user's model."""
        canonical = {name for state in self.states.values() for name in state}
        found = {raw: name for one in self.models.values() for raw, name in raw_names(one).items()}
        return {raw: name for raw, name in found.items() if raw not in canonical}

    def axes(self) -> dict[str, int]:
        """Sizes of the axes whose ranks share data: what decides which part of the data a rank reads."""
        meshes = [v.device_mesh for state in self.states.values() for v in state.values() if isinstance(v, DTensor)]
        stage_mesh = engine_of(self.main).stage_mesh(self.main)
        meshes += [stage_mesh] if stage_mesh is not None else []
        found = dict.fromkeys(_SHARING, 1)
        for root in {id(root): root for root in map(root_mesh, meshes)}.values():
            for axis, size in zip(root.mesh_dim_names or (), root.shape):
                if axis in found:
                    found[axis] = max(found[axis], size)
        return found

    def rename(self, key: Any) -> Any:
        """A key of a dictionary as it is kept: a parameter's by its name in the user's model."""
        return self.aliases.get(key, key) if isinstance(key, str) else key

    def names_of(self, optimizer: Optimizer) -> dict[int, str] | None:
        """Names of an optimizer's parameters; None where some are of no model here."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return self.names if all(id(parameter) in self.names for parameter in held) else None

    def like(self, path_end: str, value: DTensor) -> DTensor | None:
        """The parameter that a tensor is a copy of, by its name."""
        for state in self.states.values():
            found = state.get(path_end)
            if isinstance(found, DTensor) and found.shape == value.shape and found.device_mesh == value.device_mesh:
                return found
        return None


def _is_split(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    return bool(engine_of(model).stages(model)) or any(isinstance(value, DTensor) for value in state.values())


#: Begins the name of what modules keep by ``get_extra_state``.
EXTRA_OF = "extra state of "


class _Extra:
    """What modules of a model give by ``get_extra_state``, as an object with a state; by the names of torch."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = engine_of(model).parts(model)

    def _held(self) -> Iterator[tuple[str, nn.Module]]:
        for part in self.parts:
            for path, module in part.named_modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    yield f"{path}.{EXTRA}".lstrip("."), module

    def state_dict(self) -> dict[str, Any]:
        return {name: module.get_extra_state() for name, module in self._held()}

    def has_any(self) -> bool:
        return next(self._held(), None) is not None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, module in self._held():
            if name in state:
                module.set_extra_state(state[name])


@dataclass
class Held:
    """An object as this rank holds it.

    tree: as JSON, a tensor by the name of its piece. marks: of each piece, and of the rest, what is the same on two
    ranks that hold the same.
    """

    kind: str
    tree: Any
    pieces: dict[str, Piece] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)

    def mark(self) -> str:
        return _digest([self.kind, self.tree, self.marks])


def _kind_of(value: Any, is_fillable: bool) -> str:
    return MODULE if is_fillable else OPTIMIZER if isinstance(value, Optimizer) else STATE


def prefix_of(name: str) -> str:
    """Begins the names of an object's tensors; of no two objects does one begin the other."""
    return f"{_ROOT}{path_of(name)}."


def path_of(name: str) -> str:
    """An object's name as the beginning of the paths in it."""
    return name if name.isidentifier() else f"[{name!r}]"


def own_name(name: str, rank: int) -> str:
    """The name under which a rank's own tensor is kept."""
    return f"{name}@{rank:05}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ hold


def hold(name: str, models: Models) -> Held:
    """What this rank holds of an object. Raises ConfigError, naming it, for what cannot be kept."""
    kind, value = models.kinds[name], models.objects[name]
    if kind == MODULE:
        return _module(name, models)
    return _optimizer(name, value, models) if kind == OPTIMIZER else _state(name, value, models)


def _module(name: str, models: Models) -> Held:
    prefix = prefix_of(name)
    state = models.states[prefix]
    held = Held(MODULE, None, weight_pieces(state, prefix))
    held.marks = {f"{prefix}{key}": _mark(value, models) for key, value in state.items() if value.numel()}
    return held


def _optimizer(name: str, optimizer: Optimizer, models: Models) -> Held:
    prefix = prefix_of(name)
    names, by = models.names_of(optimizer), BY_NAME
    if names is None:
        names, by = places_of(optimizer), BY_PLACE
    groups = to_json(group_settings(names, optimizer), f"{name}.param_groups")
    tree = {"class": type(optimizer).__name__, "by": by, "groups": groups}
    held = Held(OPTIMIZER, tree, optimizer_pieces(names, optimizer, prefix=prefix))
    if by == BY_PLACE:
        tree["shapes"] = shapes_of(optimizer)
        tree["state"] = {name: [_NAMES[p.values.dtype], list(p.shape)] for name, p in held.pieces.items()}
    of_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for full in held.pieces:
        parameter_name, _, key = full.removeprefix(prefix).rpartition("/")
        parameter = of_name[parameter_name]
        alike = isinstance(parameter, DTensor) or id(parameter) in models.alike
        value = optimizer.state[parameter][key]
        held.marks[full] = _mark(value, models, alike) + (_mark(parameter, models) if alike else "")
    return held


def places_of(optimizer: Optimizer) -> dict[int, str]:
    """id of a parameter -> its place among the groups."""
    return {id(p): f"{i}.{j}" for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}


def shapes_of(optimizer: Optimizer) -> list[list[list[int]]]:
    """Shapes of the parameters of each group, in full."""
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _state(name: str, value: Any, models: Models) -> Held:
    held = Held(STATE, None)
    state = value.state_dict() if hasattr(value, "state_dict") else value

    def keep(tensor: Tensor, path: str) -> dict[str, Any]:
        refuse_tensor(tensor, path)
        full = f"{_ROOT}{path}"
        if tensor.numel():
            boxes = shard_boxes(path, tensor, models) if isinstance(tensor, DTensor) else boxes_of(tensor)
            held.pieces[full] = Piece(local_values(tensor), boxes, tensor.shape)
            held.marks[full] = _mark(tensor, models, lies_twice=_last_key(path) in models.on_several_stages)
        is_whole = not isinstance(tensor, DTensor)
        return {"at": full, "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "whole": is_whole}

    try:
        held.tree = to_json(state, path_of(name), keep, models.rename)
    except RecursionError:
        what = f"{path_of(name)} holds itself, or values in values in values without end"
        allowed = "values in values as deep as Python follows them, and none in itself"
        raise ConfigError(
            Problem(what=what, asked=f"objects[{name!r}]", allowed=allowed, instead=f"objects without {name!r}")
        ) from None
    return held


def _mark(value: Tensor, models: Models, alike: bool = False, lies_twice: bool = False) -> str:
    """What two ranks compare of a tensor: where it lies, if it is sharded; what it holds, if nothing keeps it alike.

    lies_twice: stages on different ranks each have all of it.
    """
    facts: list[Any] = [str(value.dtype), list(value.shape)]
    if isinstance(value, DTensor):
        mesh = value.device_mesh.mesh
        mesh = mesh - mesh.min() if lies_twice else mesh
        facts += [list(mesh.shape), hashlib.sha256(bytes_of(mesh)).hexdigest(), str(value.placements)]
    elif not alike and id(value) not in models.alike and dist.is_initialized() and dist.get_world_size() > 1:
        facts.append(hashlib.sha256(bytes_of(value)).hexdigest())
    return _digest(facts)


def shard_boxes(path: str, value: DTensor, models: Models) -> Sequence[Placed]:
    """The parts of a sharded tensor that this rank holds; where a library cut parameters in its way, by its name.

    Raises ConfigError where it cannot be told.
    """
    if chunks_told(value) is not None:
        return boxes_of(value)
    beside = [v for state in models.states.values() for v in state.values() if isinstance(v, DTensor)]
    beside = [v for v in beside if v.device_mesh == value.device_mesh]
    if not any(chunks_told(v) is not None for v in beside):
        boxes = boxes_of(value)
        if tuple(map(sum, zip(boxes[-1].here.offsets, boxes[-1].here.sizes))) == tuple(local_tensor(value).shape):
            return boxes
    else:
        found = models.like(_last_key(path), value)
        if found is not None and local_tensor(found).shape == local_tensor(value).shape:
            return boxes_of(found)
    what = f"{path} is a DTensor that was cut in a way which it does not tell"
    allowed = "copies of a model's parameters in a dictionary, under the names of model.named_parameters()"
    instead = "{name: p.detach().clone() for name, p in model.named_parameters()}"
    raise ConfigError(Problem(what=what, asked=path, allowed=allowed, instead=instead))


def _last_key(path: str) -> str:
    """The key at the end of a path: ``a.b`` of ``ema['a.b']``."""
    if path.endswith("']") and "['" in path:
        return path[path.rindex("['") + 2 : -2]
    return path.rpartition(".")[2]


def tensors_at(value: Any, path: str, models: Models) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state, by the paths that they are kept under; anything else in it is passed over."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        renamed = renamed_keys(value, models.rename)
        for key, item in value.items():
            yield from tensors_at(item, path + step_to(renamed[key]), models)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_at(item, f"{path}[{index}]", models)


# ----------------------------------------------------------------------------------------------------------- agree


@dataclass
class Agreed:
    """Objects of all ranks. entries: name -> what state.json keeps; own: of them, this rank's own. pieces: to write."""

    entries: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)


def agree(held: Mapping[str, Held], marks: list[Mapping[str, str]]) -> Agreed:
    """What is written once, what is put together, and what stays a rank's own. Every rank calls it.

    marks: ``Held.mark`` of each object, by name, of every rank. Raises ConfigError where ranks have other objects.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    names = Counter(name for one in marks for name in one)
    absent = sorted(name for name, count in names.items() if count < len(marks))
    if absent:
        without = next(rank for rank, one in enumerate(marks) if absent[0] not in one)
        what = f"objects of a checkpoint are the same on all ranks, and rank {without} has no {absent[0]!r}"
        raise ConfigError(
            Problem(
                what=what,
                asked=f"objects={{{absent[0]!r}: ...}}",
                allowed="the same names on all ranks",
                instead="objects={}",
            )
        )
    differing = [name for name in held if any(one[name] != marks[0][name] for one in marks)]
    found: list[dict[str, Held]] = []
    if differing:
        mine = {name: Held(held[name].kind, held[name].tree, {}, held[name].marks) for name in differing}
        found = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    agreed = Agreed()
    for name, one in held.items():
        tree = one.tree if name not in differing else _together([of_rank[name] for of_rank in found])
        if tree is not _OWN:
            agreed.entries[name] = {"kind": one.kind, "tree": tree}
            agreed.pieces.update(one.pieces)
            continue
        agreed.own[name] = {"kind": one.kind, "tree": one.tree}
        for full, piece in one.pieces.items():
            if piece.values.numel():
                agreed.pieces[own_name(full, rank)] = whole_piece(piece.values)
    return agreed


_OWN: Any = object()


def _together(held: list[Held]) -> Any:
    """One tree of all ranks' trees; ``_OWN`` where there is none."""
    for full in {full for one in held for full in one.marks}:
        if len({one.marks[full] for one in held if full in one.marks}) > 1:
            return _OWN
    first = held[0]
    if any(one.kind != first.kind for one in held):
        return _OWN
    if first.kind == OPTIMIZER:
        if any(one.tree["by"] != BY_NAME for one in held):
            # Of parameters of which a rank has nothing it may have no state either (megatron-fsdp).
            state = {name: kept for one in held for name, kept in one.tree["state"].items()}
            trees = [{**one.tree, "state": {**state, **one.tree["state"]}} for one in held]
            return trees[0] if all(tree == trees[0] for tree in trees) else _OWN
        groups = [group for one in held for group in one.tree["groups"]]
        settings: dict[str, list[Any]] = {}
        for group in groups:
            for name in group["params"]:
                rest = {**group, "params": [], "values": group["values"].get(name)}
                settings.setdefault(name, []).append(rest)
        is_one = all(rest == found[0] for found in settings.values() for rest in found)
        return {**first.tree, "groups": groups} if is_one else _OWN
    try:
        return merged([one.tree for one in held])
    except ValueError:
        return _OWN
