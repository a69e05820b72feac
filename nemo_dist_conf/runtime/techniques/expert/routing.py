"""How tokens spread over the experts of a model: the loss that evens it out, and how uneven it is.

Shapes: T tokens of a forward on this rank, E experts of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.names import MeshAxisName as A

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.runtime.torch_inside import holds_experts

__all__ = ["ExpertLoad", "balancing_loss", "routed"]


@torch.no_grad()
def routed(router_logits_TE: Sequence[Tensor], top_k: int) -> Tensor:
    """How often each expert is chosen in one forward on this rank, and last how many choices were made, [E + 1].

    router_logits_TE: [T, E] of each layer. A token makes one choice a layer, of top_k experts. Add them up over
    microbatches and ranks for ``balancing_loss``.
    """
    experts = router_logits_TE[0].size(-1)
    found = torch.zeros(experts + 1, device=router_logits_TE[0].device)
    for logits in router_logits_TE:
        found[:-1] += _counts(logits.float().softmax(dim=-1).topk(top_k, dim=-1).indices, experts)
        found[-1] += logits.size(0)
    return found


def balancing_loss(router_logits_TE: Sequence[Tensor], everywhere: Tensor) -> Tensor:
    """What the tokens of one forward on this rank add to the auxiliary loss for an even load over a whole batch.

    everywhere: ``routed`` of the whole batch, all microbatches of all data and cp ranks. The sum over those is the
    number that ``load_balancing_loss_func`` of transformers gives for the whole batch; the mean of every microbatch's
    own would be another one, because it multiplies two means, and would depend on how the batch was split.
    Its gradient is that of these tokens: multiply by ``context.gradient_size`` where gradients are averaged over ranks.
    Source: Switch Transformers (arXiv:2101.03961), equations 4 to 6.
    """
    likely_E = torch.stack([logits.float().softmax(dim=-1).sum(dim=0) for logits in router_logits_TE]).sum(dim=0)
    chosen_E, count = everywhere[:-1], everywhere[-1]
    return len(chosen_E) * ((chosen_E / count) * (likely_E / count)).sum()


class ExpertLoad:
    """Counts, from now on, the tokens that each expert of a model is chosen for; the model may be wrapped."""

    def __init__(self, model: nn.Module, experts: int) -> None:
        """experts: of a layer, on all ranks together."""
        self._experts = experts
        self._modules = [module for module in model.modules() if holds_experts(module)]
        self._counts: list[Tensor | None] = [None] * len(self._modules)
        for index, module in enumerate(self._modules):
            module.register_forward_pre_hook(self._counter(index), with_kwargs=True)

    def imbalance(self, context: MeshContext) -> Tensor:
        """Tokens of the busiest expert over those of the mean one, of the most uneven layer, since the last call.

        1: all experts are chosen equally often; 0: no expert ran. Equal on every rank of the run, all of which have
        to call it, also those of a pipeline stage without experts.
        """
        counted = [counts for counts in self._counts if counts is not None]
        self._counts = [None] * len(self._modules)
        worst = torch.zeros((), device=context.device)
        if counted:
            counts_LE = context.sum_over_data(torch.stack(counted))
            worst = (counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).max()
        if context.pp_enabled and context.device_mesh is not None:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=context.device_mesh.get_group(A.PP.value))
        return worst

    def _counter(self, index: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            counts = _counts(chosen, self._experts)
            held = self._counts[index]
            self._counts[index] = counts if held is None else held + counts

        return count


@torch.no_grad()
def _counts(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert occurs, [E] float32. Not bincount: it would wait for the device."""
    ones = torch.ones(chosen.numel(), device=chosen.device)
    return torch.zeros(experts, device=chosen.device).scatter_add_(0, chosen.flatten(), ones)
