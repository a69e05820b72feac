"""The one order in which a model is parallelised; each technique has a module of its own.

tensor/sequence parallel -> expert parallel -> context parallel -> activation checkpointing -> compile -> split into
pipeline stages -> autocast -> shard or replicate -> fill.

Stages are planned on the plain model and cut out of the parallelised one, which is on meta if it is large: so plans and
rules of the other techniques see the whole model, and no rank ever has another rank's weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.device_meshes import fsdp_mesh
from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
from nemo_dist_conf.runtime.engines.ddp_wrappers import SeveralRanksDDP
from nemo_dist_conf.runtime.engines.fsdp2_entries import open_entries
from nemo_dist_conf.runtime.engines.fsdp2_unit_rules import (
    refuse_container,
    refuse_hooks,
    refuse_max_norm,
    refuse_script,
    refuse_sparse,
)
from nemo_dist_conf.runtime.engines.fsdp2_units import Experts, shard_blocks
from nemo_dist_conf.runtime.engines.one_rank import OneRankDDP
from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.replaced_forwards import Autocast, public_methods
from nemo_dist_conf.runtime.model.shared_memory import refuse_shared_memory
from nemo_dist_conf.runtime.model.tensor_attributes import cast_beside_attributes
from nemo_dist_conf.runtime.techniques.activation_checkpointing import apply_activation_checkpointing
from nemo_dist_conf.runtime.techniques.batch_statistics import refuse_sync_on_cpu, warn_of_own_rows
from nemo_dist_conf.runtime.techniques.compile import compile_blocks, enable_async_tensor_parallel
from nemo_dist_conf.runtime.techniques.layerdrop import refuse_layerdrop, share_draws
from nemo_dist_conf.runtime.techniques.precision import tell_precision
from nemo_dist_conf.runtime.torch_inside import never_packed, send_in_buckets
from nemo_dist_conf.runtime.typed_configs import (
    DDPConfig,
    FSDP2Config,
    MegatronFSDPConfig,
    MoEParallelizerConfig,
    PipelineConfig,
)

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline, PipelinePlan

__all__ = ["Fill", "autocast_forward", "parallelize_ddp", "parallelize_fsdp2", "parallelize_megatron_fsdp"]

log = logging.getLogger(__name__)

#: torch 2.13 renamed the option; the old name warns there, the new one is unknown to torch 2.11.
_BUFFERS_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)

#: What DDP sends at once when it makes models equal.
_BUCKET_BYTES = 250 * 2**20

#: Materialises a model that was built on the meta device.
Fill = Callable[[nn.Module], None]


def parallelize_fsdp2(
    model: nn.Module,
    config: FSDP2Config,
    device_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    blocks: str | Iterable[str] | None = None,
    fill: Fill | None = None,
    pipeline: PipelineConfig | None = None,
    moe: MoEParallelizerConfig | None = None,
    example: Mapping[str, Any] | None = None,
) -> Any:
    """The model with every technique of ``strategy=fsdp2`` applied in place; with an optimizer, the pair.

    blocks: path of the blocks, where neither the model's declaration nor its repeated layers are meant.
    fill: called last on a model built on meta, or on each stage of it.
    pipeline: split the model into stages over the axis pp and return a Pipeline. None: on a mesh with that axis the
    model is taken to be a stage already.
    moe: how experts are wrapped on a mesh with the axis ep. None: by its defaults.
    example: what the model's forward takes, by keyword, where a technique has to be tried on it; None: guessed.
    Raises ConfigError for what the model or the build cannot do.
    """
    _refuse_wrapped(model)
    refuse_container(model)
    refuse_script(model)
    refuse_hooks(model)
    refuse_max_norm(model)
    names = device_mesh.mesh_dim_names or ()
    sizes = {name: device_mesh.size(i) for i, name in enumerate(names)}
    refuse_shared_memory(model, device_mesh)
    refuse_sync_on_cpu(model, device_mesh.device_type)
    device = torch.device(device_mesh.device_type)
    _sync_from_rank0(model)
    units = find_blocks(model, blocks)
    counts = None
    if sizes.get(A.CP, 1) > 1:
        from nemo_dist_conf.runtime.techniques.context.trial import try_context_parallel

        counts = try_context_parallel(model, device_mesh[A.CP.value], units)
    together = [index for index in range(device_mesh.ndim) if names[index : index + 1] != (A.PP,)]
    apart = [index for index in together if names[index : index + 1] != (A.TP,)]
    warn_of_own_rows(model, math.prod(device_mesh.size(index) for index in apart))
    if sizes.get(A.PP, 1) > 1:
        why = "the stages of a pipeline hand on what the layers before have made, and would not skip the same ones"
        refuse_layerdrop(model, f"parallelism.pp_size={sizes[A.PP]}", why, "parallelism.pp_size=1")
    share_draws(model, [device_mesh.get_group(index) for index in together])
    parameters = dict(model.named_parameters()) if optimizer is not None else {}
    stages = None
    if pipeline is not None:
        from nemo_dist_conf.runtime.engines.pipeline_model import plan_pipeline

        stages = plan_pipeline(model, units, pipeline, sizes[A.PP])
    if sizes.get(A.TP, 1) > 1:
        from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel

        tp_mesh = device_mesh[A.TP.value]
        sequence = config.sequence_parallel
        apply_tensor_parallel(model, tp_mesh, plan=config.tp_plan, sequence_parallel=sequence, example=example)
        if config.enable_async_tensor_parallel:
            enable_async_tensor_parallel(device, tp_mesh.get_group().group_name)
    experts = None
    if moe_mesh is not None:
        from nemo_dist_conf.runtime.techniques.expert.parallel import apply_expert_parallel, keep_routing

        gradient_size = sizes[A.DP_REPLICATE] * sizes[A.DP_SHARD] * sizes[A.CP]
        found = apply_expert_parallel(model, moe_mesh, device_mesh[A.TP.value], gradient_size)
        experts = Experts(list(found.values()), moe_mesh[A.EP_SHARD.value], moe or MoEParallelizerConfig())
        if config.activation_checkpointing and experts.config.ignore_router_for_ac:
            keep_routing(model, found)
    again = None
    if counts is not None:
        from nemo_dist_conf.runtime.techniques.context.parallel import apply_context_parallel

        again = apply_context_parallel(model, device_mesh[A.CP.value], counts).again
    if config.mp_policy is not None and config.mp_policy.param_dtype is not None:
        cast_beside_attributes(model, config.mp_policy.param_dtype)
    _tell_precision_of_fsdp2(model, config)
    if config.patch_is_packed_sequence:
        _patch_is_packed_sequence(model)
    keeps_routing = experts is not None and experts.config.ignore_router_for_ac
    apply_activation_checkpointing(model, units, config.activation_checkpointing, keeps_routing, again)
    if config.enable_compile:
        compile_blocks(units)
    if pipeline is not None and stages is not None:
        return _pipeline(model, units, stages, pipeline, config, device_mesh, fill, experts)
    if config.autocast_dtype is not None:
        autocast_forward(model, device, config.autocast_dtype)
    averaged = shard_blocks(model, units, fsdp_mesh(device_mesh), config, sizes.get(A.PP, 1) > 1, experts)
    model._defer_grad_sync = config.defer_fsdp_grad_sync  # type: ignore[assignment]  # read by gradients.accumulate
    if fill is not None:
        fill(model)
    if averaged is not None:
        averaged.move_to(device)
    param_dtype = config.mp_policy.param_dtype if config.mp_policy is not None else None
    open_entries(model, averaged.watch if averaged is not None else None, param_dtype)
    if optimizer is None:
        return model
    _rebind(optimizer, parameters, model)
    return model, optimizer


def _tell_precision_of_fsdp2(model: nn.Module, config: FSDP2Config) -> None:
    policy = config.mp_policy or MixedPrecisionPolicy()
    options = {"strategy.mp_policy": config.mp_policy, "strategy.autocast_dtype": config.autocast_dtype}
    said_by = " and ".join(name for name, value in options.items() if value is not None)
    computes, reduces = config.autocast_dtype or policy.param_dtype, policy.reduce_dtype or policy.param_dtype
    tell_precision("fsdp2", model, computes, reduces, said_by=said_by or None)


def _pipeline(
    model: nn.Module,
    units: Blocks,
    stages: PipelinePlan,
    pipeline: PipelineConfig,
    config: FSDP2Config,
    device_mesh: DeviceMesh,
    fill: Fill | None,
    experts: Experts | None,
) -> Pipeline:
    """This rank's stages cut out of the parallelised model, each sharded and filled."""
    from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
    from nemo_dist_conf.runtime.techniques.pipeline_stages import cut

    pp_mesh, device = device_mesh[A.PP.value], torch.device(device_mesh.device_type)
    parts: dict[int, nn.Module] = {}
    averaged: list[Averaged] = []
    for row in stages.rows:
        if row.pp_rank != pp_mesh.get_local_rank():
            continue
        part = cut(model, stages.chain, row.modules, pipeline.to_dict())
        if config.autocast_dtype is not None:
            autocast_forward(part, device, config.autocast_dtype)
        held = {name: unit for name, unit in units.items() if name in row.modules}
        is_last = row.stage == len(stages.rows) - 1
        whole = shard_blocks(part, held, fsdp_mesh(device_mesh), _of_stage(config, pipeline, is_last), True, experts)
        if fill is not None:
            fill(part)
        if whole is not None:
            whole.move_to(device)
            averaged.append(whole)
        parts[row.stage] = part
    policy = config.mp_policy
    sent = pipeline.dtype or (policy.param_dtype if policy is not None and config.autocast_dtype is None else None)
    return Pipeline(
        parts,
        stages,
        pipeline,
        pp_mesh,
        cp_size=device_mesh[A.CP.value].size(),
        dtype=sent,
        reduce_every_backward=not config.defer_fsdp_grad_sync,
        averaged=averaged,
    )


