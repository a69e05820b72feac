"""The global 2-norm of gradients, each element counted once, however the parameters are sharded or replicated."""

from __future__ import annotations

from typing import Any, Callable, Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.engines.base import reduces_without_gradient
from nemo_dist_conf.runtime.torch_inside import norms_of, scale_all

__all__ = ["clip", "scale_gradients"]

#: Torch adds up a norm on the CPU one by one in the tensor's dtype (2.13): 2e-3 off for 33 million elements in float32,
#: 2e-7 in parts of this size, as fast and without a copy.
_CPU_NORM_ELEMENTS = 2**16


def clip(
    parameters: Iterable[torch.Tensor],
    max_norm: float | None,
    stages: DeviceMesh | None = None,
    note: Callable[[torch.Tensor], None] | None = None,
    elsewhere: Collection[int] = (),
) -> torch.Tensor:
    """Scale gradients so that their global 2-norm is at most ``max_norm``; returns the norm before that.

    stages: the axis over whose ranks other parameters lie. note: told the norm before gradients are scaled.
    elsewhere: ids of parameters that another of those ranks counts; they are scaled only."""
    groups: dict[Any, list[torch.Tensor]] = {}
    copies: list[torch.Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None and not reduces_without_gradient(parameter):
            continue
        shown = parameter if gradient is None else gradient  # a rank that has nothing of it still reduces with others
        if isinstance(shown, DTensor):
            sharded = tuple(not placement.is_replicate() for placement in shown.placements)
            # The parameter's mesh: that of a gradient may be an equal one of an earlier model, which DTensor remembers,
            # and its groups are others, on which only the ranks that have a gradient would wait.
            mesh = getattr(parameter, "device_mesh", shown.device_mesh)
            held = groups.setdefault((mesh, sharded), [])
        else:
            held = groups.setdefault(None, [])
        held = copies if id(parameter) in elsewhere else held
        if gradient is not None:
            held.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    squares = []
    for key, tensors in groups.items():
        square = _square_sum(tensors, None if key is None else key[0].device_type)
        if key is not None:
            mesh, sharded = key
            for index, is_sharded in enumerate(sharded):
                if is_sharded and mesh.size(index) > 1:
                    square = _all_reduce(square, mesh, index)
        squares.append(square)
    if not squares and stages is None:
        return torch.tensor(0.0)
    device = squares[0].device if squares else torch.device("cpu")
    total = torch.stack([torch.zeros((), device=device), *(square.to(device) for square in squares)]).sum()
    if stages is not None:
        total = _all_reduce(total, stages, 0)
    total = total.sqrt()
    if note is not None:
        note(total)
    if max_norm:
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for tensors in filter(None, [*groups.values(), copies]):
            scale_all(tensors, scale.to(tensors[0].device))
    return total


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients by a number, in place, wherever each lies."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    for device in {tensor.device for tensor in held}:
        scale_all([tensor for tensor in held if tensor.device == device and tensor.numel()], factor)


def _square_sum(tensors: list[torch.Tensor], device_type: str | None) -> torch.Tensor:
    is_exact = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    dtype = torch.float64 if is_exact else torch.float32
    filled = [t for t in tensors if t.numel()]
    if not filled:  # this rank has nothing of these parameters, and torch refuses an empty list
        return torch.zeros((), dtype=dtype, device=tensors[0].device if tensors else device_type)
    norms = norms_of([part for t in filled for part in _short_parts(t)], 2.0, dtype=dtype)
    return torch.stack(list(norms)).square().sum()


def _short_parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of a tensor, none of them long on a CPU, whose norms together are its own."""
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.device.type != "cpu" or tensor.numel() <= _CPU_NORM_ELEMENTS:
        return (tensor,)
    in_memory = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))  # a norm knows no order
    if in_memory.is_contiguous():
        return in_memory.view(-1).split(_CPU_NORM_ELEMENTS)
    return in_memory.split(max(1, tensor.size(0) * _CPU_NORM_ELEMENTS // tensor.numel()))


def _all_reduce(value: torch.Tensor, mesh: Any, index: int) -> torch.Tensor:
    # Offloaded gradients are on the CPU while the group may be NCCL's.
    moved = value.to(mesh.device_type)
    dist.all_reduce(moved, group=mesh.get_group(index))
    return moved
