"""Tensor-parallel parameters for a library that cannot shard DTensors on: as local tensors that know how they were cut.

megatron-fsdp 0.6 fails on DTensors that are split by rows ("chunk metadata is invalid"), while plain parameters with
Megatron's own marks work. So each rank keeps its part as a plain parameter, and a module sees the DTensor that its
tensor-parallel style expects during its forward only.
"""

from __future__ import annotations

from typing import Any, Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.techniques.tensor.local_parameters import runs_on_parts
from nemo_dist_conf.runtime.torch_inside import mark_tensor_parallel, own_parameters

__all__ = ["keep_local_shards"]


def keep_local_shards(model: nn.Module) -> None:
    """Replace every DTensor parameter on a 1-D tensor-parallel mesh by this rank's part of it, in place.

    Tied parameters stay tied. The parts carry Megatron's marks (tensor_model_parallel, partition_dim).
    Raises ConfigError for parameters that do not split into equal parts, which the library takes for granted.
    """
    made: dict[int, nn.Parameter] = {}
    problems: dict[str, Problem] = {}
    for path, module in model.named_modules():
        own = own_parameters(module)
        held = {key: p for key, p in own.items() if isinstance(p, DTensor)}
        if not held:
            continue
        for key, parameter in held.items():
            problem = _uneven(f"{path}.{key}", parameter) or _packed(f"{path}.{key}", parameter)
            if problem is not None:
                problems.setdefault(problem.what, problem)
            if id(parameter) not in made:
                made[id(parameter)] = _local(parameter)
            own[key] = made[id(parameter)]
        # Some styles show parameters to their module as plain tensors themselves: replicated ones alone, and parts.
        if not runs_on_parts(module) and any(
            not placement.is_replicate() for p in held.values() for placement in p.placements
        ):
            module.forward = _Presented(module, module.forward, {key: _Layout(p) for key, p in held.items()})
    ConfigError.raise_if(problems.values())


class _Layout:
    """What a DTensor is besides its values."""

    def __init__(self, parameter: DTensor) -> None:
        self.mesh, self.placements = parameter.device_mesh, parameter.placements
        self.shape, self.stride = parameter.shape, parameter.stride()

    def present(self, local: Tensor) -> Tensor:
        """The DTensor of these local values; gradients go to them."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


class _Presented:
    """The forward of a module that sees its parameters as DTensors."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], layouts: dict[str, _Layout]) -> None:
        self.module, self.forward, self.layouts = module, forward, layouts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = own_parameters(self.module)
        held = {key: parameters[key] for key in self.layouts}
        parameters.update({key: layout.present(held[key]) for key, layout in self.layouts.items()})
        try:
            return self.forward(*args, **kwargs)
        finally:
            parameters.update(held)


def _local(parameter: DTensor) -> nn.Parameter:
    local = nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
    (placement,) = parameter.placements
    if isinstance(placement, Shard):
        mark_tensor_parallel(local, placement.dim)
    return local


def _uneven(name: str, parameter: DTensor) -> Problem | None:
    size = parameter.device_mesh.size()
    for placement in parameter.placements:
        if isinstance(placement, Shard) and parameter.shape[placement.dim] % size:
            count = parameter.shape[placement.dim]
            what = f"{name} has {count} rows or columns, which {size} ranks cannot share equally under megatron-fsdp"
            allowed = f"a number that {size} divides (model.config.vocab_size for the vocabulary), or strategy=fsdp2"
            return Problem(
                what=what,
                asked=f"parallelism.tp_size={size}",
                allowed=allowed,
                instead=f"strategy=fsdp2 parallelism.tp_size={size}",
            )
    return None


def _packed(name: str, parameter: DTensor) -> Problem | None:
    if not any(hasattr(placement, "split_factor") for placement in parameter.placements):
        return None
    tp = f"parallelism.tp_size={parameter.device_mesh.size()}"
    what = (
        f"{name} is several weights in one, each split by itself, which megatron-fsdp has no words for in a checkpoint"
    )
    return Problem(what=what, asked=tp, allowed="tp_size=1, or strategy=fsdp2", instead=f"strategy=fsdp2 {tp}")