def _of_stage(config: FSDP2Config, pipeline: PipelineConfig, is_last: bool) -> FSDP2Config:
    """The config of a stage: only the last one casts the model's outputs, the others what they hand on."""
    if is_last or (config.mp_policy is None and pipeline.dtype is None):
        return config
    policy = config.mp_policy or MixedPrecisionPolicy()
    return dataclasses.replace(config, mp_policy=dataclasses.replace(policy, output_dtype=pipeline.dtype))


def parallelize_ddp(
    model: nn.Module,
    config: DDPConfig,
    device_mesh: DeviceMesh | None = None,
    *,
    blocks: str | Iterable[str] | None = None,
    fill: Fill | None = None,
) -> DistributedDataParallel:
    """The model wrapped with DistributedDataParallel as the config says; on one rank without what reduces gradients.

    fill: called before wrapping on a model built on meta, because DDP sends rank 0's values at once.
    Raises ConfigError where a model on meta comes without it.
    """
    _refuse_wrapped(model)
    if not dist.is_initialized():
        from nemo_dist_conf.runtime.process_group import initialize_distributed

        initialize_distributed()
    ranks = dist.get_world_size() if device_mesh is None else device_mesh.size()
    where = next(model.parameters(), torch.empty(0)).device.type
    refuse_sync_on_cpu(model, where if device_mesh is None else device_mesh.device_type)
    warn_of_own_rows(model, ranks)
    if ranks > 1:
        refuse_max_norm(model)
    if ranks > 1 and not config.find_unused_parameters:
        switch = "strategy.find_unused_parameters"
        why = f"layers that a step skips get no gradient, which DDP takes with {switch}=true only"
        refuse_layerdrop(model, f"{switch}=false", why, f"{switch}=true")
    group = dist.group.WORLD if device_mesh is None else device_mesh.get_group(A.DP.value)
    share_draws(model, [group] if group is not None else [])
    units = find_blocks(model, blocks)
    apply_activation_checkpointing(model, units, config.activation_checkpointing)
    if fill is not None:
        fill(model)
    if dist.get_backend(group) == "nccl":
        refuse_sparse(model, "NCCL cannot reduce its gradients")
    parameter = next(model.parameters(), torch.empty(0))
    if parameter.is_meta:
        what = "the model is on the meta device, and DDP needs its values"
        raise ConfigError(
            Problem(
                what=what,
                asked="DDPManager.parallelize(model)",
                allowed="a materialised model",
                instead="nemo_dist_conf.instantiate(cfg)",
            )
        )
    if config.autocast_dtype is not None:
        autocast_forward(model, parameter.device, config.autocast_dtype)
    autocast = "strategy.autocast_dtype" if config.autocast_dtype is not None else None
    tell_precision("ddp", model, config.autocast_dtype, said_by=autocast)
    if ranks == 1 or not any(p.requires_grad for p in model.parameters()):
        why = "one rank has nothing to reduce" if ranks == 1 else "nothing is trained"
        log.info("ddp: %s, so there are no buckets", why)
        return OneRankDDP(model, parameter.device)
    if _BUFFERS_OPTION == "broadcast_buffers" and not config.broadcast_buffers:
        _send_from_rank0(model.buffers())  # torch 2.13 makes them equal once in any case
    return SeveralRanksDDP(
        model,
        device_ids=[parameter.device.index] if parameter.device.type == "cuda" else None,
        process_group=device_mesh.get_group(A.DP.value) if device_mesh is not None else None,
        **{_BUFFERS_OPTION: config.broadcast_buffers},
        find_unused_parameters=config.find_unused_parameters,
        static_graph=config.static_graph,
        bucket_cap_mb=config.bucket_cap_mb,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
    )


