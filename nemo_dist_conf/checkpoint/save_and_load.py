"""One checkpoint: everything that a run needs to go on, put into a folder and taken from it.

A checkpoint is written beside its place and renamed once it is complete, so that it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from nemo_dist_conf.checkpoint.adapter_export import adapter_fields
from nemo_dist_conf.checkpoint.buffers import make_buffers_equal
from nemo_dist_conf.checkpoint.json_values import from_json, random_state, set_random_state, to_json
from nemo_dist_conf.checkpoint.loading import Loading, Saved, SavedObjects, compare
from nemo_dist_conf.checkpoint.manifest import (
    CONFIG,
    STATE,
    Manifest,
    anew,
    damaged,
    find_checkpoint,
    read_json,
    read_manifest,
    write_file,
    write_manifest,
    wrong_bytes,
    wrong_sizes,
)
from nemo_dist_conf.checkpoint.objects import EXTRA_OF, Models, agree, hold, prefix_of
from nemo_dist_conf.checkpoint.rank_state import (
    MODEL,
    Piece,
    group_settings,
    optimizer_pieces,
    set_group_settings,
    set_weights,
    weight_pieces,
)
from nemo_dist_conf.checkpoint.storage import FolderReader, FolderWriter, Index, LoadPieces, SavePieces
from nemo_dist_conf.errors import ConfigError, DataError, Problem, TrainingError
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.rank_agreement import together
from nemo_dist_conf.runtime.torch_inside import no_word_of_one_process

__all__ = ["PARTIAL", "Restored", "Snapshot", "load", "save", "take_snapshot", "write_snapshot"]

log = logging.getLogger(__name__)

#: Begins the name of a folder that is being written; what a killed run left under it is never read.
PARTIAL = ".partial-"


_OTHERWISE = "save to another folder, or remove that one; Checkpoints(folder) names folders by their steps"


@dataclass(frozen=True)
class Restored:
    """What ``load`` found. config: the composed config of the run that saved, as data; nothing of it is called.

    objects: the states that were saved, by name.
    """

    folder: Path
    step: int
    run: str
    origin: str | None
    world_size: int
    config: DictConfig | None
    objects: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps, as this rank holds it.

    of_rank: texts that belong to this rank alone. summary: what the coordinator is told of this rank. optimizer: its
    class. objects: what state.json has of the others. model: the config of a model of transformers.
    adapter: the settings of an adapter in it.
    """

    step: int
    pieces: Mapping[str, Piece]
    of_rank: Mapping[str, str]
    summary: Mapping[str, Any]
    optimizer: str | None
    objects: Mapping[str, Any]
    groups: list[dict[str, Any]]
    config: str | None
    model: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int = 0,
    objects: Mapping[str, Any] | None = None,
    config: Any = None,
) -> Path:
    """Write one checkpoint into a folder that does not exist yet; every rank calls it. Returns the folder.

    model, optimizer: as ``instantiate`` returned them, under any strategy. objects: whatever else is to go on (a
    scheduler, a data loader), by name; each has state_dict and load_state_dict, or is a plain value.
    Raises TrainingError where it cannot be written; nothing is left behind then.
    """
    snapshot = take_snapshot(model, optimizer, step=step, objects=objects, config=config)
    write_snapshot(snapshot, Path(folder), run=uuid.uuid4().hex)
    return Path(folder)


