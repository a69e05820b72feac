"""Averages of gradients that no wrapper reduces: of parameters that every rank holds whole."""

from __future__ import annotations

from typing import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.runtime.torch_inside import after_backward, number_of_backward

__all__ = ["Averaged"]


class Averaged:
    """Makes gradients of whole parameters the mean over ranks, at the end of every backward that gives them some.

    The whole of a gradient is averaged each time, what an earlier backward has accumulated included: a mean of means
    is that mean again, so one backward or many, with or without reduction in between, end in the same numbers.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        groups: Sequence[dist.ProcessGroup],
        is_needed: Callable[[], bool] = lambda: True,
        few: bool = False,
    ) -> None:
        """parameters: those that there are now, in the same order on every rank. groups: the mean is taken over one
        after the other. is_needed: asked once in each backward. few: send all of them each time, without asking first
        which ones have a gradient anywhere, which waits for the device."""
        self._parameters, self._groups, self._is_needed, self._few = parameters, groups, is_needed, few
        self._watched: list[nn.Parameter] = []
        self._due_in: int | None = None
        self._ranks = 1
        for group in groups:
            self._ranks *= group.size()

    def watch(self) -> None:
        """From now on, average at the end of each backward. Parameters may have been replaced since the last call."""
        found = self._trained()
        if len(found) == len(self._watched) and all(a is b for a, b in zip(found, self._watched)):
            return
        known = {id(parameter) for parameter in self._watched}
        for parameter in found:
            if id(parameter) not in known:
                parameter.register_post_accumulate_grad_hook(self._note)
        self._watched = found

    def move_to(self, device: torch.device) -> None:
        """Let parameters that have values be where the model computes; those that FSDP has it moves itself."""
        for parameter in self._parameters():
            if not parameter.is_meta and parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)

    @torch.no_grad()
    def average(self) -> None:
        """Make all gradients that some rank has the mean over ranks; a rank that has none counts as zeros."""
        parameters = self._trained()
        if not parameters or self._ranks == 1:
            return
        parameters = parameters if self._few else self._with_gradient(parameters)
        missing = [parameter for parameter in parameters if parameter.grad is None]
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        absent = {id(parameter) for parameter in missing}
        dense = [p for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
        for dtype in dict.fromkeys(parameter.dtype for parameter in dense):
            several = [parameter for parameter in dense if parameter.dtype == dtype]
            there = torch.tensor([id(p) not in absent for p in several], dtype=dtype, device=several[0].device)
            self._average_dense(several, there, absent)
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                parameter.grad = self._sum(parameter.grad.coalesce()) / self._ranks

    def _average_dense(self, parameters: Sequence[nn.Parameter], there: Tensor, absent: set[int]) -> None:
        """there: for each of the parameters, 1 where this rank has a gradient of it."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self._sum(torch.cat([*(gradient.reshape(-1) for gradient in gradients), there])) / self._ranks
        *parts, anywhere = flat.split([*(gradient.numel() for gradient in gradients), len(parameters)])
        for gradient, part in zip(gradients, parts):
            gradient.copy_(part.view(gradient.shape))
        for index, parameter in enumerate(parameters):
            if id(parameter) in absent and not anywhere[index]:
                parameter.grad = None

    def _with_gradient(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of which some rank has a gradient."""
        mine = [parameter.grad is not None for parameter in parameters]
        held = torch.tensor(mine, dtype=torch.uint8, device=parameters[0].device)
        for group in self._groups:
            dist.all_reduce(held, dist.ReduceOp.MAX, group=group)
        return [parameter for parameter, is_held in zip(parameters, held.tolist()) if is_held]

    def _sum(self, tensor: Tensor) -> Tensor:
        for group in self._groups:
            dist.all_reduce(tensor, group=group)
        return tensor

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _note(self, parameter: Tensor) -> None:
        backward = number_of_backward()  # one that ended in an error has averaged nothing
        if self._due_in != backward:
            self._due_in = backward
            if self._is_needed():
                after_backward(self.average)
