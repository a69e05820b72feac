"""Styles of modules whose code runs on parts of their weights, and of what the ranks then have in parts.

Tensors are plain between modules: what each rank has in full, or its part of a sum. [batch, seq, hidden], or
[tokens, hidden] among experts.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from nemo_dist_conf.runtime.model.shard_boxes import cut_boxes
from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind
from nemo_dist_conf.runtime.techniques.tensor.local_parameters import (
    LocalParameters,
    replicate_parameters,
    split_parameter,
    split_parameters,
)
from nemo_dist_conf.runtime.torch_inside import own_parameters
from nemo_dist_conf.runtime.torch_inside.styles import Style, packed_shard

__all__ = ["Experts", "LatentProjection", "OwnOutput", "OwnPart", "PackedLinear", "Shared", "SplitParameter", "Summed"]


class SplitParameter(Style):
    """One parameter of a module is split, and nothing else; what stands around it has to know."""

    def __init__(self, key: str, placement: Placement) -> None:
        self.key, self.placement = key, placement

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split_parameter(module, self.key, device_mesh, self.placement)
        return module


class OwnPart(Style):
    """Parameters of a module's own that are split are the rank's part to its code."""

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _run_on_parts(module, LocalParameters(device_mesh, [], Replicate(), split_parameters(module)))
        return module


class Experts(Style):
    """A part of the hidden width of every expert: what a rank computes is its part of a sum, which is taken once.

    The module takes tokens and routing weights that every rank has in full; their gradients are summed. So are those of
    weights inside that are not split.
    """

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split = split_parameters(module)
        whole = replicate_parameters(module, device_mesh)
        _run_on_parts(module, LocalParameters(device_mesh, whole, Partial(), split))

        _change_input(module, lambda x: _with_summed_gradient(x, device_mesh))
        _change_output(module, lambda x: _summed(x, device_mesh))
        return module


class Summed(Style):
    """What the ranks return, each its part, is summed; a module with split parameters of its own runs on parts."""

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if split_parameters(module):
            return Experts().parallelized(module, device_mesh)
        _change_output(module, lambda x: _summed(x, device_mesh))
        return module


class Shared(Style):
    """What every rank is given in full is divided by their number, because what it returns is summed further out."""

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _change_input(module, lambda x: x / device_mesh.size() if isinstance(x, Tensor) else x)
        return module


class OwnOutput(Style):
    """What a module returns is no view of a DTensor, which autograd lets nobody write into."""

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _change_output(module, lambda x: x.clone())
        return module


class LatentProjection(Style):
    """A projection to a latent vector and, last, to the key's rotary part, both of which every rank has in full.

    Ranks of split heads each give a part of the rotary part's gradient, which is summed here; that of the latent vector
    is summed by the projection that it enters.
    """

    def __init__(self, rotary: int) -> None:
        """rotary: the last outputs, that go to the heads as they are."""
        self.rotary = rotary

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def leave(x: Tensor) -> Tensor:
            latent, rotary = x.split([x.size(-1) - self.rotary, self.rotary], dim=-1)
            return torch.cat([latent, _with_summed_gradient(rotary, device_mesh)], dim=-1)

        _change_output(module, leave)
        return module


class PackedLinear(Style):
    """A linear layer that is several in one: a rank has its part of the output features of each, side by side.

    Its bias is every rank's in full, of which the layer takes the rank's part.
    """

    def __init__(self, packed: int) -> None:
        self.packed = packed

    def parallelized(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        own, turned = own_parameters(module), layer_kind(module) == "Conv1D"  # then its weight is [input, output]
        boxes = cut_boxes(own["weight"].shape[int(turned) :][:1], device_mesh, [packed_shard(0, self.packed)])
        split_parameter(module, "weight", device_mesh, packed_shard(int(turned), self.packed))
        if turned:
            module.nf //= device_mesh.size()  # of which its code makes the shape of what it returns
        split = split_parameters(module)
        parameters = LocalParameters(device_mesh, replicate_parameters(module, device_mesh), Partial(), split)
        _run_on_parts(module, parameters)
        if own.get("bias") is not None:

            def enter(*_: Any) -> None:
                own["bias"] = torch.cat([one.box.of(own["bias"]) for one in boxes])

            module.register_forward_pre_hook(enter)
        _change_input(module, lambda x: _with_summed_gradient(x, device_mesh))
        return module


def _run_on_parts(module: nn.Module, parameters: LocalParameters) -> None:
    module.register_forward_pre_hook(lambda *_: parameters.put())
    module.register_forward_hook(lambda *_: parameters.take_back(), always_call=True)


def _change_input(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Let each argument of a module be another."""

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(change, args)), {key: change(value) for key, value in kwargs.items()}

    module.register_forward_pre_hook(enter, with_kwargs=True)


def _change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let the tensor that a module returns, or the first of several, be another."""

    def leave(_: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        return output

    module.register_forward_hook(leave)


def _with_summed_gradient(x: Any, mesh: DeviceMesh) -> Any:
    """A tensor that every rank has in full, as a plain one; its gradient, of which each rank has a part, is summed."""
    if not isinstance(x, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
        return x.full_tensor() if isinstance(x, DTensor) else x
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of what each rank has, which all of them then have."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