def parallelize_megatron_fsdp(
    model: nn.Module,
    config: MegatronFSDPConfig,
    device_mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    blocks: str | Iterable[str] | None = None,
    fill: Fill | None = None,
    example: Mapping[str, Any] | None = None,
) -> Any:
    """The model wrapped with megatron-fsdp as the config says; with an optimizer, the pair.

    fill: called before wrapping on a model built on meta, because the library takes its values from the model.
    Raises ConfigError for what the model, the machine or the installed library cannot do.
    """
    from nemo_dist_conf.runtime.engines.megatron_library import adopt_optimizer, wrap
    from nemo_dist_conf.runtime.engines.megatron_local_shards import keep_local_shards

    _refuse_wrapped(model)
    refuse_max_norm(model)
    refuse_shared_memory(model, device_mesh)
    refuse_sync_on_cpu(model, device_mesh.device_type)
    _sync_from_rank0(model)
    counts = None
    if device_mesh[A.CP.value].size() > 1:
        from nemo_dist_conf.runtime.techniques.context.trial import try_context_parallel

        counts = try_context_parallel(model, device_mesh[A.CP.value], find_blocks(model, blocks))
    warn_of_own_rows(model, device_mesh[A.DP.value].size() * device_mesh[A.CP.value].size())
    share_draws(model, [device_mesh.get_group(index) for index in range(device_mesh.ndim)])
    parameters = dict(model.named_parameters())
    if device_mesh[A.TP.value].size() > 1:
        _split_by_own_plan(model, device_mesh[A.TP.value], example)
    if fill is not None:
        fill(model)
    keep_local_shards(model)
    float32 = torch.float32
    kept, reduced = config.preserve_fp32_weights, config.grad_reduce_in_fp32
    tell_precision("megatron_fsdp", model, None, float32 if reduced else None, float32 if kept else None)
    wrapped = wrap(model, config, device_mesh, blocks, counts)
    if optimizer is None:
        return wrapped
    _rebind(optimizer, parameters, wrapped.module)
    return wrapped, adopt_optimizer(wrapped, optimizer)


