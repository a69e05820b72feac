"""Gradient accumulation without needless reduction, and one global gradient norm for every layout."""

from __future__ import annotations

import contextlib
from typing import Any, Iterable

import torch
from torch import nn

from nemo_dist_conf.runtime.engines.base import engine_of
from nemo_dist_conf.runtime.engines.gradient_norm import clip

__all__ = ["accumulate", "clip_grad_norm_"]


def accumulate(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Around the forward and backward of one microbatch; ``last`` is True for the step's last one.

    DDP, FSDP2 and Megatron-FSDP (up to ZeRO-1) reduce gradients in the last microbatch only. FSDP2 with
    defer_fsdp_grad_sync=False and Megatron-FSDP from ZeRO-2 on reduce in each of them, which keeps gradients sharded in
    between. Any other module is left alone.
    """
    return engine_of(model).microbatch(model, last)


def clip_grad_norm_(model: nn.Module | torch.Tensor | Iterable[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients so that their global 2-norm is at most ``max_norm``; returns the norm before that.

    The norm counts each element of the model once, however its parameters are sharded or replicated, also when
    they live on different meshes (torch.nn.utils.clip_grad_norm_ refuses those). Of a pipeline (given as such, not as
    its tensors) it is the norm over all stages.
    model: or its tensors, or one of them. max_norm None or 0: only measured.
    Returns a scalar tensor, equal on all ranks.
    Raises ConfigError where DDP has not reduced some of them, because parameters were not used.
    """
    if isinstance(model, torch.Tensor):  # as torch takes one; iterating over it would give rows without gradients
        model = [model]
    if not isinstance(model, nn.Module):
        return clip(model, max_norm)
    engine = engine_of(model)
    engine.finish_gradients(model)
    mesh, others = engine.stage_mesh(model), engine.counted_elsewhere(model)
    return clip(model.parameters(), max_norm, mesh, lambda norm: engine.note_norm(model, norm), others)
