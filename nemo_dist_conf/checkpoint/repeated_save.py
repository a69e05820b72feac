"""The same step of the same run saved once more: whether the checkpoint that is there holds the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_dist_conf.checkpoint.manifest import STATE, damaged, read_json, read_manifest, wrong_bytes, wrong_sizes
from nemo_dist_conf.checkpoint.rank_state import Piece
from nemo_dist_conf.checkpoint.save_and_load import Snapshot
from nemo_dist_conf.checkpoint.storage import FolderReader, Index
from nemo_dist_conf.errors import DataError
from nemo_dist_conf.runtime.rank_agreement import together

__all__ = ["difference", "run_of"]


def run_of(folder: Path) -> str | None:
    """The id of the run that saved a checkpoint; None for one that is damaged."""
    try:
        return read_manifest(folder).run
    except DataError:
        return None


def difference(folder: Path, snapshot: Snapshot) -> str:
    """What a checkpoint holds otherwise than a snapshot, in words; "" where nothing, random states left aside.

    Every rank calls it, and all of them get the same answer. Raises DataError where the checkpoint is damaged.
    """
    found = together(lambda: _of_rank(folder, snapshot), lambda found: found)[1]
    different = next((words for words, _ in found if words), "")
    if different:
        return different
    there = set(Index.read(read_manifest(folder)).tensors)
    missing = sorted(there.symmetric_difference(name for _, names in found for name in names))
    return f"{missing[0]} is in one of them only" if missing else ""


def _of_rank(folder: Path, snapshot: Snapshot) -> tuple[str, tuple[str, ...]]:
    """(what differs on this rank, names of its tensors)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    manifest = read_manifest(folder)
    finding = wrong_sizes(manifest) or wrong_bytes(manifest, sorted(manifest.files)[rank::world_size])
    if finding:
        raise damaged(folder, finding)
    state = read_json(folder, STATE)
    reader = FolderReader(manifest, Index.read(manifest))
    own = "{}"
    if state["of_rank"] and manifest.world_size == world_size:
        own = reader.file(f"rank_{rank:05}.safetensors").metadata["objects"]
    theirs = (state["optimizer"], state["objects"], state["of_rank"], json.loads(own))
    mine = (snapshot.optimizer, *(snapshot.objects[key] for key in ("objects", "of_rank")))
    if json.dumps(theirs) != json.dumps((*mine, json.loads(snapshot.of_rank["objects"]))):
        return "other objects, or other values in them", ()
    if not _same_groups(state["groups"], snapshot.groups):
        return "other settings of the optimizer", ()
    names = tuple(name for name, piece in snapshot.pieces.items() if piece.boxes)
    other = next((name for name in names if _differs(reader, name, snapshot.pieces[name])), None)
    return f"other values of {other}" if other else "", names


def _same_groups(theirs: list[Any], mine: list[Any]) -> bool:
    """A stage of a pipeline has the groups of its own parameters."""
    of_name = {name: group for group in theirs for name in group["params"]}
    for group in mine:
        for name in group["params"]:
            other = of_name.get(name)
            if other is None or other["values"].get(name) != group["values"].get(name):
                return False
            if any(other.get(key) != value for key, value in group.items() if key not in ("params", "values")):
                return False
    return True


def _differs(reader: FolderReader, name: str, piece: Piece) -> bool:
    entry = reader.index.stored.get(name)
    if entry is None or entry.shape != tuple(piece.shape) or entry.dtype != piece.values.dtype:
        return True
    for place, box in reader.index.parts(name):
        for one in piece.boxes:
            both = one.box.shared(box)
            if both is not None:
                mine, theirs = both
                values = one.here.of(piece.values.detach())
                if not torch.equal(mine.of(values).cpu(), theirs.of(reader.read(*place))):
                    return True
    return False