def take_snapshot(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    step: int,
    objects: Mapping[str, Any] | None = None,
    config: Any = None,
    copies: dict[str, Tensor] | None = None,
) -> Snapshot:
    """The state as it is now; buffers that differ between ranks are made equal.

    copies: where to copy tensors to, on the CPU, so that training can go on; kept for the next time. None: the pieces
    share the memory of the model and the optimizer."""
    make_buffers_equal(model)
    models = Models(model, objects or {})
    held, marks = together(
        lambda: {name: hold(name, models) for name in models.objects},
        lambda held: {name: one.mark() for name, one in held.items()},
    )
    agreed = agree(held, marks)
    for name in agreed.entries:
        if prefix_of(name) in models.wrapped:
            make_buffers_equal(models.models[prefix_of(name)])
    own, _ = together(lambda: _own_pieces(models, optimizer))
    pieces, groups = {**own[0], **agreed.pieces}, own[1]
    if copies is not None:
        pieces = {name: _copied(piece, name, copies) for name, piece in pieces.items()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    of_rank = {"objects": json.dumps(agreed.own), "random": json.dumps(to_json(random_state(), "random"))}
    return Snapshot(
        step,
        pieces,
        of_rank,
        {"groups": groups if engine_of(model).stages(model) else []},
        type(optimizer).__name__ if optimizer is not None else None,
        {"objects": agreed.entries, "of_rank": list(agreed.own), "axes": models.axes()},
        groups,
        OmegaConf.to_yaml(_without_hydra(config)) if config is not None else None,
        _transformers_config(model),
        adapter_fields(model),
    )


def _own_pieces(models: Models, optimizer: Optimizer | None) -> tuple[dict[str, Piece], list[dict[str, Any]]]:
    """Pieces of the model and its optimizer, and the settings of the optimizer's groups."""
    pieces = weight_pieces(models.states[""])
    if models.foreign:
        name, allowed = models.foreign[0], "parameters, buffers, and get_extra_state for the rest"
        what = f"{name} stands in the model's state_dict() and is none of its parameters or buffers"
        raise ConfigError(
            Problem(what=what, asked=f"model.{name}", allowed=allowed, instead="get_extra_state and set_extra_state")
        )
    if optimizer is None:
        return pieces, []
    names = _names_of(optimizer, models)
    pieces.update(optimizer_pieces(names, optimizer))
    return pieces, to_json(group_settings(names, optimizer), "optimizer.param_groups")


def _names_of(optimizer: Optimizer, models: Models) -> Mapping[int, str]:
    names = models.names_of(optimizer)
    if names is None:
        kind = type(optimizer).__name__
        what = f"{kind} holds parameters that are neither of the model nor of a module among the objects"
        allowed = "an optimizer of the model's parameters; the module that the others belong to, as an object"
        raise ConfigError(
            Problem(what=what, asked=f"optimizer {kind}", allowed=allowed, instead="objects={'a name': the_module}")
        )
    return names


def _transformers_config(model: nn.Module) -> Mapping[str, Any] | None:
    """What an export needs to know of a model of transformers; None for any other."""
    config: Any = getattr(unwrapped(model), "config", None)
    return json.loads(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else None


def _copied(piece: Piece, name: str, copies: dict[str, Tensor]) -> Piece:
    held, values = copies.get(name), piece.values
    if held is None or held.shape != values.shape or held.dtype != values.dtype:
        held = copies[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    held.copy_(values, non_blocking=True)
    return Piece(held, piece.boxes, piece.shape)


def _without_hydra(config: Any) -> Any:
    if OmegaConf.is_config(config):
        return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return OmegaConf.create(config)


def write_snapshot(
    snapshot: Snapshot,
    folder: Path,
    *,
    run: str,
    origin: str | None = None,
    layout: str = "",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a snapshot to ``folder``, which must not exist; every rank calls it. See ``save``."""
    is_alone = not dist.is_initialized() or dist.get_world_size() == 1
    rank = 0 if is_alone else dist.get_rank()
    aside: list[Any] = [None if folder.exists() else folder.parent / f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}"]
    if not is_alone:
        dist.broadcast_object_list(aside, src=0, group=group)
    if aside[0] is None:
        raise TrainingError(f"{folder} exists already; it was left as it is\n  {_OTHERWISE}")
    partial = aside[0]
    world_size = 1 if is_alone else dist.get_world_size()

    def complete(files: dict[str, tuple[int, str]], summaries: list[Any]) -> None:
        state = {
            "step": snapshot.step,
            "optimizer": snapshot.optimizer,
            "groups": [group for one in summaries for group in one["groups"]] or snapshot.groups,
            **snapshot.objects,
            "model": snapshot.model,
            "adapter": snapshot.adapter,
        }
        files[STATE] = write_file(partial / STATE, json.dumps(state).encode())
        if snapshot.config is not None:
            files[CONFIG] = write_file(partial / CONFIG, snapshot.config.encode())
        more = {"torch": str(torch.__version__)}
        write_manifest(
            partial,
            step=snapshot.step,
            run=run,
            origin=origin,
            world_size=world_size,
            layout=layout,
            files=files,
            more=more,
        )
        _sync_folder(partial)
        finding = wrong_sizes(read_manifest(partial))  # as this node sees what all nodes wrote
        if finding:
            raise OSError(finding)
        if folder.exists():
            raise FileExistsError(f"{folder} exists by now; it was left as it is")
        os.rename(partial, folder)
        _sync_folder(folder.parent)

    writer = FolderWriter(partial, rank, snapshot.of_rank, snapshot.summary, complete)
    try:
        with _told_in_full(f"the checkpoint {folder} could not be written", folder.parent):
            dcp.save(
                dict(snapshot.pieces),
                storage_writer=writer,
                planner=SavePieces(),
                process_group=group,
                no_dist=not dist.is_initialized(),
            )
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told_in_full(what: str, root: Path) -> Iterator[None]:
    """What failed on some rank, raised on all of them, in words."""
    try:
        with contextlib.ExitStack() as stack:
            if not dist.is_initialized():  # one process is meant
                stack.enter_context(warnings.catch_warnings())
                no_word_of_one_process()
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, ConfigError):
            raise cause from None
        raise TrainingError(_reason(what, cause, rank, root)) from cause
    except OSError as error:
        raise TrainingError(_reason(what, error, 0, root)) from error


def _reason(what: str, cause: BaseException, rank: int, root: Path) -> str:
    newest = find_checkpoint(root)
    kept = f"\n  kept    {newest}" if newest else ""
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"{what}: {reason} (rank {rank}){kept}"


# ------------------------------------------------------------------------------------------------------------- load


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    objects: Mapping[str, Any] | None = None,
    settings: bool = True,
) -> Restored:
    """Fill a model, its optimizer and other objects from a checkpoint of any layout; every rank calls it.

    folder: of a checkpoint, or of several, of which the newest is taken. Random states are restored where as many
    ranks load as saved. An object that was another on each rank can be loaded by as many ranks only.
    settings: also give the optimizer's groups the learning rate and whatever else they had. False: they keep theirs.
    Raises DataError, on all ranks and before any value was changed, where the checkpoint is damaged or not of this
    model and optimizer.
    """
    path = find_checkpoint(folder)
    if path is None:
        asked = f"checkpoint.resume={folder}"
        what = f"{folder} holds no checkpoint"
        raise DataError(
            Problem(
                what=what,
                asked=asked,
                allowed="a folder of a checkpoint or of several",
                instead="checkpoint.resume=null",
            )
        )
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    (manifest, index, state, config), _ = together(lambda: _opened(path), lambda opened: opened[0].files)
    together(lambda: _refuse(path, wrong_bytes(manifest, sorted(manifest.files)[rank::world_size])))
    models = Models(model, objects or {})
    reader = FolderReader(manifest, index)
    mine = _of_rank(reader, manifest, rank) if manifest.world_size == world_size else None
    own = json.loads(mine["objects"]) if mine is not None and state["axes"] == models.axes() else None
    of_rank = tuple(state["of_rank"])
    saved = Saved(path, manifest, index.stored, state["objects"], of_rank, own, state["axes"]["pp"] > 1)
    loading = Loading(saved, [name for name in models.objects if not _is_new(name, saved)], models)
    pieces = _wanted(path, index, state, models, optimizer)
    loading.make_states()
    failed = f"the checkpoint {path} could not be read"
    with _told_in_full(failed, path.parent), torch.no_grad():
        dcp.load(
            {**pieces, **loading.pieces},
            storage_reader=reader,
            planner=LoadPieces(),
            no_dist=not dist.is_initialized(),
        )
    set_weights(model)
    if optimizer is not None:
        names = _names_of(optimizer, models)
        set_group_settings(names, optimizer, from_json(state["groups"]), only_values=not settings)
    loading.finish(settings)
    if mine is not None:
        set_random_state(from_json(json.loads(mine["random"])))
    elif rank == 0:
        log.info("saved by %d, loaded by %d ranks: random states go on as they are", manifest.world_size, world_size)
    states = SavedObjects(saved, reader)
    return Restored(path, manifest.step, manifest.run, manifest.origin, manifest.world_size, config, states)


def _of_rank(reader: FolderReader, manifest: Manifest, rank: int) -> Mapping[str, str]:
    return reader.file(f"rank_{rank:05}.safetensors").metadata


def _is_new(name: str, saved: Saved) -> bool:
    """What modules keep by themselves, of which the checkpoint has nothing."""
    return name.startswith(EXTRA_OF) and name not in saved.entries and name not in saved.of_rank


def _opened(path: Path) -> tuple[Manifest, Index, dict[str, Any], DictConfig | None]:
    manifest = read_manifest(path)
    _refuse(path, wrong_sizes(manifest))
    config = None
    if CONFIG in manifest.files:
        try:
            found = OmegaConf.load(path / CONFIG)  # text only: a tag that would build an object is refused
        except Exception as error:  # PyYAML's own kinds among them
            raise damaged(path, f"{CONFIG} cannot be read ({type(error).__name__})") from None
        if not isinstance(found, DictConfig):
            raise damaged(path, f"{CONFIG} is not a config")
        config = found
    return manifest, Index.read(manifest), read_json(path, STATE), config


def _refuse(path: Path, finding: str) -> None:
    if finding:
        raise damaged(path, finding)


def _wanted(
    path: Path, index: Index, state: Mapping[str, Any], models: Models, optimizer: Optimizer | None
) -> dict[str, Piece]:
    """The pieces to fill, all of which the checkpoint has as they are; raises DataError on all ranks otherwise."""
    stored, weights = index.stored, weight_pieces(models.states[""])
    names = set(weights)
    if engine_of(models.main).stages(models.main):  # this rank holds some stages only
        names = {name for held in together(lambda: sorted(weights), tuple)[1] for name in held}

    def fits() -> dict[str, Piece]:
        saved_weights = {name: entry for name, entry in stored.items() if name.startswith(MODEL)}
        compare(path, saved_weights, weights, names, MODEL, "this model")
        if optimizer is None:
            return weights
        kind = type(optimizer).__name__
        if state["optimizer"] != kind:
            saved = state["optimizer"] or "no optimizer"
            what = f"{path} holds the state of {saved}, not of {kind}"
            allowed = "the optimizer that saved it, or the weights alone (model.name_or_path of an exported folder)"
            raise DataError(Problem(what=what, asked=f"checkpoint.resume={path}", allowed=allowed, instead=anew(path)))
        return {**weights, **optimizer_pieces(_names_of(optimizer, models), optimizer, stored)}

    pieces, _ = together(fits)
    return pieces