def _split_by_own_plan(model: nn.Module, tp_mesh: DeviceMesh, example: Mapping[str, Any] | None) -> None:
    """Tensor parallelism by the plan that a model comes with; a plan on the command line is an option of fsdp2."""
    from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel

    try:
        apply_tensor_parallel(model, tp_mesh, example=example)
    except ConfigError as error:
        raise ConfigError(
            *(
                dataclasses.replace(problem, instead=f"strategy=fsdp2 {problem.instead}")
                if "strategy.tp_plan" in problem.instead
                else problem
                for problem in error.problems
            )
        ) from None


def _refuse_wrapped(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    from nemo_dist_conf.runtime.engines.megatron_library import is_wrapped

    if isinstance(model, (DistributedDataParallel, FSDPModule)) or is_wrapped(model):
        kind = type(model).__name__
        what = f"the model is wrapped already ({kind})"
        raise ConfigError(
            Problem(what=what, asked=f"parallelize({kind})", allowed="the model itself", instead="model.module")
        )


def _sync_from_rank0(model: nn.Module) -> None:
    """Make a materialised model equal to rank 0's, as DDP does: shards of different models would train nonsense."""
    if dist.get_world_size() > 1:
        _send_from_rank0([*model.parameters(), *model.buffers()])


def _send_from_rank0(tensors: Iterable[torch.Tensor]) -> None:
    """In buckets, as DDP does it: one collective for each tensor would take longer than a small model's wrapping."""
    sent, world = [tensor.detach() for tensor in tensors if not tensor.is_meta], dist.group.WORLD
    if sent and world is not None:
        send_in_buckets(sent, world, _BUCKET_BYTES)


def autocast_forward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run the model's forward, and its other methods, under torch.autocast; the loss outside of it is left alone."""
    model.forward = Autocast(model.forward, device.type, dtype)
    for name, method in list(public_methods(model)):
        setattr(model, name, Autocast(method, device.type, dtype))
    log.info("autocast: %s", str(dtype).removeprefix("torch."))


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


def _rebind(optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer that was built before wrapping hold the sharded parameters."""
    if optimizer.state:
        what = "the optimizer has taken steps on the unsharded parameters"
        raise ConfigError(
            Problem(
                what=what,
                asked="parallelize(model, optimizer)",
                allowed="an optimizer without state",
                instead="parallelize(model) first",
            )
        )
    after = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [after[names[id(p)]] if id(p) in names else p for p in group["params"]]
