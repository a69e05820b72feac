"""A checkpoint's objects, brought back into those of a run, laid out as these are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_dist_conf.checkpoint.json_values import LEFT_OUT, from_json, tensors_in
from nemo_dist_conf.checkpoint.manifest import Manifest, anew
from nemo_dist_conf.checkpoint.objects import (
    BY_NAME,
    EXTRA_OF,
    KEPT,
    MODULE,
    OPTIMIZER,
    STATE,
    Models,
    own_name,
    path_of,
    places_of,
    prefix_of,
    shapes_of,
    shard_boxes,
    tensors_at,
)
from nemo_dist_conf.checkpoint.rank_state import (
    Piece,
    Stored,
    optimizer_pieces,
    set_group_settings,
    set_weights,
    weight_pieces,
    whole_piece,
)
from nemo_dist_conf.checkpoint.storage import FolderReader
from nemo_dist_conf.checkpoint.tensor_file import DTYPES
from nemo_dist_conf.errors import DataError, Problem
from nemo_dist_conf.runtime.model.shard_boxes import local_values
from nemo_dist_conf.runtime.rank_agreement import together

__all__ = ["Loading", "Saved", "SavedObjects", "compare"]


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of its objects.

    entries: of those that were the same on all ranks, by name. of_rank: names of the others; own: this rank's, None
    where ranks are not laid out as they were. has_stages: whether ranks held stages of a model.
    """

    folder: Path
    manifest: Manifest
    stored: Mapping[str, Stored]
    entries: Mapping[str, Any]
    of_rank: tuple[str, ...]
    own: Mapping[str, Any] | None
    has_stages: bool

    def entry(self, name: str) -> Any:
        """What was kept of an object. Raises DataError where nothing was, or not for this rank."""
        if name in self.entries:
            return self.entries[name]
        if name not in self.of_rank:
            known = ", ".join((*self.entries, *self.of_rank)) or "none"
            what = f"{self.folder} has no state of {name!r}"
            raise DataError(
                Problem(
                    what=what,
                    asked=f"objects={{{name!r}: ...}}",
                    allowed=known,
                    instead=f"load(folder, ...) without {name!r}",
                )
            )
        if self.own is None:
            ranks = f"{self.manifest.world_size} ranks"
            what = f"the state of {name!r} was another on each of the {ranks} that saved it"
            allowed = f"{ranks} on the same layout"
            if self.has_stages:
                allowed += "; any, once tensors have the names of model.named_parameters() and an optimizer its model"
            asked = f"checkpoint.resume={self.folder}"
            raise DataError(
                Problem(what=what, asked=asked, allowed=allowed, instead=f"load(folder, ...) without {name!r}")
            )
        return self.own[name]


_NOTHING = "nothing"


