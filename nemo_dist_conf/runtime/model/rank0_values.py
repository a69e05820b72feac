"""A model's values made those of rank 0."""

from __future__ import annotations

from typing import Iterable

import torch
import torch.distributed as dist

from nemo_dist_conf.runtime.torch_inside import send_in_buckets

__all__ = ["send_from_rank0"]

#: What DDP sends at once when it makes models equal.
_BUCKET_BYTES = 250 * 2**20


def send_from_rank0(tensors: Iterable[torch.Tensor]) -> None:
    """Give all ranks the values that rank 0 has of these tensors; those on meta stay as they are.

    In buckets, as DDP does it: one collective for each tensor would take longer than a small model's wrapping.
    """
    sent, world = [tensor.detach() for tensor in tensors if not tensor.is_meta], dist.group.WORLD
    if sent and world is not None and world.size() > 1:
        send_in_buckets(sent, world, _BUCKET_BYTES)
