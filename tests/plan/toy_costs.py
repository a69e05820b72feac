"""A strategy of another package, as the plan sees one: its row, and costs that change one answer of the base."""

from __future__ import annotations

import dataclasses
from typing import Iterable

from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.strategies.base import Remedy, StrategyCosts
from nemo_dist_conf.strategies import Strategy, find_strategy

__all__ = ["COSTS", "toy_strategy"]


class _HalfKept(StrategyCosts):
    """Gradients of half the size between steps, and an option that would offload everything."""

    def resting(self, job: Job, parameters: int) -> tuple[int, int]:
        return parameters // 2, parameters

    def offloads(self, job: Job) -> bool:
        return bool(job.options.get("toy_offload"))

    def last_resort(self, job: Job) -> Remedy:
        return Remedy("strategy.toy_offload=true", options={"toy_offload": True})

    def notes(self, job: Job) -> Iterable[str]:
        yield "strategy.toy_offload: a toy"


COSTS = _HalfKept()


def toy_strategy(costs: str | None) -> Strategy:
    """Like ddp in all but its name and what the plan knows of it."""
    return dataclasses.replace(find_strategy("ddp"), name="toy", costs=costs)
