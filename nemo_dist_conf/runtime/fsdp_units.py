"""fully_shard per block and on the root, with its policies, resharding and prefetch chains."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from nemo_dist_conf.runtime.blocks import Blocks
from nemo_dist_conf.strategies.fsdp2 import FSDP2Config

__all__ = ["shard_blocks"]

log = logging.getLogger(__name__)


def shard_blocks(
    model: nn.Module, blocks: Blocks, mesh: DeviceMesh, config: FSDP2Config, in_pipeline: bool = False
) -> None:
    """Shard the model in place: each block is gathered, computed and freed on its own, the root takes the rest.

    mesh: 1-D to shard over, or 2-D (replicate, shard) for HSDP.
    reshard_after_forward None: blocks free their gathered parameters after forward, all but the last one, which
    backward needs first; inside a pipeline none does, because the next microbatch needs them at once.
    Source: torch.distributed.fsdp.fully_shard.
    """
    policy = config.mp_policy or MixedPrecisionPolicy()
    # A cast of the outputs is meant for the model's outputs; between blocks it would only cost two copies.
    inner = MixedPrecisionPolicy(
        param_dtype=policy.param_dtype,
        reduce_dtype=policy.reduce_dtype,
        output_dtype=None,
        cast_forward_inputs=policy.cast_forward_inputs,
    )
    shared: dict[str, Any] = {"mesh": mesh, "offload_policy": _offload(config.offload_policy, mesh)}
    units = list(blocks.values())
    for index, block in enumerate(units):
        reshard = config.reshard_after_forward
        if reshard is None:
            reshard = not in_pipeline and index < len(units) - 1
        fully_shard(block, mp_policy=inner, reshard_after_forward=reshard, **shared)
    # None: torch keeps the root's parameters gathered, since backward starts with them.
    fully_shard(model, mp_policy=policy, reshard_after_forward=config.reshard_after_forward, **shared)
    if config.enable_fsdp2_prefetch:
        _chain_prefetch(units, config.fsdp2_forward_prefetch_depth, config.fsdp2_backward_prefetch_depth)
    shape = " x ".join(f"{name} {mesh.size(i)}" for i, name in enumerate(mesh.mesh_dim_names or ("ranks",)))
    log.info("fully_shard: %d blocks and the root over %s", len(units), shape)


def _offload(policy: CPUOffloadPolicy | None, mesh: DeviceMesh) -> OffloadPolicy:
    if policy is None:
        return OffloadPolicy()
    if mesh.device_type == "cpu" and policy.pin_memory and not torch.cuda.is_available():
        if mesh.get_rank() == 0:
            log.warning("strategy.offload_policy.pin_memory: there is no GPU to pin memory for, so it is not pinned")
        return CPUOffloadPolicy(pin_memory=False)
    return policy


def _chain_prefetch(units: list[nn.Module], forward_depth: int, backward_depth: int) -> None:
    """Tell every unit which ones to gather while it computes: the next in forward, the previous in backward."""
    for index, unit in enumerate(units):
        if not isinstance(unit, FSDPModule):
            raise AssertionError("prefetch is set after fully_shard")
        ahead: list[Any] = units[index + 1 : index + 1 + forward_depth]
        before: list[Any] = units[max(0, index - backward_depth) : index][::-1]
        unit.set_modules_to_forward_prefetch(ahead)
        # Without any, torch gathers one ahead by itself; a unit that names itself, gathered already, gets none.
        unit.set_modules_to_backward_prefetch(before or [unit])
