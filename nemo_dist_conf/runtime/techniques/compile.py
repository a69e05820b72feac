"""torch.compile block by block, and the switch that lets inductor overlap tensor-parallel communication."""

from __future__ import annotations

import logging
from typing import Any

import torch

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.torch_inside import overlap_tensor_parallel

__all__ = ["BACKEND", "compile_blocks", "enable_async_tensor_parallel"]

log = logging.getLogger(__name__)

#: The compiler of every block; a test may take one that needs no C++ compiler.
BACKEND = "inductor"


def compile_blocks(blocks: Blocks) -> None:
    """Compile each block in place; equal blocks share the compiled code, and parameter names stay as they are."""
    for block in blocks.values():
        block.compile(backend=BACKEND)
    log.info("compile (%s): %d blocks", BACKEND, len(blocks))


def enable_async_tensor_parallel(device: torch.device, tp_group_name: Any) -> None:
    """Let inductor split the matmuls around tensor-parallel gathers and scatters and overlap them.

    Raises ConfigError where this build or device has no symmetric memory.
    Source: torch/_inductor/fx_passes/micro_pipeline_tp.py.
    """
    if device.type != "cuda":
        key = "strategy.enable_async_tensor_parallel"
        what = "async tensor parallelism needs CUDA's symmetric memory, and this run is on the CPU"
        raise ConfigError(
            Problem(
                what=what,
                asked=f"{key}=true",
                allowed="false on the CPU; true on GPUs with NVLink",
                instead=f"{key}=false",
            )
        )
    overlap_tensor_parallel(tp_group_name)
    log.info("async tensor parallelism over the group %s", tp_group_name)
