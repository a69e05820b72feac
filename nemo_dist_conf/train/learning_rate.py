"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.recipe.value_checks import schedule_problems

__all__ = ["FINAL_FRACTION", "LearningRate"]

#: Where the cosine ends, as a fraction of the optimizer's learning rate.
FINAL_FRACTION = 0.1


class LearningRate:
    """Multiplies the optimizer's own learning rates (each group's) by a factor of the step.

    The factor has no state, so a resumed run needs nothing but the number of its step.
    """

    def __init__(self, schedule: str, *, steps: int, warmup_steps: int = 0) -> None:
        """schedule: constant, or cosine (down to FINAL_FRACTION at the last step). Both start with a linear warmup.

        warmup_steps: the factor of step s < warmup_steps is (s + 1) / warmup_steps; 0: none.
        Raises ConfigError for an unknown name, or a warmup that is not a whole number from 0 on.
        """
        ConfigError.raise_if(schedule_problems(schedule, warmup_steps, steps))
        self.schedule = schedule
        self.steps = steps
        self.warmup_steps = warmup_steps

    def factor(self, step: int) -> float:
        """The factor of a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        span = max(1, self.steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set the learning rates for a step; returns that of the first group.

        A group's own rate is kept under ``initial_lr``, where torch's schedulers keep it too.
        """
        groups: list[dict[str, Any]] = [group for group in optimizer.param_groups if "lr" in group]
        for group in groups:
            base = float(group.setdefault("initial_lr", float(group["lr"])))
            if hasattr(group["lr"], "fill_"):  # a tensor, as capturable optimizers have it
                group["lr"].fill_(base * self.factor(step))
            else:
                group["lr"] = base * self.factor(step)
        return float(groups[0]["lr"]) if groups else 0.0
