"""strategy=fsdp2: parameters sharded in place, block by block, with torch's fully_shard."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.device_meshes import fsdp_mesh
from nemo_dist_conf.runtime.engines.base import Engine
from nemo_dist_conf.runtime.engines.fsdp2_entries import open_entries
from nemo_dist_conf.runtime.engines.fsdp2_units import shard_blocks
from nemo_dist_conf.runtime.engines.model_refusals import (
    refuse_container,
    refuse_hooks,
    refuse_max_norm,
    refuse_script,
)
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.shared_memory import refuse_shared_memory
from nemo_dist_conf.runtime.model.tensor_attributes import cast_beside_attributes
from nemo_dist_conf.runtime.techniques.batch_statistics import refuse_sync_on_cpu
from nemo_dist_conf.runtime.techniques.compile import enable_async_tensor_parallel
from nemo_dist_conf.runtime.techniques.precision import tell_precision
from nemo_dist_conf.runtime.torch_inside import never_packed

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
    from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts
    from nemo_dist_conf.runtime.typed_configs import FSDP2Config

__all__ = ["FSDP2Engine"]

#: 16 MiB in float32. Sharding tensors on meta and filling them then takes tens of milliseconds longer.
_SMALL_ELEMENTS = 2**22


class FSDP2Engine(Engine):
    """device_mesh: axes pp, dp_replicate, dp_shard, cp, tp, or any 1-D mesh to shard over."""

    name = "fsdp2"

    @classmethod
    def whole_up_to(cls, options: Mapping[str, Any]) -> float:
        offloads = (options.get("offload_policy") or {}).get("enabled")
        return 0 if offloads else _SMALL_ELEMENTS

    @property
    def fill_device(self) -> torch.device | None:
        return torch.device("cpu") if self.config.offload_policy is not None else None

    def refuse(self, model: nn.Module) -> None:
        refuse_container(model)
        refuse_script(model)
        refuse_hooks(model)
        refuse_max_norm(model)
        refuse_shared_memory(model, self._mesh)
        refuse_sync_on_cpu(model, self._mesh.device_type)

    def split_tensors(self, model: nn.Module, example: Mapping[str, Any] | None, apart: Sequence[str]) -> None:
        from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel

        config, mesh = self.config, self._mesh[A.TP.value]
        apply_tensor_parallel(
            model,
            mesh,
            plan=config.tp_plan,
            sequence_parallel=config.sequence_parallel,
            example=example,
            apart=apart,
        )
        if config.enable_async_tensor_parallel:
            enable_async_tensor_parallel(self.device(model), mesh.get_group().group_name)

    def set_precision(self, model: nn.Module) -> None:
        config: FSDP2Config = self.config
        policy = config.mp_policy or MixedPrecisionPolicy()
        if policy.param_dtype is not None:
            cast_beside_attributes(model, policy.param_dtype)
        options = {"strategy.mp_policy": config.mp_policy, "strategy.autocast_dtype": config.autocast_dtype}
        said_by = " and ".join(name for name, value in options.items() if value is not None)
        computes, reduces = config.autocast_dtype or policy.param_dtype, policy.reduce_dtype or policy.param_dtype
        tell_precision(self.name, model, computes, reduces, said_by=said_by or None)
        if config.patch_is_packed_sequence:
            _patch_is_packed_sequence(model)

    @property
    def dtype_between_stages(self) -> torch.dtype | None:
        policy = self.config.mp_policy
        return policy.param_dtype if policy is not None and self.config.autocast_dtype is None else None

    @property
    def reduces_every_backward(self) -> bool:
        return self.config is not None and not self.config.defer_fsdp_grad_sync

    def shard(self, model: nn.Module, blocks: Blocks, experts: SplitExperts | None) -> nn.Module:
        in_pipeline = self.sizes.get(A.PP, 1) > 1
        self._averaged = shard_blocks(model, blocks, fsdp_mesh(self._mesh), self.config, in_pipeline, experts)
        return model

    def shard_stage(
        self, stage: nn.Module, blocks: Blocks, experts: SplitExperts | None, is_last: bool
    ) -> Averaged | None:
        return shard_blocks(stage, blocks, fsdp_mesh(self._mesh), self._of_stage(is_last), True, experts)

    def _of_stage(self, is_last: bool) -> FSDP2Config:
        """The config of a stage: only the last one casts the model's outputs, the others what they hand on."""
        sent = self.pipeline.dtype if self.pipeline is not None else None
        config: FSDP2Config = self.config
        if is_last or (config.mp_policy is None and sent is None):
            return config
        policy = config.mp_policy or MixedPrecisionPolicy()
        return dataclasses.replace(config, mp_policy=dataclasses.replace(policy, output_dtype=sent))

    def finish(self, wrapped: nn.Module) -> None:
        averaged, self._averaged = self._averaged, None  # it knows the model, which this engine must not
        if averaged is not None:
            averaged.move_to(self.device(wrapped))
        policy = self.config.mp_policy
        watch = averaged.watch if averaged is not None else None
        open_entries(wrapped, watch, policy.param_dtype if policy is not None else None)

    # ------------------------------------------------------------------------------------------- of a wrapped model

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        return isinstance(model, FSDPModule)

    def model_name(self, model: nn.Module) -> str:
        return type(model).__name__.removeprefix("FSDP")  # fully_shard renames the class

    @contextlib.contextmanager
    def microbatch(self, model: Any, last: bool) -> Iterator[None]:
        model.set_is_last_backward(last)
        if not self.reduces_every_backward:
            model.set_requires_gradient_sync(last)
        yield

    def show_shards(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward some are whole

    def replica_groups(self, model: nn.Module) -> Sequence[dist.ProcessGroup]:
        meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
        widest = max(meshes, key=lambda mesh: mesh.ndim, default=None)
        return [] if widest is None else [widest.get_group(i) for i in range(widest.ndim) if widest.size(i) > 1]


def _patch_is_packed_sequence(model: nn.Module) -> None:
    """Answer transformers' question whether a batch is packed with a plain False, for the whole process.

    The original waits for the device in every attention layer.
    """
    key = "strategy.patch_is_packed_sequence"
    if not hasattr(model, "config") or not type(model).__module__.startswith("transformers"):
        what = f"{type(model).__name__} is not a model of transformers, so there is nothing to patch"
        raise ConfigError(
            Problem(what=what, asked=f"{key}=true", allowed="false for this model", instead=f"{key}=false")
        )
    never_packed()
