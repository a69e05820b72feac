"""What a run computes, reduces and keeps in which dtype, said once at its start."""

from __future__ import annotations

import logging

import torch
from torch import nn

__all__ = ["tell_precision"]

log = logging.getLogger(__name__)


def tell_precision(
    strategy: str,
    model: nn.Module,
    computes: torch.dtype | None = None,
    reduces: torch.dtype | None = None,
    keeps: torch.dtype | None = None,
    said_by: str | None = None,
) -> None:
    """One line of the log. None: in the dtype of the parameters. said_by: the option that decides, where one does."""
    own = ", ".join(dict.fromkeys(_word(parameter.dtype) for parameter in model.parameters())) or "nothing"
    words = [own if dtype is None else _word(dtype) for dtype in (computes, reduces, keeps)]
    source = f" ({said_by})" if said_by is not None else ""
    log.info("%s: computes in %s, reduces gradients in %s, keeps parameters in %s%s", strategy, *words, source)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
