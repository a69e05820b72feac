"""What context parallelism would gather for a model: read off a run on the meta device, nothing is exchanged.

Which modules are run on whole rows is tried on one process (trial.py); keys and values are those that are handed to the
attention of transformers' registry.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dist_conf.families.built_shape import Gathered
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.meta_forward import run_on_meta
from nemo_dist_conf.runtime.techniques.context.parallel import (
    Ways,
    own_configs,
    set_attention,
    takes_tokens,
    with_positions,
)
from nemo_dist_conf.runtime.techniques.context.trial_runs import sees_itself
from nemo_dist_conf.runtime.techniques.context.whole_rows import TokenDims, tokens_given
from nemo_dist_conf.runtime.torch_inside import attention_of, name_attention

__all__ = ["gathered_on_paper"]

_NOTED = "nemo_dist_conf_noted"


def gathered_on_paper(
    model: nn.Module, blocks: Blocks, ways: Ways, rows: int, length: int, dtype: str
) -> tuple[Gathered, ...]:
    """What the ranks gather in the forward of one microbatch, call by call, in bytes of whole rows.

    model: on the meta device; it is afterwards as it was. rows, length: [rows, tokens] of whole rows.
    Raises whatever the model's forward raises there.
    """
    notes, whole = _Notes(), ways.whole_rows
    configs = own_configs(model, whole)
    before = [(config, attention_of(config)) for config in configs]
    handles = [module.register_forward_hook(notes.leave_whole) for module in model.modules() if type(module) in whole]
    for module in model.modules():
        if type(module) in whole:
            enter = functools.partial(notes.enter_whole, whole[type(module)])
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if ways.fills_positions and takes_tokens(module):
            positions = torch.empty(length, dtype=torch.long, device="meta").expand(rows, -1)
            fill = functools.partial(_filled, positions)
            handles.append(module.register_forward_pre_hook(fill, with_kwargs=True))
    for number, block in enumerate(blocks.values()):
        handles.append(block.register_forward_pre_hook(functools.partial(notes.enter_part, number)))
        handles.append(block.register_forward_hook(functools.partial(notes.enter_part, len(blocks))))
    try:
        if configs:
            from transformers import AttentionInterface, AttentionMaskInterface

            AttentionInterface.register(_NOTED, functools.partial(_noted, notes))
            AttentionMaskInterface.register(_NOTED, AttentionMaskInterface()["eager"])
            set_attention(configs, {}, _NOTED)
        run_on_meta(model, blocks, frozenset(), rows, length, dtype)
    finally:
        name_attention(before)
        for handle in handles:
            handle.remove()
    return tuple(notes.found)


class _Notes:
    """What has been gathered so far, and where the run is."""

    def __init__(self) -> None:
        self.found: list[Gathered] = []
        self._part, self._on_whole = -1, 0

    def enter_part(self, part: int, *_: Any) -> None:
        self._part = part

    def note(self, tensor: Tensor, why: str, heads: bool) -> None:
        size = tensor.numel() * tensor.element_size()
        self.found.append(Gathered(self._part, size, tensor.requires_grad, heads, why))

    def enter_whole(self, dims: TokenDims, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._on_whole += 1
        if self._on_whole == 1:  # inside of another one nothing is gathered
            for tensor in tokens_given(module, args, kwargs, dims):
                self.note(tensor, "whole rows", heads=False)

    def leave_whole(self, *_: Any) -> None:
        self._on_whole -= 1


def _filled(positions: Tensor, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args, kwargs) if kwargs.get("position_ids") is not None else with_positions(module, args, kwargs, positions)


def _noted(
    notes: _Notes,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention of transformers' registry that notes its keys and values, [B, K, S, D], and what is added to scores
    of a rank's own keys alone."""
    for tensor in (key, value):
        notes.note(tensor, "keys and values", heads=True)
    if position_bias is not None and position_bias.dim() == 4 and position_bias.size(-2) == 1:
        notes.note(position_bias, "biases of keys", heads=True)
    return sees_itself(set(), module, query, key, value, attention_mask, position_bias=position_bias)
