"""strategy=megatron_fsdp: NVIDIA's megatron-fsdp around a model, and what its gradients and optimizer need.

The library is used as it is; what surrounds it here makes a plain loop right for every option of it:

- Gradients are reduced in a step's last backward and made ready once, before they are clipped or used. The library's
  own automatic mode reduces them twice for ZeRO-0/1 without overlap, and in every microbatch for ZeRO-0/1 with it.
- The optimizer's state is made without a step that changes weights or counts.
- Weights are gathered again where they are not gathered in forward.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import types
from typing import Any, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem, TrainingError
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.names import nearest
from nemo_dist_conf.runtime.engines.fsdp2_unit_rules import refuse_sparse
from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.techniques.activation_checkpointing import apply_activation_checkpointing
from nemo_dist_conf.runtime.torch_inside import chunks_told, flattened, show_sharded
from nemo_dist_conf.runtime.typed_configs import MegatronFSDPConfig
from nemo_dist_conf.strategies.megatron_fsdp import library_problems

__all__ = [
    "ARGUMENTS",
    "adopt_optimizer",
    "finish_gradients",
    "install_weights",
    "is_wrapped",
    "microbatch",
    "remember_norm",
    "show_shards",
    "take_over_weights",
    "wrap",
]

log = logging.getLogger(__name__)

_KEY = "strategy.megatron_fsdp_unit_modules"

#: Field of our config -> argument of ``megatron_fsdp.fully_shard_model`` that it is handed to unchanged.
ARGUMENTS: Mapping[str, str] = {
    "zero_dp_strategy": "zero_dp_strategy",
    "init_fsdp_with_meta_device": "init_model_with_meta_device",
    "overlap_grad_reduce": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_param_gather",
    "average_in_collective": "average_in_collective",
    "disable_bucketing": "disable_bucketing",
    "calculate_per_token_loss": "calculate_per_token_loss",
    "keep_fp8_transpose_cache": "keep_fp8_transpose_cache",
    "nccl_ub": "nccl_ub",
    "fsdp_double_buffer": "fsdp_double_buffer",
}


def is_wrapped(model: Any) -> bool:
    """Whether this is the library's wrapper."""
    return type(model).__module__.startswith("megatron_fsdp.")


def wrap(
    model: nn.Module,
    config: MegatronFSDPConfig,
    device_mesh: DeviceMesh,
    blocks: str | Iterable[str] | None = None,
    counts: Mapping[type, set[Any]] | None = None,
) -> Any:
    """The model in the library's wrapper, its parameters sharded as the config says.

    model: materialised, or on meta with init_fsdp_with_meta_device, where the library lets it initialise itself.
    device_mesh: axes dp, cp, tp. blocks: path of the blocks, where the model's own declaration is not meant.
    counts: what a trial found for context parallelism (``apply_context_parallel``).
    Raises ConfigError without CUDA or the library, and for unit modules that the model does not have.
    """
    ConfigError.raise_if(library_problems())
    _require_cuda(device_mesh)
    _refuse_parameters(model)
    library = importlib.import_module("megatron_fsdp")
    units = find_blocks(model, blocks)
    classes = _unit_classes(model, config, units)
    sizes = dict(zip(device_mesh.mesh_dim_names or (), device_mesh.shape))
    again = None
    if sizes.get(A.CP, 1) > 1:
        from nemo_dist_conf.runtime.techniques.context.parallel import apply_context_parallel

        again = apply_context_parallel(model, device_mesh[A.CP.value], counts).again
    # After it: a block counts its positions when it runs again, too.
    apply_activation_checkpointing(model, units, config.activation_checkpointing, again=again)
    policy = library.MixedPrecisionPolicy(
        main_params_dtype=torch.float32 if config.preserve_fp32_weights else None,
        main_grads_dtype=torch.float32 if config.grad_reduce_in_fp32 else None,
    )
    options = {argument: getattr(config, name) for name, argument in ARGUMENTS.items()}
    used = _Used(model)
    wrapped = library.fully_shard_model(
        model,
        device_mesh=device_mesh,
        dp_shard_dim=_shard_axis(device_mesh, sizes),
        tp_dim=A.TP.value,
        # Of the same axes; without it the library cannot average while it reduces.
        expt_device_mesh=device_mesh if config.average_in_collective else None,
        fsdp_unit_modules=classes,
        device=_device(device_mesh),
        mixed_precision_policy=policy,
        sync_model_each_microbatch=False,
        **options,
    )
    wrapped.is_last_microbatch = config.overlap_grad_reduce
    wrapped._nemo_config, wrapped._gradient_norm, wrapped._used = config, None, used
    show_sharded(wrapped)
    log.info("megatron-fsdp: %d classes of units, ZeRO-%d over %s", len(classes), config.zero_dp_strategy, sizes)
    return wrapped


