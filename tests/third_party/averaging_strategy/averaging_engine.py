"""The strategy ``averaging`` at run time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from nemo_dist_conf.runtime.engines.base import Engine


class AveragingEngine(Engine):
    """The module stays as it is; its optimizer averages parameters over the axis dp."""

    name = "averaging"

    def adopt_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        group, steps = self._mesh.get_group("dp"), 0

        @torch.no_grad()
        def average(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps % self.config.every == 0:
                for parameter in model.parameters():
                    dist.all_reduce(parameter, group=group)
                    parameter.div_(group.size())

        optimizer.register_step_post_hook(average)
        return optimizer