@dataclass
class _Target:
    """An object to be filled.

    like: its own state, where what is loaded has tensors; tensors: in it, by path, which tell how these have to lie.
    """

    name: str
    value: Any
    kind: str
    tree: Any
    is_own: bool
    like: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Loading:
    """The pieces that objects need of a checkpoint, and ``finish``, which hands over what was read into them."""

    def __init__(self, saved: Saved, names: Iterable[str], models: Models) -> None:
        """names: of ``models.objects``. Every rank calls it.

        Raises DataError on all of them, before any value is changed, for what does not fit.
        """
        self._saved, self._models = saved, models
        self._has_stages = models.has_stages or saved.has_stages
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._finish: list[Callable[[bool], None]] = []
        self._optimizers: list[tuple[_Target, Mapping[int, str]]] = []
        self.pieces: dict[str, Piece] = {}
        targets, known = together(
            lambda: [self._target(name) for name in names],
            lambda targets: [sorted(self._names(target)) for target in targets],
        )
        everywhere = [{name for of_rank in known for name in of_rank[i]} for i in range(len(targets))]

        def add() -> None:
            for target, names in zip(targets, everywhere, strict=True):
                self._add(target, names)

        together(add)

    def _target(self, name: str) -> _Target:
        entry, kind, value = self._saved.entry(name), self._models.kinds[name], self._models.objects[name]
        if value is None and entry["kind"] == STATE and entry["tree"] is None:
            return _Target(name, None, _NOTHING, None, name not in self._saved.entries)  # as on a rank without one
        if kind == STATE and not hasattr(value, "load_state_dict"):
            what = f"objects[{name!r}] is a {type(value).__name__}, which cannot be filled"
            allowed = "what has load_state_dict; what load returns has the values of all others"
            instead = f"load(folder, model, ...).objects[{name!r}]"
            raise DataError(
                Problem(
                    what=what, asked=f"objects={{{name!r}: a {type(value).__name__}}}", allowed=allowed, instead=instead
                )
            )
        if kind != entry["kind"]:
            was, here = KEPT[entry["kind"]], KEPT[kind]
            what = f"objects[{name!r}] was {was} when it was saved, and is {here}"
            asked = f"objects={{{name!r}: {type(value).__name__}}}"
            raise DataError(Problem(what=what, asked=asked, allowed=was, instead=f"load(folder, ...) without {name!r}"))
        target = _Target(name, value, kind, entry["tree"], name not in self._saved.entries)
        if kind == STATE and any(True for _ in tensors_in(target.tree)) and hasattr(value, "state_dict"):
            target.like = value.state_dict()
            target.tensors = dict(tensors_at(target.like, path_of(name), self._models))
        return target

    def _names(self, target: _Target) -> Iterator[str]:
        """Names of the tensors that this rank has of an object."""
        if target.kind == MODULE:
            return iter(self._models.states[prefix_of(target.name)])
        return iter(target.tensors)

    def _add(self, target: _Target, everywhere: set[str]) -> None:
        if target.kind == _NOTHING:
            return
        add = {MODULE: self._add_module, OPTIMIZER: self._add_optimizer, STATE: self._add_state}[target.kind]
        add(target, everywhere)

    def _stored_of(self, target: _Target) -> dict[str, Stored]:
        """Tensors of an object that the checkpoint has for this rank, by the names that they have here."""
        prefix = prefix_of(target.name)
        mine = {name: entry for name, entry in self._saved.stored.items() if name.startswith(prefix)}
        if not target.is_own:
            return mine
        mark = own_name("", self._rank)
        return {name.removesuffix(mark): entry for name, entry in mine.items() if name.endswith(mark)}

    def _take(self, target: _Target, pieces: Mapping[str, Piece]) -> None:
        for name, piece in pieces.items():
            if not target.is_own:
                self.pieces[name] = piece
                continue
            stored = self._saved.stored.get(own_name(name, self._rank))
            then, now = (0,) if stored is None else stored.shape, tuple(piece.values.shape)
            if then != now and (stored is not None or piece.values.numel()):
                path = name.partition("/")[2]
                what = f"{path} was the rank's own part {list(then)} when it was saved, here {list(now)}"
                asked, allowed = f"objects={{{target.name!r}: ...}}", "the layout that saved it"
                raise DataError(
                    Problem(
                        what=what, asked=asked, allowed=allowed, instead=f"load(folder, ...) without {target.name!r}"
                    )
                )
            if stored is not None:
                self.pieces[own_name(name, self._rank)] = whole_piece(piece.values)

    # ------------------------------------------------------------------------------------------------- modules

    def _add_module(self, target: _Target, everywhere: set[str]) -> None:
        prefix = prefix_of(target.name)
        mine = weight_pieces(self._models.states[prefix], prefix)
        here, held = mine, {f"{prefix}{name}" for name in everywhere}
        if target.is_own:
            here = {name: whole_piece(piece.values) for name, piece in mine.items() if piece.values.numel()}
            held = set(here)
        compare(self._saved.folder, self._stored_of(target), here, held, prefix, f"objects[{target.name!r}]")
        self._take(target, mine)
        self._finish.append(lambda settings: set_weights(target.value))

    # ---------------------------------------------------------------------------------------------- optimizers

    def _add_optimizer(self, target: _Target, everywhere: set[str]) -> None:
        optimizer, tree, name = target.value, target.tree, target.name
        kind = type(optimizer).__name__
        names = self._models.names_of(optimizer) if tree["by"] == BY_NAME else places_of(optimizer)
        asked, instead = f"objects={{{name!r}: {kind}}}", f"load(folder, ...) without {name!r}"
        if names is None:
            what = f"objects[{name!r}] was saved beside its model, and holds parameters of no model that is given now"
            instead = f"objects={{'its_model': model, {name!r}: ...}}"
            raise DataError(
                Problem(
                    what=what, asked=asked, allowed="its model among the objects, as when it was saved", instead=instead
                )
            )
        if tree["class"] != kind:
            what = f"objects[{name!r}] was {tree['class']} when it was saved, and is {kind}"
            raise DataError(Problem(what=what, asked=asked, allowed=tree["class"], instead=instead))
        if tree["by"] != BY_NAME and tree["shapes"] != shapes_of(optimizer):
            what = f"objects[{name!r}] has other parameters than when it was saved, where it stood without its model"
            allowed = "the same shapes in the same order; or its model among the objects, then and now"
            raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead=instead))
        self._optimizers.append((target, names))

    def make_states(self) -> None:
        """Make the state of optimizers that is to be filled; the last thing before anything is read."""

        def make() -> None:
            for target, names in self._optimizers:
                prefix, held = prefix_of(target.name), target.tree.get("state", {})
                stored = {name: Stored(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in held.items()}
                stored = stored if target.tree["by"] != BY_NAME else self._stored_of(target)
                self._take(target, optimizer_pieces(names, target.value, stored, prefix))

        together(make)

    # -------------------------------------------------------------------------------------------------- states

    def _add_state(self, target: _Target, everywhere: set[str]) -> None:
        if self._has_stages and not target.is_own:
            self._refuse_other_places(target)
        filled = {one["at"]: self._room(target, one, everywhere) for one in tensors_in(target.tree)}

        def finish(settings: bool) -> None:
            read = from_json(target.tree, lambda one: filled[one["at"]], target.like, self._models.rename)
            target.like = None
            target.value.load_state_dict(read)

        self._finish.append(finish)

    def _refuse_other_places(self, target: _Target) -> None:
        """A tensor's place in a list says which one it is only while no rank has some of the list alone."""
        then = _places(one["at"].partition("/")[2] for one in tensors_in(target.tree))
        for path, places in _places(target.tensors).items():
            if path in then and then[path] != places:
                what = f"{path} has {len(then[path])} tensors in {self._saved.folder} and {len(places)} here, by number"
                allowed = "the layout that saved it; or a dictionary with the names of model.named_parameters()"
                asked = f"objects={{{target.name!r}: ...}}"
                raise DataError(
                    Problem(
                        what=what, asked=asked, allowed=allowed, instead=f"load(folder, ...) without {target.name!r}"
                    )
                )

    def _room(self, target: _Target, reference: Mapping[str, Any], everywhere: set[str]) -> Any:
        """A tensor of the checkpoint to be filled, laid out as the object's own of that path."""
        name, dtype, shape = reference["at"], DTYPES[reference["dtype"]], tuple(reference["shape"])
        path = name.partition("/")[2]
        like = target.tensors.get(path)
        asked, instead = f"objects={{{target.name!r}: ...}}", f"load(folder, ...) without {target.name!r}"
        if like is None and path in everywhere and self._has_stages and not target.is_own:
            return LEFT_OUT  # another stage's
        is_split = target.is_own or any(self._models.is_split.values())
        tells = isinstance(like, DTensor) or (like is not None and not target.is_own)
        if not reference["whole"] and is_split and not tells:
            what = f"{path} was sharded when it was saved, and {target.name!r} has no such tensor that says how it lies"
            allowed = "an object that holds its copies of the model's parameters before it is loaded"
            raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead=instead))
        if not isinstance(like, DTensor):
            full = torch.empty(shape, dtype=dtype, device=like.device if like is not None else None)
            if full.numel():
                self._take(target, {name: whole_piece(full)})
            return full
        local = torch.empty_like(local_values(like), dtype=dtype)
        there = self._saved.stored.get(own_name(name, self._rank)) if target.is_own else Stored(dtype, shape)
        found = tuple(local.shape) if target.is_own else tuple(like.shape)
        if there is not None and there.shape != found:
            what = f"{path} is of the shape {list(there.shape)} in {self._saved.folder}, here {list(found)}"
            raise DataError(Problem(what=what, asked=asked, allowed=str(list(there.shape)), instead=instead))
        self._take(target, {name: Piece(local, shard_boxes(path, like, self._models), like.shape)})
        mesh, placements = like.device_mesh, like.placements
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    # ------------------------------------------------------------------------------------------------- finish

    def finish(self, settings: bool) -> None:
        """Hand over what was read. settings: see ``load``."""
        for target, names in self._optimizers:
            set_group_settings(names, target.value, from_json(target.tree["groups"]), only_values=not settings)
        for finish in self._finish:
            finish(settings)