def _require_cuda(device_mesh: DeviceMesh) -> None:
    if device_mesh.device_type != "cuda" or not torch.cuda.is_available():
        what = "megatron-fsdp runs on CUDA devices only"
        asked = f"strategy=megatron_fsdp on {device_mesh.device_type}"
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="device=cuda; fsdp2 and ddp run anywhere", instead="strategy=fsdp2")
        )


class _Used:
    """Which parameters got a gradient in a step.

    megatron-fsdp 0.6 reduces a group of parameters when all of it have their gradients. One that a step does not use
    leaves those of the others as they are on each rank, without a word; a group that is not used at all does no harm.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: before it is wrapped; the library keeps its parameters for forward and backward."""
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._used: set[int] = set()
        for parameter in self._trained.values():
            parameter.register_post_accumulate_grad_hook(lambda used: self._used.add(id(used)))

    def check(self, model: Any) -> None:
        """Of the step that ends now; raises ConfigError with the names of what was not used."""
        used, self._used = self._used, set()
        group_of = model.param_and_grad_buffer.param_to_param_group
        partly = {group_of[p] for p in self._trained.values() if p in group_of and id(p) in used}
        unused = [n for n, p in self._trained.items() if id(p) not in used and group_of.get(p) in partly]
        if not used or not unused:
            return
        shown = f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"
        what = f"{shown} got no gradient in this step, and megatron-fsdp then reduces none of the same group's"
        allowed = "strategy=fsdp2, which takes it; or requires_grad_(False) for what is never used"
        raise ConfigError(Problem(what=what, asked="strategy=megatron_fsdp", allowed=allowed, instead="strategy=fsdp2"))


def _refuse_parameters(model: nn.Module) -> None:
    """megatron-fsdp 0.6 fails, or reduces wrongly, where a group of parameters has one of these in it."""
    for name, parameter in model.named_parameters():
        why = "has no dimension" if parameter.dim() == 0 else ""
        why = "is float64" if parameter.dtype == torch.float64 else why
        if why:
            what = f"{name} {why}, and megatron-fsdp cannot shard such a parameter"
            raise ConfigError(
                Problem(
                    what=what, asked="strategy=megatron_fsdp", allowed="fsdp2 and ddp take it", instead="strategy=fsdp2"
                )
            )
    refuse_sparse(model, instead="strategy=ddp")


def _device(device_mesh: DeviceMesh) -> torch.device:
    if device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_mesh.device_type)


def _shard_axis(device_mesh: DeviceMesh, sizes: Mapping[str, int]) -> str:
    """The axis to shard over; ranks of cp hold the same weights, so it counts too.

    A mesh that is not ours gets the axis of both.
    """
    if sizes.get(A.CP, 1) == 1:
        return A.DP.value
    if sizes[A.DP] == 1:
        return A.CP.value
    try:
        device_mesh[A.DP_CP.value]
    except KeyError:
        flattened(device_mesh, (A.DP.value, A.CP.value), A.DP_CP.value)
    return A.DP_CP.value


def _unit_classes(model: nn.Module, config: MegatronFSDPConfig, units: Blocks) -> list[type]:
    """Classes of the modules that are gathered and freed as one."""
    present = dict.fromkeys(type(module) for module in model.modules())
    own = list(dict.fromkeys(type(block) for block in units.values()))
    paths = config.megatron_fsdp_unit_modules
    if paths == MegatronFSDPConfig().megatron_fsdp_unit_modules:
        named = [kind for kind in present if f"{kind.__module__}.{kind.__qualname__}" in paths]
        if named:
            return named
        if own:
            names = ", ".join(kind.__name__ for kind in own)
            log.info("%s: the default is no module of %s; its blocks are taken: %s", _KEY, type(model).__name__, names)
            return own
    else:
        classes = [_import(path, own) for path in paths]
        absent = [path for path, kind in zip(paths, classes) if not any(issubclass(one, kind) for one in present)]
        if absent:
            what = f"{type(model).__name__} has no module of class {absent[0]}"
            raise _units_problem(what, absent[0], own)
        if classes:
            return classes
    if config.zero_dp_strategy == 3:
        raise _units_problem(f"{type(model).__name__} shows no blocks to shard as units", "[]", own)
    return []


def _import(path: str, own: list[type]) -> type:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise _units_problem(f"{path} cannot be imported", path, own) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise _units_problem(f"{path} is not a class of modules", path, own)
    return found


