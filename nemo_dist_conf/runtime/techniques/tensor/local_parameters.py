"""Parameters that are DTensors on a mesh, and plain tensors to the code of their module while it runs.

So any module will do, and parameters of a whole model share one mesh, which torch's clip_grad_norm_ asks for.
"""

from __future__ import annotations

import weakref
from typing import Any, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from nemo_dist_conf.runtime.model.shard_boxes import cut_boxes, joined
from nemo_dist_conf.runtime.torch_inside import own_parameters

__all__ = ["LocalParameters", "replicate_parameters", "runs_on_parts", "split_parameter", "split_parameters"]

#: (module, name in it) of a parameter.
_Place = tuple[nn.Module, str]


#: Modules whose code is shown parts of their parameters by a style here.
_RUN_ON_PARTS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def runs_on_parts(module: nn.Module) -> bool:
    """Whether a style shows a module's split parameters to its code as plain tensors, and not as DTensors."""
    return module in _RUN_ON_PARTS


class LocalParameters:
    """Plain tensors in the places of parameters, between ``put`` and ``take_back``."""

    def __init__(
        self, mesh: DeviceMesh, whole: Sequence[_Place], gradient: Placement | None, split: Sequence[_Place] = ()
    ) -> None:
        """whole: replicated parameters. gradient: Replicate() where all ranks compute the same of them; Partial() where
        each has its own part, summed in backward; None: they stay DTensors, which know that. split: parameters of which
        each rank has its part."""
        self._mesh, self._whole, self._gradient, self._split = mesh, whole, gradient, split
        _RUN_ON_PARTS.update(owner for owner, _ in split)
        self._held: list[tuple[nn.Module, str, Any]] = []

    def put(self) -> None:
        for owner, key in self._whole:
            parameter = self._keep(owner, key)
            if not isinstance(parameter, DTensor):  # kept as a local tensor, see local_shards.py
                parameter = DTensor.from_local(parameter, self._mesh, [Replicate()], run_check=False)
            # Through redistribute, whose backward sums partial gradients before they reach parameter.grad: a norm over
            # gradients that are still partial would be wrong.
            replica = parameter.redistribute(placements=[Replicate()])
            local = None if self._gradient is None else replica.to_local(grad_placements=[self._gradient])
            own_parameters(owner)[key] = replica if local is None else local
        for owner, key in self._split:
            parameter = self._keep(owner, key)
            if isinstance(parameter, DTensor):
                own_parameters(owner)[key] = parameter.to_local()

    def take_back(self) -> None:
        for owner, key, parameter in self._held:
            own_parameters(owner)[key] = parameter
        self._held = []

    def _keep(self, owner: nn.Module, key: str) -> Any:
        parameter = own_parameters(owner)[key]
        self._held.append((owner, key, parameter))
        return parameter


def replicate_parameters(module: nn.Module, mesh: DeviceMesh, inside: bool = True) -> list[_Place]:
    """Make the parameters of a module, and those inside, which no style has taken yet, replicas; where they are."""
    owners = module.modules() if inside else (module,)
    places = [(owner, key) for owner in owners for key in own_parameters(owner) if _is_plain(owner, key)]
    for owner, key in places:
        whole = own_parameters(owner)[key]
        replica = DTensor.from_local(whole.detach(), mesh, [Replicate()], run_check=False)
        own_parameters(owner)[key] = nn.Parameter(replica, requires_grad=whole.requires_grad)
    return places


def split_parameter(owner: nn.Module, key: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Lay a parameter out over a mesh, each rank keeping its part of the value that it has."""
    whole = own_parameters(owner)[key]
    part = joined(whole.detach(), cut_boxes(whole.shape, mesh, [placement])).contiguous()
    split = DTensor.from_local(
        part.clone() if part.data_ptr() == whole.data_ptr() else part,
        mesh,
        [placement],
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )
    own_parameters(owner)[key] = nn.Parameter(split, requires_grad=whole.requires_grad)


def split_parameters(module: nn.Module) -> list[_Place]:
    """Where a module's own parameters are that are split."""
    return [(module, key) for key, parameter in own_parameters(module).items() if isinstance(parameter, DTensor)]


def _is_plain(owner: nn.Module, key: str) -> bool:
    """Whether a parameter is there and no style of a module further inside has taken it."""
    parameter = own_parameters(owner)[key]
    return parameter is not None and not isinstance(parameter, DTensor)
