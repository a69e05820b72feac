"""Activation checkpointing per block: full, or selective, which keeps the results that are dear to recompute."""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nemo_dist_conf.runtime.blocks import Blocks

__all__ = ["apply_activation_checkpointing"]

log = logging.getLogger(__name__)


def apply_activation_checkpointing(
    model: nn.Module, blocks: Blocks, mode: bool | str, keeps_routing: bool = False
) -> None:
    """Let every block's forward drop its activations and run again in backward.

    mode True: everything inside a block is recomputed. "selective": results of matmuls, attention and
    collectives are kept, the cheap rest is recomputed. False: nothing happens.
    keeps_routing: also keep which experts a router chose, so that tokens take the same way when forward runs again.
    The forward of each module is replaced in place, so names of modules and parameters stay as they are.
    Source: torch.utils.checkpoint (non-reentrant), create_selective_checkpoint_contexts.
    """
    if mode is False:
        return
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # a key/value cache of transformers would be filled again by the recomputation
    contexts: dict[str, Any] = {}
    if mode == "selective" or keeps_routing:
        kept = (_kept_ops() if mode == "selective" else frozenset()) | (_ROUTING if keeps_routing else frozenset())
        policy = functools.partial(_policy, kept)
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in blocks.values():
        block.forward = _Checkpointed(block.forward, contexts)
    log.info("activation checkpointing (%s): %d blocks", "full" if mode is True else mode, len(blocks))


class _Checkpointed:
    """A block's forward under torch.utils.checkpoint.

    Not a functools.partial: torch.compile passes over one without a word (torch 2.13). Not a closure: copying the
    model would leave the copy with the original's forward.
    """

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]) -> None:
        self.forward, self.options = forward, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **self.options, **kwargs)


#: What a router of transformers chooses experts with.
_ROUTING = frozenset({torch.ops.aten.topk.default})


def _policy(kept: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _kept_ops() -> frozenset[Any]:
    """Operators whose results are kept. A build may lack some of them; attention on CPU has one of its own."""
    aten = torch.ops.aten
    kept = {aten.mm.default, aten.addmm.default, aten.bmm.default}
    for name in (
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    ):
        packet = getattr(aten, name, None)
        if packet is not None:
            kept.add(packet.default)
    for name in ("reduce_scatter_tensor", "all_to_all_single"):
        packet = getattr(torch.ops._c10d_functional, name, None)
        if packet is not None:
            kept.add(packet.default)
    return frozenset(kept)
