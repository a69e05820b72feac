"""Which part of a whole tensor this rank holds, whatever cut it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.torch_inside import chunks_told, local_tensor

__all__ = ["Box", "Placed", "boxes_of", "cut_boxes", "joined", "local_part", "local_values"]


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


@dataclass(frozen=True)
class Placed:
    """A box of a whole tensor that this rank holds, and where it lies in what the rank holds."""

    box: Box
    here: Box


def boxes_of(tensor: Tensor) -> tuple[Placed, ...]:
    """What this rank holds, in the order in which it lies in the rank's own tensor; of a plain tensor, all of it.

    One box, but for weights in which several are packed: of each of those a rank has its part. None is empty, unless
    the rank has nothing at all. A tensor that a library cut in its own way says how
    (torch/distributed/_checkpointable.py).
    """
    if not isinstance(tensor, DTensor):
        return _placed([[(0, size)] for size in tensor.shape])
    told = chunks_told(tensor)
    if told is not None:
        (chunk,) = told()
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        return (Placed(box, Box((0,) * len(box.sizes), box.sizes)),)
    return cut_boxes(tensor.shape, tensor.device_mesh, tensor.placements)


def cut_boxes(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]) -> tuple[Placed, ...]:
    """``boxes_of`` a tensor of this shape that is laid out so over a mesh.

    Cut as it was sharded. A dimension that fully_shard cut again after tensor parallelism, which its placement tells by
    a split factor, is cut from the mesh's last axis on, any other from the first: torch's own answer for the former is
    another part where sizes do not divide (torch 2.13). Of the axis that cut a dimension first, a split factor says how
    many weights of one size are packed along it.
    """
    spans = [[(0, size)] for size in shape]
    cuts = [(index, p.dim % len(shape), p) for index, p in enumerate(placements) if not p.is_replicate()]
    marked = {dim for _, dim, placement in cuts if hasattr(placement, "split_factor")}
    in_order = [cut for cut in cuts if cut[1] not in marked] + [cut for cut in reversed(cuts) if cut[1] in marked]
    seen: set[int] = set()
    for index, dim, placement in in_order:
        packed = getattr(placement, "split_factor", 1) if dim not in seen else 1
        seen.add(dim)
        weights = [_chunk(spans[dim], packed, number) for number in range(packed)]
        spans[dim] = [span for one in weights for span in _chunk(one, mesh.size(index), mesh.get_local_rank(index))]
    return _placed(spans)


def _chunk(spans: list[tuple[int, int]], count: int, number: int) -> list[tuple[int, int]]:
    """The part ``number`` of ``count`` of spans (begin, size) in a row, as torch.chunk cuts."""
    whole = sum(size for _, size in spans)
    piece, at, found = -(-whole // count), 0, []
    low, high = number * piece, (number + 1) * piece
    for begin, size in spans:
        first, last = max(low, at), min(high, at + size)
        if first < last:
            found.append((begin + first - at, last - first))
        at += size
    return found or [(sum(spans[-1]), 0)]


def _placed(spans: list[list[tuple[int, int]]]) -> tuple[Placed, ...]:
    """The boxes that spans (begin, size) of each dimension make, and where they lie when those are put in a row."""
    of_dims = []
    for found in spans:
        filled = [span for span in found if span[1]] or found[:1]
        ends = itertools.accumulate(size for _, size in filled)
        of_dims.append([(begin, end - size, size) for (begin, size), end in zip(filled, ends)])
    boxes = []
    for chosen in itertools.product(*of_dims):
        begins, at, sizes = (tuple(one[i] for one in chosen) for i in range(3))
        boxes.append(Placed(Box(begins, sizes), Box(at, sizes)))
    return tuple(boxes)


def local_part(full: Tensor, target: Tensor) -> Tensor:
    """The part of a whole tensor that ``target`` holds on this rank; all have the same values, so none is sent.

    A view, unless it is several boxes.
    """
    return joined(full, boxes_of(target))


def joined(full: Tensor, boxes: Sequence[Placed]) -> Tensor:
    """Boxes of a whole tensor as the rank holds them; a view where there is one."""
    if len(boxes) == 1:
        return boxes[0].box.of(full)
    last = boxes[-1].here
    found = full.new_empty([begin + size for begin, size in zip(last.offsets, last.sizes)])
    for one in boxes:
        one.here.of(found).copy_(one.box.of(full))
    return found


def local_values(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient history; it shares the tensor's memory."""
    local = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    return torch.Tensor.detach(local)