def _places(paths: Any) -> dict[str, set[int]]:
    """Path of a list (or of a dictionary with numbers for keys) -> the numbers at which it has tensors."""
    found: dict[str, set[int]] = {}
    for path in paths:
        for number in re.finditer(r"\[(\d+)\]", path):
            found.setdefault(path[: number.start()], set()).add(int(number[1]))
    return found


class SavedObjects(Mapping[str, Any]):
    """The states that a checkpoint holds, by name; tensors are read when one is asked for, in full, on the CPU.

    A module's is its state dictionary; an optimizer's has ``state``, by the names of parameters, and ``param_groups``.
    """

    def __init__(self, saved: Saved, reader: FolderReader) -> None:
        self._saved, self._reader = saved, reader

    def __iter__(self) -> Iterator[str]:
        return (name for name in (*self._saved.entries, *(self._saved.own or {})) if not name.startswith(EXTRA_OF))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        if name not in self._saved.entries and name not in (self._saved.own or {}):
            raise KeyError(name)
        entry = self._saved.entry(name)
        is_own = name not in self._saved.entries
        rank = dist.get_rank() if dist.is_initialized() else 0
        mark = own_name("", rank) if is_own else ""

        def read(reference: Mapping[str, Any]) -> Tensor:
            if f"{reference['at']}{mark}" not in self._reader.index.tensors:
                return torch.empty(reference["shape"], dtype=DTYPES[reference["dtype"]])
            return self._reader.whole(f"{reference['at']}{mark}")

        if entry["kind"] == STATE:
            return from_json(entry["tree"], read)
        prefix = prefix_of(name)
        names = [full for full in self._saved.stored if full.startswith(prefix) and full.endswith(mark)]
        tensors = {full.removeprefix(prefix).removesuffix(mark): self._reader.whole(full) for full in names}
        if entry["kind"] == MODULE:
            return tensors
        state: dict[str, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            parameter, _, key = full.rpartition("/")
            state.setdefault(parameter, {})[key] = value
        return {"state": state, "param_groups": from_json(entry["tree"]["groups"])}


def compare(
    path: Path, stored: Mapping[str, Stored], mine: Mapping[str, Piece], held: set[str], prefix: str, model: str
) -> None:
    """Raise DataError where the tensors of a checkpoint are not those of a model.

    mine: of this rank; held: names of all ranks'. model: what it is called.
    """
    found = []
    plain = str.removeprefix
    missing = sorted(plain(name, prefix) for name in mine if name not in stored)
    extra = sorted(plain(name, prefix) for name in stored if name not in held)
    both = [(plain(name, prefix), stored[name], piece) for name, piece in mine.items() if name in stored]
    shapes = sorted(f"{n}: {list(s.shape)}, here {list(p.shape)}" for n, s, p in both if s.shape != tuple(p.shape))
    others = [(name, _word(entry.dtype), _word(piece.values.dtype)) for name, entry, piece in both]
    dtypes = sorted(f"{name}: {theirs}, here {mine}" for name, theirs, mine in others if theirs != mine)
    kinds = (("missing in it", missing), ("unknown to the model", extra), ("of other shape", shapes))
    for title, names in (*kinds, ("of another dtype", dtypes)):
        if names:
            found.append(f"{len(names)} {title} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})")
    if found:
        what = f"the tensors of {path} are not those of {model}: {'; '.join(found)}"
        allowed = "the model that saved it, with the same sizes and dtype"
        raise DataError(Problem(what=what, asked=f"checkpoint.resume={path}", allowed=allowed, instead=anew(path)))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
