"""What the megatron-fsdp package is handed: its arguments, the classes of its units, and what it cannot take."""

from __future__ import annotations

import importlib
import logging
import weakref
from typing import Any, Callable, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.engines.model_refusals import refuse_sparse
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.torch_inside import flattened
from nemo_dist_conf.runtime.typed_configs import MegatronFSDPConfig
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = [
    "ARGUMENTS",
    "UsedParameters",
    "in_whole_rows",
    "refuse_parameters",
    "require_cuda",
    "shard_axis",
    "unit_classes",
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


def require_cuda(device_mesh: DeviceMesh) -> None:
    """Raise ConfigError for a mesh of anything but CUDA devices."""
    if device_mesh.device_type != "cuda" or not torch.cuda.is_available():
        what = "megatron-fsdp runs on CUDA devices only"
        asked = f"strategy=megatron_fsdp on {device_mesh.device_type}"
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="device=cuda; fsdp2 and ddp run anywhere", instead="strategy=fsdp2")
        )


class UsedParameters:
    """Which parameters got a gradient in a step.

    megatron-fsdp 0.6 reduces a group of parameters when all of it have their gradients. One that a step does not use
    leaves those of the others as they are on each rank, without a word; a group that is not used at all does no harm.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: before it is wrapped; the library keeps its parameters for forward and backward."""
        self._used: set[int] = set()
        self._trained: dict[str, weakref.ref[nn.Parameter]] = {}  # an engine must not keep the model alive
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._trained[name] = weakref.ref(parameter)
                parameter.register_post_accumulate_grad_hook(lambda used: self._used.add(id(used)))

    def check(self, model: Any) -> None:
        """Raise ConfigError, with names, for a step in which a part of a group of parameters got no gradient."""
        used = set(self._used)
        self._used.clear()
        group_of = model.param_and_grad_buffer.param_to_param_group
        trained = {name: parameter for name, known in self._trained.items() if (parameter := known()) is not None}
        partly = {group_of[p] for p in trained.values() if p in group_of and id(p) in used}
        unused = [n for n, p in trained.items() if id(p) not in used and group_of.get(p) in partly]
        if not used or not unused:
            return
        shown = f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"
        what = f"{shown} got no gradient in this step, and megatron-fsdp then reduces none of the same group's"
        allowed = "strategy=fsdp2, which takes it; or requires_grad_(False) for what is never used"
        raise ConfigError(Problem(what=what, asked="strategy=megatron_fsdp", allowed=allowed, instead="strategy=fsdp2"))


def refuse_parameters(model: nn.Module) -> None:
    """megatron-fsdp 0.6 fails, or reduces wrongly, where a group of parameters has one of these in it."""
    for name, parameter in model.named_parameters():
        why = "has no dimension" if parameter.dim() == 0 else ""
        if parameter.dtype == torch.float64 or parameter.is_complex():
            why = f"is {str(parameter.dtype).removeprefix('torch.')}"
        if why:
            what = f"{name} {why}, and megatron-fsdp cannot shard such a parameter"
            raise ConfigError(
                Problem(
                    what=what, asked="strategy=megatron_fsdp", allowed="fsdp2 and ddp take it", instead="strategy=fsdp2"
                )
            )
    refuse_sparse(model, instead="strategy=ddp")


def in_whole_rows(model: nn.Module, wrap: Callable[[], Any]) -> Any:
    """What ``wrap()`` returns, which shards a model. Raises ConfigError where a rank would begin or end within a row.

    megatron-fsdp 0.6 puts the parameters of a unit one after the other, and cuts what it takes for small anywhere: in
    a unit with rows of several lengths that is seen to happen to a convolution beside a table of positions.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        wrapped = wrap()
    except RuntimeError as error:
        if "is invalid for input of size" not in str(error):
            raise
        raise _cut_rows(model, "") from error
    for name, parameter in wrapped.module.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() % max(shapes[name][1:].numel(), 1):
            raise _cut_rows(model, name)
    return wrapped


def _cut_rows(model: nn.Module, name: str) -> ConfigError:
    what = f"megatron-fsdp cuts {name or 'a parameter'} of {type(model).__name__} within a row, as its shards cannot be"
    return ConfigError(
        Problem(
            what=what,
            asked="strategy=megatron_fsdp",
            allowed=f"units whose parameters have rows of lengths that divide each other ({_KEY}); fsdp2 takes any",
            instead="strategy=fsdp2",
        )
    )


def shard_axis(device_mesh: DeviceMesh, sizes: Mapping[str, int]) -> str:
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


def unit_classes(model: nn.Module, config: MegatronFSDPConfig, units: Blocks) -> list[type]:
    """Classes of the modules that are gathered and freed as one.

    By default those of the model's blocks, of all its lists: as it declares them, else its repeated layers.
    """
    present = dict.fromkeys(type(module) for module in model.modules())
    own = list(dict.fromkeys(type(block) for block in units.values()))
    paths = config.megatron_fsdp_unit_modules
    if paths == MegatronFSDPConfig().megatron_fsdp_unit_modules:
        named = [kind for kind in present if f"{kind.__module__}.{kind.__qualname__}" in paths]
        if own and set(own) != set(named):
            log.info("%s: blocks of %s: %s", _KEY, type(model).__name__, ", ".join(kind.__name__ for kind in own))
        if own or named:
            return own or named
    else:
        classes = [_import(path, own) for path in paths]
        absent = [path for path, kind in zip(paths, classes) if not any(issubclass(one, kind) for one in present)]
        if absent:
            what = f"{type(model).__name__} has no module of class {absent[0]}"
            raise _units_problem(what, absent[0], own)
        if classes:
            return classes
    if config.zero_dp_strategy == 3:
        raise _units_problem(f"{type(model).__name__} shows no blocks to shard as units", "", own)
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
    return ConfigError(
        unknown_name(
            path,
            paths or ["package.module.Class"],
            what=what,
            asked=assigned(_KEY, [path] if path else []),
            allowed=", ".join(paths) or "class paths of the model's repeated layers",
            offer=lambda known: assigned(_KEY, [known]),
        )
    )
