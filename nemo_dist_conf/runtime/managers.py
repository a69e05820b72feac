"""The managers of the API page: one strategy applied to a model, for a loop that has meshes of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.runtime.engines.ddp import DDPEngine
from nemo_dist_conf.runtime.engines.fsdp2 import FSDP2Engine
from nemo_dist_conf.runtime.engines.megatron_fsdp import MegatronFSDPEngine
from nemo_dist_conf.runtime.parallelize import parallelize
from nemo_dist_conf.runtime.typed_configs import DDPConfig, FSDP2Config, MegatronFSDPConfig

__all__ = ["DDPManager", "FSDP2Manager", "MegatronFSDPManager"]


class DDPManager:
    """Wraps a model with DistributedDataParallel as its config says.

    device_mesh: a mesh with an axis ``dp``, or None for the default process group.
    """

    def __init__(self, config: DDPConfig, device_mesh: DeviceMesh | None = None) -> None:
        self.config = config
        self.device_mesh = device_mesh

    def parallelize(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The wrapped model; with an optimizer, the pair. Parameters stay the same objects.

        Meta parameters must be materialised first (``instantiate`` does): DDP copies rank 0's values at once.
        """
        return parallelize(model, DDPEngine(self.config, self.device_mesh), optimizer=optimizer)


class FSDP2Manager:
    """Applies tensor parallelism, activation checkpointing, compile and fully_shard as its config says.

    device_mesh: axes pp, dp_replicate, dp_shard, cp, tp (or any 1-D mesh to shard over).
    moe_mesh: axes ep_shard, ep, where experts are split.
    """

    def __init__(self, config: FSDP2Config, device_mesh: DeviceMesh, moe_mesh: DeviceMesh | None = None) -> None:
        self.config = config
        self.device_mesh = device_mesh
        self.moe_mesh = moe_mesh

    def parallelize(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The model, sharded in place; with an optimizer, the pair, the optimizer holding the sharded parameters.

        A model on the meta device stays there; ``instantiate`` materialises it afterwards, shard by shard.
        A materialised model is first made equal to rank 0's, as DDP does.
        """
        return parallelize(model, FSDP2Engine(self.config, self.device_mesh, self.moe_mesh), optimizer=optimizer)


class MegatronFSDPManager:
    """Wraps a materialised model with the megatron-fsdp package as its config says.

    device_mesh: axes dp, cp, tp.
    """

    def __init__(self, config: MegatronFSDPConfig, device_mesh: DeviceMesh) -> None:
        self.config = config
        self.device_mesh = device_mesh

    def parallelize(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The wrapped model; with an optimizer, the pair, the optimizer holding the sharded parameters.

        Raises ConfigError without CUDA or the library, and for what the model cannot do.
        """
        return parallelize(model, MegatronFSDPEngine(self.config, self.device_mesh), optimizer=optimizer)
