"""Parameters that several stages of a pipeline hold: tied embeddings, and whatever the code between modules uses.

In the plain model they are one parameter, so they have its name wherever they lie. Each rank that has some has one for
optimizers, norms and checkpoints, and gets the gradient of all stages: the sum, in the order of the stages, so that
copies on different ranks take equal steps. A rank with several stages that hold one has further copies for these,
which no one sees: they are filled before each step of the pipeline, and give their gradients away after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.torch_inside import local_tensor

__all__ = ["SharedParameter", "SharedParameters", "shared_between"]


@dataclass(frozen=True)
class SharedParameter:
    """name: in the plain model; names: all that it has there. stages: that hold it, in order. elements: how many."""

    name: str
    names: tuple[str, ...]
    stages: tuple[int, ...]
    elements: int


def shared_between(model: nn.Module, held: Sequence[Iterable[str]]) -> list[SharedParameter]:
    """Parameters of the plain model, on several stages or under several names. held: names that each stage has."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    of_stage = [set(one) for one in held]
    found = []
    for parameter, alike in names.items():
        stages = tuple(stage for stage, one in enumerate(of_stage) if not one.isdisjoint(alike))
        if len(stages) > 1 or len(alike) > 1:
            found.append(SharedParameter(alike[0], tuple(alike), stages, parameter.numel()))
    return found


class SharedParameters:
    """Those of a pipeline, as this rank has them."""

    def __init__(
        self, shared: Sequence[SharedParameter], ranks: Sequence[int], parts: Mapping[int, nn.Module], mesh: DeviceMesh
    ) -> None:
        """ranks: pp rank of each stage. parts: this rank's stages."""
        self._mesh = mesh
        self._shared = [one for one in shared if len(one.stages) > 1]
        self._ranks = {one.name: list(dict.fromkeys(ranks[stage] for stage in one.stages)) for one in self._shared}
        # A stand-in has attributes of what it stands for, so the stages are asked for what they hold.
        held = {stage: {name for name, _ in part.named_parameters()} for stage, part in parts.items()}
        found = [
            (one, [(parts[s], next(filter(held[s].__contains__, one.names))) for s in one.stages if s in parts])
            for one in self._shared
        ]
        self._places = [(one, places) for one, places in found if places]
        #: Every name of each parameter with several -> that in the plain model.
        self.plain = {name: one.name for one in shared for name in one.names}

    def counted_elsewhere(self) -> set[int]:
        """ids of this rank's parameters that another rank has too, and counts in norms."""
        me = self._mesh.get_local_rank()
        return {id(own[0]) for one, own in self._own() if self._ranks[one.name][0] != me}

    def on_several_ranks(self) -> list[str]:
        """Names of those that ranks of several stages have."""
        return [name for name, ranks in self._ranks.items() if len(ranks) > 1]

    @torch.no_grad()
    def fill_copies(self) -> None:
        """Give further copies on this rank the values of the first."""
        for _, (first, *others) in self._own():
            for other in others:
                _local(other).copy_(_local(first))

    def put_aside(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients of earlier steps, which are sums already; the parameters have none then."""
        held = [(own[0], own[0].grad) for _, own in self._own() if own[0].grad is not None]
        for parameter, _ in held:
            parameter.grad = None
        return held

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give each the sum of its gradients over stages. Every rank of the pipeline calls it."""
        for one, (first, *others) in self._own():
            if not first.requires_grad:
                continue
            for other in others:
                if other.grad is not None:
                    first.grad = other.grad if first.grad is None else first.grad + other.grad
                    other.grad = None
            ranks = self._ranks[one.name]
            if len(ranks) > 1:
                if first.grad is None:
                    first.grad = torch.zeros_like(first)
                self._sum_over(_local(first.grad), ranks)

    def _sum_over(self, gradient: Tensor, ranks: Sequence[int]) -> None:
        group, me = self._mesh.get_group(), self._mesh.get_local_rank()
        sent = gradient.to(self._mesh.device_type).contiguous()  # offloaded ones are on the CPU
        parts = {rank: sent if rank == me else torch.empty_like(sent) for rank in ranks}
        others = [rank for rank in ranks if rank != me]
        if sent.numel():
            peers = {rank: dist.get_global_rank(group, rank) for rank in others}
            operations = [dist.P2POp(dist.isend, sent, peers[rank], group) for rank in others]
            operations += [dist.P2POp(dist.irecv, parts[rank], peers[rank], group) for rank in others]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        total = parts[ranks[0]].clone()
        for rank in ranks[1:]:
            total += parts[rank]
        gradient.copy_(total)

    def _own(self) -> list[tuple[SharedParameter, list[nn.Parameter]]]:
        """Shared parameters that this rank has, with its copies in the order of stages."""
        return [(one, [stage.get_parameter(name) for stage, name in places]) for one, places in self._places]


def _local(tensor: Tensor) -> Tensor:
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
