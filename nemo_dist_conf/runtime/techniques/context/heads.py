"""The exchange of tokens for heads: each rank gets all tokens of some of the heads, and gives back what they come to.

One all-to-all takes queries, keys and values there, one takes outputs back, so that attention in between is that of
one process over whole rows, of H / cp heads. Source: DeepSpeed Ulysses, arXiv:2309.14509.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, h heads, d the width of a head, C = L / 2
tokens of a chunk. Rank r has the r-th part of the heads of each tensor. mesh: the axis cp.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.runtime.torch_inside import collectives

__all__ = ["heads_to_tokens", "own_heads", "tokens_to_heads"]

_all_to_all = collectives.all_to_all_single_autograd


def tokens_to_heads(tensors: Sequence[Tensor], mesh: DeviceMesh) -> list[Tensor]:
    """Each [B, h, L, d] -> [B, h / cp, S, d], whole rows of this rank's heads, by one all-to-all.

    All have the same B, L and dtype; cp divides h.
    """
    size = mesh.size()
    parts = [tensor.unflatten(1, (size, -1)).permute(1, 0, 3, 2, 4) for tensor in tensors]  # [cp, B, L, h / cp, d]
    sent = torch.cat([part.flatten(3) for part in parts], -1)
    rows_BSX = _in_order(_all_to_all(sent, None, None, mesh.get_group()))
    found = rows_BSX.split([part.size(3) * part.size(4) for part in parts], -1)
    return [rows.unflatten(-1, part.shape[3:]).transpose(1, 2) for rows, part in zip(found, parts)]


def heads_to_tokens(rows_BhSd: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, h / cp, S, d] of this rank's heads -> [B, L, h, d] of this rank's tokens."""
    size = mesh.size()
    chunks = rows_BhSd.transpose(1, 2).flatten(2).unflatten(1, (2 * size, -1)).transpose(0, 1)  # [2 cp, B, C, x]
    # Rank r has the chunks r and 2 * cp - 1 - r.
    sent = torch.stack([chunks[:size], chunks[size:].flip(0)], 2).flatten(2, 3)
    received = _all_to_all(sent, None, None, mesh.get_group())  # [cp, B, L, x]
    return received.unflatten(-1, (-1, rows_BhSd.size(-1))).permute(1, 2, 0, 3, 4).flatten(2, 3)


def own_heads(tensor: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's part of something that has a value for each head along ``dim``."""
    return tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def _in_order(received: Tensor) -> Tensor:
    """[cp, B, L, x], the tokens of each rank, -> [B, S, x] in the order of the row."""
    halves = received.unflatten(2, (2, -1))
    return torch.cat([halves[:, :, 0], halves[:, :, 1].flip(0)]).transpose(0, 1).flatten(1, 2)