def _units_problem(what: str, path: str, own: list[type]) -> ConfigError:
    paths = [f"{kind.__module__}.{kind.__qualname__}" for kind in own]
    likely = nearest(path, paths) or paths[:1] or ["package.module.Class"]
    allowed = ", ".join(paths) or "class paths of the model's repeated layers"
    return ConfigError(
        Problem(what=what, asked=f"{_KEY}=[{path.strip('[]')}]", allowed=allowed, instead=f"{_KEY}=[{likely[0]}]")
    )


@contextlib.contextmanager
def microbatch(model: Any, last: bool) -> Iterator[None]:
    """Around the forward and backward of one microbatch of a wrapped model."""
    model.is_last_microbatch = last and model._nemo_config.overlap_grad_reduce
    try:
        yield
    finally:
        # A loop without microbatches comes in between: each of its backwards is a last one.
        model.is_last_microbatch = model._nemo_config.overlap_grad_reduce


def finish_gradients(model: Any) -> None:
    """Let the gradients of a step be those of all ranks, in ``.grad`` of the sharded parameters; once a step.

    Raises ConfigError where the library has not reduced some, because a step did not use all of a group.
    """
    if model.microbatch_count:
        model._used.check(model)
        model.finish_grad_sync()
        model._gradient_norm = None  # an earlier step's


def remember_norm(model: Any, norm: torch.Tensor) -> None:
    """Of this step's gradients, so that it need not be measured a second time."""
    model._gradient_norm = norm


def adopt_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let ``step`` and ``zero_grad`` of an optimizer over a wrapped model's parameters do what the library needs.

    Raises ConfigError for an optimizer over other parameters.
    """
    from megatron_fsdp import fully_shard_optimizer

    known = {id(parameter) for parameter in model.parameters()}
    if not all(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        what = "the optimizer holds parameters that are not the wrapped model's"
        allowed = "an optimizer over model.parameters() of the wrapped model, before its first forward"
        raise ConfigError(
            Problem(
                what=what,
                asked=type(optimizer).__name__,
                allowed=allowed,
                instead="instantiate(cfg, optimizer=factory)",
            )
        )
    # The library makes the state by a step with gradients of zero: it must neither move a weight nor count.
    still = {"lr": 0.0, "weight_decay": 0.0}
    held = [{key: group[key] for key in still if key in group} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update({key: value for key, value in still.items() if key in group})
    fully_shard_optimizer(optimizer)
    for group, values in zip(optimizer.param_groups, held):
        group.update(values)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].zero_()
    library_step: Any = optimizer.step

    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        finish_gradients(model)
        if model._nemo_config.check_for_nan_in_grad:
            _check_finite(model)
        result = library_step(
            *args, sync_grad_before_optimizer_step=False, install_optimized_model_weights=False, **kwargs
        )
        install_weights(model)
        return result

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    return optimizer


def install_weights(model: Any) -> None:
    """Let forward see what an optimizer has put into the sharded parameters."""
    model.install_optimized_model_weights()
    config = model._nemo_config
    if config.zero_dp_strategy in (1, 2) and not config.overlap_param_gather:
        model.start_param_sync(force_sync=True)


def take_over_weights(model: Any) -> None:
    """Let forward see what somebody else than the optimizer has put into the sharded parameters.

    What was gathered by a forward since the last step would be used once more.
    """
    install_weights(model)
    model.all_gather_pipeline.reset()


def show_shards(model: Any) -> None:
    """Put the sharded parameters into the model, each knowing which part of the whole it is; all ranks call it.

    The library splits a unit's parameters as one, so a rank may hold all of one and nothing of another.
    """
    from megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata

    show_sharded(model)
    for _, parameter in sorted(model.module.named_parameters()):
        sharded = any(not placement.is_replicate() for placement in parameter.placements)
        if sharded and chunks_told(parameter) is None:
            update_uneven_dtensor_chunk_metadata(parameter)


def _check_finite(model: Any) -> None:
    from nemo_dist_conf.runtime.gradients import clip_grad_norm_

    if model._gradient_norm is None:
        clip_grad_norm_(model, None)
    norm, model._gradient_norm = model._gradient_norm, None
    if not torch.isfinite(norm):
        raise TrainingError(
            f"the norm of all gradients is {float(norm)}; no weight was changed\n"
            "  try     a smaller learning rate, or clip_grad_norm_ before optimizer.step()\n"
            "  or      strategy.check_for_nan_in_grad=false, which goes on regardless"
        )
