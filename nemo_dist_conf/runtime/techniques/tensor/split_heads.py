"""An attention that computes with this rank's heads: what it says of itself, and what is given to it head by head.

Shapes: B rows, H heads.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind
from nemo_dist_conf.runtime.torch_inside.styles import Style

__all__ = ["SplitHeads", "head_counts"]

#: Attributes that count heads, and words that are about one head or something else.
_HEADS, _OTHERS = re.compile(r"heads?(?![a-z])"), re.compile(r"dim|size|width|group|mask|prun|max|idx")
#: Attributes that may say how wide all heads are together; they do where a layer inside is as wide.
_WIDTHS = frozenset(
    """all_head_size attention_hidden_size d_model d_model_size dim dim_model embed_dim hidden_dim hidden_size inner_dim
    kv_dim q_dim split_size""".split()
)
#: Arguments that hold something for each head: biases of the scores.
_OF_HEADS = ("alibi", "position_bias")


def head_counts(module: nn.Module) -> dict[str, int]:
    """Attributes in which a module says how many heads it has (of queries, of keys and values), more than one."""
    found = {key: value for key, value in vars(module).items() if type(value) is int and value > 1}
    return {key: value for key, value in found.items() if _HEADS.search(key) and not _OTHERS.search(key)}


class SplitHeads(Style):
    """Numbers of heads, and widths of all of them, become the rank's; biases of scores are cut to the rank's heads.

    For code that counts its heads by attributes of the module; that which leaves it to the shape of the tensors
    (``view(..., -1, head_dim)``) needs nothing.
    """

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        size, rank = device_mesh.size(), device_mesh.get_local_rank()
        counts, widths = head_counts(module), _split_widths(module)
        for key, value in list(vars(module).items()):
            if key in counts or (key in _WIDTHS and type(value) is int and value in widths):
                if value % size == 0:
                    setattr(module, key, value // size)
        heads = max(counts.values(), default=0)
        names = list(inspect.signature(module.forward).parameters)
        if heads % size or not heads or not any(name in _OF_HEADS for name in names):
            return module

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            cut = [_mine(x, heads, size, rank) if name in _OF_HEADS else x for name, x in zip(names, args)]
            args = (*cut, *args[len(cut) :])
            return args, {key: _mine(x, heads, size, rank) if key in _OF_HEADS else x for key, x in kwargs.items()}

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


def _split_widths(module: nn.Module) -> set[int]:
    """Features of the layers inside that the ranks share."""
    widths = set()
    for layer in module.modules():
        weight: Any = getattr(layer, "weight", None)
        if layer_kind(layer) and isinstance(weight, DTensor):
            widths |= {weight.shape[p.dim] for p in weight.placements if p.is_shard()}  # type: ignore[attr-defined]
    return widths


def _mine(x: Any, heads: int, size: int, rank: int) -> Any:
    """This rank's part of something that is [H, ...], [B * H, ...] or [B, H, ., .]; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.dim() == 4:
        return x.chunk(size, 1)[rank] if x.size(1) == heads else x
    if x.dim() != 3 or x.size(0) % heads:
        return x
    return x.unflatten(0, (-1, heads)).chunk(size, 1)[rank].flatten(0, 1)
