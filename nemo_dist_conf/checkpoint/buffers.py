"""Buffers that ranks have changed each in its own way, made equal when a checkpoint is saved.

A checkpoint has one value for each. A run that goes on from it is to be the run that went on without it, so the model
itself gets that value on every rank, not the file alone.
"""

from __future__ import annotations

import functools
import logging
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.engines.base import engine_of
from nemo_dist_conf.runtime.techniques.batch_statistics import keeps_statistics

__all__ = ["make_buffers_equal"]

log = logging.getLogger(__name__)


@torch.no_grad()
def make_buffers_equal(model: nn.Module) -> None:
    """Give every rank the same persistent buffers; every rank that holds the model, or a stage of it, calls it.

    Running statistics become the mean over ranks, which for a running mean is that of all ranks' rows; any other buffer
    that differs becomes that of the first rank, as DDP's ``broadcast_buffers`` has it. Both are said once, by name.
    """
    found = _persistent(model)
    groups = engine_of(model).replica_groups(model) if found and dist.is_initialized() else []
    if not groups:
        return
    device = _device_of(groups)
    flat = torch.cat([buffer.to(device, torch.float64).reshape(-1) for _, _, buffer in found])
    flat = torch.where(flat.isnan(), flat.new_tensor(torch.finfo(flat.dtype).max), flat)
    both = torch.cat([flat, -flat])
    for group in groups:
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    largest, smallest = both[: len(flat)], -both[len(flat) :]
    apart = (largest != smallest).split([buffer.numel() for _, _, buffer in found])
    differing = [entry for entry, differs in zip(found, apart) if bool(differs.any())]
    averaged, copied = [], []
    for name, module, buffer in differing:
        if keeps_statistics(module) and buffer.is_floating_point():
            averaged.append(name)
            _average(buffer, groups)
        else:
            copied.append(name)
            sent = buffer.to(device)
            for group in groups:
                dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
            buffer.copy_(sent)
    if dist.get_rank() == 0:
        where = "in a checkpoint and, from then on, in the model"
        _say(f"running statistics of each rank's own rows are averaged {where}", tuple(averaged))
        _say(f"buffers that differ between ranks are rank 0's {where}", tuple(copied))


@functools.cache
def _say(what: str, names: tuple[str, ...]) -> None:
    if names:
        log.warning("%s: %s%s", what, ", ".join(names[:3]), ", ..." if len(names) > 3 else "")


def _persistent(model: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """(name, its module, buffer) of what a checkpoint keeps whole; in the same order on every rank."""
    found = []
    for part in engine_of(model).parts(model):
        names = part.state_dict(keep_vars=True).keys()
        for path, module in part.named_modules():
            for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                name = f"{path}.{key}" if path else key
                if name in names and not isinstance(buffer, DTensor):
                    found.append((name, module, buffer))
    return sorted(found, key=lambda entry: entry[0])


def _device_of(groups: Sequence[dist.ProcessGroup]) -> torch.device:
    """Where tensors are to be that these groups send; under offload buffers lie on the CPU."""
    return torch.device("cuda" if any("nccl" in dist.get_backend(group) for group in groups) else "cpu")


def _average(buffer: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    mean = buffer.to(_device_of(groups), torch.float64)
    for group in groups:
        dist.all_reduce(mean, group=group)
        mean /= group.size()
    buffer.copy_(mean)
