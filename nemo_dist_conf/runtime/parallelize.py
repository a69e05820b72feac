"""The one order in which a model is parallelised, for every strategy; each technique has a module of its own.

tensor/sequence parallel -> expert parallel -> fill (strategies that take values before) -> context parallel ->
precision -> activation checkpointing -> compile -> split into pipeline stages -> autocast -> shard or replicate -> fill
(strategies that take shards).

Techniques that split parameters come first, so that a strategy which takes values before it shards gets them between
those and what stands around forwards. Stages are planned on the plain model and cut out of the parallelised one, which
is on meta if it is large: so plans and rules of the other techniques see the whole model, and no rank ever has another
rank's weights.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
from nemo_dist_conf.runtime.engines.base import Engine, engine_of, register, unwrapped
from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.build import Fill
from nemo_dist_conf.runtime.model.rank0_values import send_from_rank0
from nemo_dist_conf.runtime.model.replaced_forwards import Autocast, public_methods
from nemo_dist_conf.runtime.process_group import initialize_distributed
from nemo_dist_conf.runtime.techniques.activation_checkpointing import (
    apply_activation_checkpointing,
    names_to_recompute,
)
from nemo_dist_conf.runtime.techniques.batch_statistics import warn_of_own_rows
from nemo_dist_conf.runtime.techniques.compile import compile_blocks
from nemo_dist_conf.runtime.techniques.layerdrop import refuse_layerdrop, share_draws
from nemo_dist_conf.runtime.typed_configs import MoEParallelizerConfig

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline, PipelinePlan
    from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts

__all__ = ["autocast_forward", "parallelize"]

log = logging.getLogger(__name__)


def parallelize(
    model: nn.Module,
    engine: Engine,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    blocks: str | Iterable[str] | None = None,
    fill: Fill | None = None,
    example: Mapping[str, Any] | None = None,
) -> Any:
    """The model with every technique of the engine's config applied, wrapped or in place; with an optimizer, the pair.

    engine: of the strategy, for this model alone.
    blocks: path of the blocks, where neither the model's declaration nor its repeated layers are meant.
    fill: called on a model built on meta, or on each stage of it, when the engine wants it.
    example: what the model's forward takes, by keyword, where a technique has to be tried on it; None: guessed.
    With ``engine.pipeline`` the result is a Pipeline.
    Raises ConfigError for what the model, the machine or the build cannot do.
    """
    if not dist.is_initialized():
        initialize_distributed()
    _refuse_wrapped(model)
    engine.refuse(model)
    if engine.makes_equal:  # shards of different models would train nonsense
        send_from_rank0([*model.parameters(), *model.buffers()])
    units = find_blocks(model, blocks)
    mode = engine.config.activation_checkpointing
    recomputed = names_to_recompute(model, units, engine.groups["recompute"]) if mode else []
    mesh: Any = engine.device_mesh
    ways, method = None, engine.groups["context"]["method"]
    if engine.sizes.get(A.CP, 1) > 1:
        from nemo_dist_conf.runtime.techniques.context.trial import try_context_parallel

        ways = try_context_parallel(model, mesh[A.CP.value], units, method, engine.sizes.get(A.TP, 1))
    warn_of_own_rows(model, engine.data_ranks)
    pp_size = engine.sizes.get(A.PP, 1)
    if pp_size > 1:
        why = "the stages of a pipeline hand on what the layers before have made, and would not skip the same ones"
        refuse_layerdrop(model, f"parallelism.pp_size={pp_size}", why, "parallelism.pp_size=1")
    share_draws(model, engine.replicas)
    plain = dict(model.named_parameters()) if optimizer is not None else {}
    stages = None
    if engine.pipeline is not None:
        from nemo_dist_conf.runtime.engines.pipeline_model import plan_pipeline

        stages = plan_pipeline(model, units, engine.pipeline, pp_size)
    if engine.sizes.get(A.TP, 1) > 1:
        engine.split_tensors(model, example, _experts_of(model) if engine.moe_mesh is not None else ())
    experts = _split_experts(model, engine) if engine.moe_mesh is not None else None
    if fill is not None and engine.fill_when == "before_sharding":
        fill(model)
        fill = None
    engine.after_split(model)
    again = None
    if ways is not None:
        from nemo_dist_conf.runtime.techniques.context.parallel import apply_context_parallel

        again = apply_context_parallel(model, mesh[A.CP.value], ways, method).again
    engine.set_precision(model)
    keeps_routing = experts is not None and experts.config.ignore_router_for_ac
    run_again = {name: model.get_submodule(name) for name in recomputed}  # other techniques may have put others there
    apply_activation_checkpointing(model, run_again, mode, keeps_routing, again)
    if engine.compiles_blocks:
        compile_blocks(units)
    if stages is not None:
        return _pipeline(model, units, stages, engine, fill, experts)
    if engine.autocast_dtype is not None:
        autocast_forward(model, engine.device(model), engine.autocast_dtype)
    wrapped = engine.shard(model, units, experts)
    register(wrapped, engine)
    if fill is not None:
        fill(wrapped)
    engine.finish(wrapped)
    if optimizer is None:
        return wrapped
    _rebind(optimizer, plain, unwrapped(wrapped))
    return wrapped, engine.adopt_optimizer(wrapped, optimizer)


def _experts_of(model: nn.Module) -> list[str]:
    from nemo_dist_conf.runtime.techniques.expert.parallel import find_experts

    return list(find_experts(model))


def _split_experts(model: nn.Module, engine: Engine) -> SplitExperts:
    from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts, apply_expert_parallel, keep_routing

    mesh: Any = engine.device_mesh
    moe_mesh: Any = engine.moe_mesh
    config = engine.moe or MoEParallelizerConfig()
    gradient_size = engine.sizes[A.DP_REPLICATE] * engine.sizes[A.DP_SHARD] * engine.sizes[A.CP]
    found = apply_expert_parallel(model, moe_mesh, mesh[A.TP.value], gradient_size)
    if engine.config.activation_checkpointing and config.ignore_router_for_ac:
        keep_routing(model, found)
    return SplitExperts(list(found.values()), moe_mesh[A.EP_SHARD.value], config)


def _pipeline(
    model: nn.Module,
    units: Blocks,
    plan: PipelinePlan,
    engine: Engine,
    fill: Fill | None,
    experts: SplitExperts | None,
) -> Pipeline:
    """This rank's stages cut out of the parallelised model, each sharded and filled."""
    from nemo_dist_conf.runtime.engines.pipeline import PipelineEngine
    from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
    from nemo_dist_conf.runtime.techniques.pipeline.stages import cut

    mesh: Any = engine.device_mesh
    config: Any = engine.pipeline
    pp_mesh, device = mesh[A.PP.value], engine.device(model)
    averaged: list[Averaged] = []
    rows = {row.stage: row for row in plan.rows if row.pp_rank == pp_mesh.get_local_rank()}
    # All before any is sharded, which would change modules that another one has a likeness of.
    cuts = {index: cut(model, plan.placed, plan.parts, index, config.to_dict()) for index in rows}
    stages = {index: stage for index, (stage, _) in cuts.items()}
    forwards = {index: forward for index, (_, forward) in cuts.items()}
    for index, stage in stages.items():
        row = rows[index]
        if engine.autocast_dtype is not None:
            autocast_forward(stage, device, engine.autocast_dtype)
        held = {name: unit for name, unit in units.items() if name in row.modules}
        whole = engine.shard_stage(stage, held, experts, is_last=row.stage == len(plan.rows) - 1)
        if fill is not None:
            fill(stage)
        if whole is not None:
            whole.move_to(device)
            averaged.append(whole)
    pipeline = Pipeline(
        stages,
        forwards,
        plan,
        config,
        pp_mesh,
        cp_size=engine.sizes.get(A.CP, 1),
        dtype=config.dtype or engine.dtype_between_stages,
        reduce_every_backward=engine.reduces_every_backward,
        averaged=averaged,
        is_compiled=engine.compiles_blocks,
    )
    register(pipeline, PipelineEngine(engine))
    return pipeline


def _refuse_wrapped(model: nn.Module) -> None:
    if type(engine_of(model)) is not Engine:
        kind = type(model).__name__
        what, asked = f"the model is wrapped already ({kind})", f"parallelize({kind})"
        raise ConfigError(Problem(what=what, asked=asked, allowed="the model itself", instead="model.module"))


def autocast_forward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run the model's forward, and its other methods, under torch.autocast; the loss outside of it is left alone."""
    model.forward = Autocast(model.forward, device.type, dtype)
    for name, method in list(public_methods(model)):
        setattr(model, name, Autocast(method, device.type, dtype))
    log.info("autocast: %s", str(dtype).removeprefix("torch."))


def _rebind(optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer that was built before wrapping hold the parameters of the wrapped model, by their names."""
    after = dict(model.named_parameters())
    if all(after.get(name) is parameter for name, parameter in before.items()):
        return
    if optimizer.state:
        raise ConfigError(
            Problem(
                what="the optimizer has taken steps on the unsharded parameters",
                asked="parallelize(model, optimizer)",
                allowed="an optimizer without state",
                instead="parallelize(model) first",
            )
        )
    names = {id(parameter): name for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [after[names[id(p)]] if id(p) in names else p for p in group["params"]]
