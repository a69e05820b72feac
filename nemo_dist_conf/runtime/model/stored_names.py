"""How a checkpoint folder of transformers names, and takes apart, what a model holds.

Since transformers 5 a layer's experts are one parameter, while a folder stores every expert's matrices by themselves
(``block_sparse_moe.experts.3.w1.weight``). Which tensor is which part of what parameter is asked of transformers' own
conversion: it is given numbers that say where they come from in place of weights, so nothing has to be known here about
any family of models.
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.model.adapters import base_state
from nemo_dist_conf.runtime.torch_inside import as_stored

__all__ = ["Part", "stored_parts"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What a stored tensor is: the whole of a parameter, or some rows of one expert's matrix.

    expert: index along the parameter's first dimension; None: the whole. first, rows: along its second.
    shape: of the stored tensor.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0
    rows: int = 0


def stored_parts(model: nn.Module) -> dict[str, Part]:
    """Stored name -> part, for all of a transformers model's state; {} where it is stored under its own names.

    Also {} where a tensor is stored as something else than rows of a parameter. ``model`` may be on meta.
    """
    shapes = {name: tuple(values[0].shape) for name, values in base_state(model, model.state_dict()).items()}
    numbers: dict[str, Tensor] = {}
    begins: list[int] = []
    count = 0
    for name, shape in shapes.items():
        rows = shape[: 2 if len(shape) > 2 else 1]
        size = torch.Size(rows).numel()
        numbers[name] = torch.arange(count, count + size).view(*rows, *([1] * (len(shape) - len(rows))))
        begins.append(count)
        count += size
    try:
        stored = as_stored(model, dict(numbers))
    except Exception as error:  # a conversion that needs more than the rows of a tensor
        log.debug("no stored names for %s: %s", type(model).__name__, error)
        return {}
    if stored is None:
        return {}
    names = list(shapes)
    parts = {name: _part(found, numbers, names, begins, shapes) for name, found in stored.items()}
    if stored.keys() == shapes.keys() or None in parts.values():
        return {}
    return {name: part for name, part in parts.items() if part is not None}


def _part(
    found: Tensor,
    numbers: dict[str, Tensor],
    names: list[str],
    begins: list[int],
    shapes: dict[str, tuple[int, ...]],
) -> Part | None:
    """The part whose rows have these numbers; None where they are no rows in a row.

    begins: the first number of each parameter, in the order of ``names``.
    """
    flat = found.flatten()
    if not len(flat) or not torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + len(flat))):
        return None
    index = bisect.bisect_right(begins, int(flat[0])) - 1
    name = names[index]
    shape, own = shapes[name], numbers[name]
    if found.shape == own.shape:
        return Part(name, shape) if len(flat) == own.numel() else None
    if own.dim() != 3 or found.shape != (len(flat), 1):
        return None
    expert, first = divmod(int(flat[0]) - begins[index], shape[1])
    if first + len(flat) > shape[1]:
        return None
    return Part(name, (len(flat), shape[2]), expert, first, len(flat))
