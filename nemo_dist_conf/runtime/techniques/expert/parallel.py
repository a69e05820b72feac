"""Expert parallelism: each rank of the axis ep holds some of a layer's experts, and tokens travel to their experts.

The exchange is transformers' own (transformers/distributed/expert_parallel.py, all-to-all): it works on any mesh, on
NCCL and gloo, and its gradients are those of one process. What is ours is what surrounds it here: experts lie on a mesh
of their own (ep_shard, ep) over the same ranks, fully_shard splits them over ep_shard, and their gradients, which hold
the tokens of all ranks already, are divided by the number of those once (docs/decisions/0008-expert-parallelism.md).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.families.styles import match_pattern
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.model.base_model import base_prefix
from nemo_dist_conf.runtime.torch_inside import is_view, own_parameters, split_experts
from nemo_dist_conf.runtime.typed_configs import MoEParallelizerConfig

__all__ = ["SplitExperts", "apply_expert_parallel", "find_experts", "keep_routing"]

log = logging.getLogger(__name__)

_STYLE = "ep_dispatch_experts"


@dataclass(frozen=True)
class SplitExperts:
    """Modules that hold experts split over the axis ep, and how they are sharded beside the rest.

    mesh: the axis ep_shard.
    """

    modules: Sequence[nn.Module]
    mesh: DeviceMesh
    config: MoEParallelizerConfig


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a layer's experts, by name: those that the model's own plan sends tokens to."""
    plan = _plan(model)
    return {name: model.get_submodule(name) for name, style in plan.items() if style == _STYLE}


def apply_expert_parallel(
    model: nn.Module, moe_mesh: DeviceMesh, tp_mesh: DeviceMesh, gradient_size: int
) -> dict[str, nn.Module]:
    """Split the experts of a transformers model over the axis ep of ``moe_mesh``, in place; returns them by name.

    tp_mesh: ranks that hold the same tokens. gradient_size: ranks over which all other gradients are averaged; those
    of experts hold the tokens of all of them in sum, and are divided by their number here.
    Parameters of experts [experts, out, in] become DTensors with Shard(0).
    Raises ConfigError for a model without a plan for its experts, and where ep does not divide them.
    """
    ep_mesh = moe_mesh[A.EP.value]
    experts, plan = find_experts(model), _plan(model)
    if not experts:
        what = f"ep_size={ep_mesh.size()}: {type(model).__name__} has no experts that can be split"
        asked, allowed = f"parallelism.ep_size={ep_mesh.size()}", "a mixture-of-experts model of transformers"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="parallelism.ep_size=1"))
    counts = {getattr(module, "num_experts", 0) for module in experts.values()}
    odd = [count for count in counts if count % ep_mesh.size()]
    if odd:
        what = f"ep_size={ep_mesh.size()} does not divide the model's {odd[0]} experts"
        asked, allowed = f"parallelism.ep_size={ep_mesh.size()}", f"a divisor of {odd[0]}"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="parallelism.ep_size=1"))
    if not split_experts(model, ep_mesh, tp_mesh, plan):
        what = "this version of transformers has no expert parallelism"
        asked = f"parallelism.ep_size={ep_mesh.size()}"
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="transformers 5.23 or newer", instead="pip install -U transformers")
        )
    for module in experts.values():
        module.forward = _Averaged(module, module.forward, gradient_size)
    log.info("expert parallel over %d ranks: %d layers of %d experts", ep_mesh.size(), len(experts), max(counts))
    return experts


def keep_routing(model: nn.Module, experts: Iterable[str]) -> None:
    """Let activation checkpointing save which experts were chosen (its policy names torch.topk), in place.

    Routers of transformers divide the chosen scores in place, which a saved tensor does not allow.
    """
    for name in experts:
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        parent.forward = _OwnTopK(parent.forward)


class _Averaged:
    """The forward of a module whose gradients are divided by a number as they are made.

    Not fully_shard's divide factor: where ep_shard is 1 there is no reduction to apply it in.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], count: int) -> None:
        self.module, self.forward, self.count = module, forward, count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = own_parameters(self.module)
        held = dict(parameters)
        averaged = {name: _Divided.apply(p, self.count) for name, p in held.items() if p is not None}
        parameters.update(averaged)
        try:
            output = self.forward(*args, **kwargs)
        finally:
            parameters.update(held)
        # Gathered over tp it is a view, into which autograd lets nobody add the output of shared experts.
        return output.clone() if is_view(output) else output


class _Divided(torch.autograd.Function):
    """The tensor itself; its gradient divided."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, count: int) -> Tensor:
        ctx.count = count
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.count, None


class _OwnTopK:
    """A forward in which what torch.topk returned may be changed in place."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _CopiedTopK():
            return self.forward(*args, **kwargs)


class _CopiedTopK(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return torch.return_types.topk((out[0].clone(), out[1])) if func is torch.topk else out


def _plan(model: nn.Module) -> dict[str, str]:
    """Style by the full name of each module and parameter that the expert-parallel plan means.

    That is the one in the family's row, else ``base_model_ep_plan`` of the model's config.
    """
    config: Any = getattr(model, "config", None)
    family = find_family(getattr(config, "model_type", None))
    patterns = (family and family.expert_plan) or getattr(config, "base_model_ep_plan", None) or {}
    base = base_prefix(model, patterns)
    prefix = f"{base}." if base else ""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    found = {
        name: style
        for pattern, style in patterns.items()
        for name in names
        if match_pattern(f"{prefix}{pattern}", name)
    }
    # Innermost first: what sends the tokens asks its module how many experts are left on this rank.
    return dict(sorted(found.items(), key=lambda entry: -entry[0].count(".")))
