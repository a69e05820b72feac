"""strategy=ddp: the whole model on every rank, in torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from typing import TYPE_CHECKING, Any, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.engines.base import Engine
from nemo_dist_conf.runtime.engines.ddp_wrappers import OneRankDDP, SeveralRanksDDP, check_reduced
from nemo_dist_conf.runtime.engines.model_refusals import refuse_max_norm, refuse_sparse
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.rank0_values import send_from_rank0
from nemo_dist_conf.runtime.techniques.batch_statistics import refuse_sync_on_cpu
from nemo_dist_conf.runtime.techniques.layerdrop import refuse_layerdrop
from nemo_dist_conf.runtime.torch_inside import own_children

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts
    from nemo_dist_conf.runtime.typed_configs import DDPConfig

__all__ = ["DDPEngine"]

log = logging.getLogger(__name__)

#: torch 2.13 renamed the option; the old name warns there, the new one is unknown to torch 2.11.
_BUFFERS_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class DDPEngine(Engine):
    """DDP sends rank 0's values when it wraps, so a model gets its values before. device_mesh None: all ranks."""

    name = "ddp"
    fill_when = "before_sharding"
    makes_equal = False
    first_backward_differs = True

    @classmethod
    def whole_up_to(cls, options: Mapping[str, Any]) -> float:
        return math.inf  # every rank holds all of it anyway

    @property
    def replicas(self) -> Sequence[dist.ProcessGroup]:
        return [] if self._group is None else [self._group]

    @property
    def data_ranks(self) -> int:
        return dist.get_world_size() if self.device_mesh is None else self.device_mesh.size()

    def device(self, model: nn.Module) -> torch.device:
        return next(model.parameters(), torch.empty(0)).device

    def refuse(self, model: nn.Module) -> None:
        where = self.device(model).type if self.device_mesh is None else self.device_mesh.device_type
        refuse_sync_on_cpu(model, where)
        if self.data_ranks == 1:
            return
        refuse_max_norm(model)
        if not self.config.find_unused_parameters:
            switch = "strategy.find_unused_parameters"
            why = f"layers that a step skips get no gradient, which DDP takes with {switch}=true only"
            refuse_layerdrop(model, f"{switch}=false", why, f"{switch}=true")

    def shard(self, model: nn.Module, blocks: Blocks, experts: SplitExperts | None) -> nn.Module:
        """The model in DDP; on one rank, or where nothing is trained, without what reduces gradients.

        Raises ConfigError for a model on meta.
        """
        config: DDPConfig = self.config
        if dist.get_backend(self._group) == "nccl":
            refuse_sparse(model, "NCCL cannot reduce its gradients")
        device = self.device(model)
        if device.type == "meta":
            raise ConfigError(
                Problem(
                    what="the model is on the meta device, and DDP needs its values",
                    asked="DDPManager.parallelize(model)",
                    allowed="a materialised model",
                    instead="nemo_dist_conf.instantiate(cfg)",
                )
            )
        if self.data_ranks == 1 or not any(p.requires_grad for p in model.parameters()):
            why = "one rank has nothing to reduce" if self.data_ranks == 1 else "nothing is trained"
            log.info("ddp: %s, so there are no buckets", why)
            return OneRankDDP(model, device)
        if _BUFFERS_OPTION == "broadcast_buffers" and not config.broadcast_buffers:
            send_from_rank0(model.buffers())  # torch 2.13 makes them equal once in any case
        return SeveralRanksDDP(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=self._group if self.device_mesh is not None else None,
            **{_BUFFERS_OPTION: config.broadcast_buffers},
            find_unused_parameters=config.find_unused_parameters,
            static_graph=config.static_graph,
            bucket_cap_mb=config.bucket_cap_mb,
            gradient_as_bucket_view=config.gradient_as_bucket_view,
        )

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.device_mesh is None else self.device_mesh.get_group(A.DP.value)

    # ------------------------------------------------------------------------------------------- of a wrapped model

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        return isinstance(model, DistributedDataParallel)

    def inner(self, model: nn.Module) -> nn.Module | None:
        return own_children(model)["module"]  # model.module would tell DDP that it is used past its forward

    def microbatch(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else model.no_sync()

    def finish_gradients(self, model: nn.Module) -> None:
        check_reduced(model)

    def adopt_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """With a refusal of steps after a backward that left gradients of this rank alone."""
        if isinstance(model, SeveralRanksDDP):
            optimizer.register_step_pre_hook(lambda *_: check_reduced(model))
        return optimizer

    def replica_groups(self, model: nn.Module) -> Sequence[dist.ProcessGroup]:
        group = getattr(model, "process_group", None)
        return [group] if group is not None and group.size() > 1 else []
