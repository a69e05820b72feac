"""Which part of a whole tensor this rank holds, whatever cut it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.torch_inside import chunks_told, local_tensor

__all__ = ["Box", "box_of", "local_part", "local_values"]


@dataclass(frozen=True)
class Box:
    """A part of a whole tensor: where it begins along each dimension, and how far it reaches."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return math.prod(self.sizes) == 0

    def shared(self, other: Box) -> tuple[Box, Box] | None:
        """What two boxes of one tensor have in common, as it lies in each of them; None where that is nothing."""
        begins = [max(a, b) for a, b in zip(self.offsets, other.offsets)]
        ends = [min(a + s, b + t) for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes)]
        if any(begin >= end for begin, end in zip(begins, ends)):
            return None
        sizes = tuple(end - begin for begin, end in zip(begins, ends))
        mine, theirs = (tuple(b - o for b, o in zip(begins, box.offsets)) for box in (self, other))
        return Box(mine, sizes), Box(theirs, sizes)

    def of(self, full: Tensor) -> Tensor:
        """This part of a whole tensor, a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes)):
            full = full.narrow(dim, offset if size else 0, size)
        return full


def box_of(tensor: Tensor) -> Box:
    """The part that this rank holds; of a plain tensor, all of it.

    Cut as it was sharded. A dimension that fully_shard cut again after tensor parallelism, which its placement tells,
    is cut from the mesh's last axis on, any other from the first: torch's own answer for the former is another part
    where sizes do not divide (torch 2.13). A tensor that was cut in another way says so itself
    (torch/distributed/_checkpointable.py).
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    told = chunks_told(tensor)
    if told is not None:
        (chunk,) = told()
        return Box(tuple(chunk.offsets), tuple(chunk.sizes))
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    mesh = tensor.device_mesh
    placements: list[Any] = list(tensor.placements)
    cut_again = {placement.dim for placement in placements if hasattr(placement, "split_factor")}
    order = [i for i, p in enumerate(placements) if not p.is_replicate() and p.dim not in cut_again]
    order += [i for i, p in reversed(list(enumerate(placements))) if not p.is_replicate() and p.dim in cut_again]
    for index in order:
        placement = placements[index]
        whole = sizes[placement.dim]
        piece = -(-whole // mesh.size(index))
        begin = min(mesh.get_local_rank(index) * piece, whole)
        offsets[placement.dim] += begin
        sizes[placement.dim] = min(piece, whole - begin)
    return Box(tuple(offsets), tuple(sizes))


def local_part(full: Tensor, target: Tensor) -> Tensor:
    """The part of a whole tensor that ``target`` holds on this rank; all have the same values, so none is sent."""
    return box_of(target).of(full)


def local_values(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient history; it shares the tensor's memory."""
    local = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    return torch.Tensor.detach(local)
