"""A pipeline schedule played through: who computes what when, how long a rank waits, what it keeps meanwhile.

In the order that its row names (plan/schedule_orders.py). One without an order is played greedily: a gradient for a
neighbour first, then a forward where memory allows, then gradients of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Mapping, Sequence

from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.topology.schedule_file import Action

__all__ = ["Costs", "Slot", "Timeline", "orders", "play"]


@dataclass(frozen=True)
class Costs:
    """Seconds of a stage's forward and backward for a microbatch; hop: of handing a tensor to another rank."""

    forward: Mapping[int, float]
    backward: Mapping[int, float]
    hop: float = 0.0

    def of(self, action: Action) -> float:
        """Gradients of inputs and of weights are half of a backward each."""
        if action.kind == "F":
            return self.forward[action.stage]
        return self.backward[action.stage] * (1.0 if action.kind == "B" else 0.5)


@dataclass(frozen=True)
class Slot:
    """An action of a rank, from start to end [s]."""

    rank: int
    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A schedule as it runs. seconds: until the last rank is done. bubble: part of the ranks' time spent waiting."""

    slots: tuple[Slot, ...]
    seconds: float
    bubble: float

    def kept(self, rank: int, size: Callable[[int], int]) -> int:
        """The most that a rank keeps at a time. size: of a microbatch's activations on a stage, by the stage."""
        held = most = 0
        for slot in self.slots:
            if slot.rank != rank:
                continue
            if slot.action.kind == "F":
                held += size(slot.action.stage)
                most = max(most, held)
            elif slot.action.kind in "BW":
                held -= size(slot.action.stage)
        return most


def orders(job: Job) -> list[list[Action]] | None:
    """The actions of every pipeline rank in the order that torch runs them; None for a schedule played greedily.

    Raises ConfigError for a schedule that the plan does not know.
    """
    order = job.played.order
    if order is None:
        return None
    return [
        list(order(rank, job.pp, [stage.index for stage in job.stages_of(rank)], job.microbatches))
        for rank in range(job.pp)
    ]


def play(job: Job, costs: Costs) -> Timeline:
    """The schedule of a job, with every action as early as its rank and its inputs allow."""
    found = orders(job)
    slots = _played(job, costs, found) if found is not None else _greedy(job, costs)
    seconds = max(slot.end for slot in slots)
    busy = sum(slot.end - slot.start for slot in slots)
    ranks = job.pp
    return Timeline(tuple(slots), seconds, 1.0 - busy / (ranks * seconds) if seconds else 0.0)


def _needs(action: Action, stages: int) -> tuple[tuple[int, str, int], ...]:
    """What has to be done before, as (stage, F or a finished backward of inputs, microbatch)."""
    stage, index = action.stage, action.microbatch
    if action.kind == "F":
        return ((stage - 1, "F", index),) if stage else ()
    if action.kind == "W":
        return ((stage, "B", index),)
    return ((stage, "F", index), (stage + 1, "B", index)) if stage + 1 < stages else ((stage, "F", index),)


def _done_as(action: Action) -> tuple[int, str, int] | None:
    return None if action.kind == "W" else (action.stage, "F" if action.kind == "F" else "B", action.microbatch)


def _ready_at(job: Job, costs: Costs, action: Action, done: Mapping[tuple[int, str, int], float]) -> float | None:
    """When its inputs are there; None: not all of them are made yet."""
    at = 0.0
    for need in _needs(action, len(job.stages)):
        if need not in done:
            return None
        hop = 0.0 if job.stages[need[0]].rank == job.stages[action.stage].rank else costs.hop
        at = max(at, done[need] + hop)
    return at


def _played(job: Job, costs: Costs, rows: Sequence[Sequence[Action]]) -> list[Slot]:
    done: dict[tuple[int, str, int], float] = {}
    slots: list[Slot] = []
    free, position = [0.0] * len(rows), [0] * len(rows)
    waiting = list(range(len(rows)))
    while waiting:
        moved = False
        for rank in waiting:
            row = rows[rank]
            while position[rank] < len(row):
                action = row[position[rank]]
                at = _ready_at(job, costs, action, done)
                if at is None:
                    break
                slot = Slot(rank, max(at, free[rank]), max(at, free[rank]) + costs.of(action), action)
                slots.append(slot)
                free[rank], moved = slot.end, True
                position[rank] += 1
                mark = _done_as(action)
                if mark is not None:
                    done[mark] = slot.end
        waiting = [rank for rank in waiting if position[rank] < len(rows[rank])]
        if waiting and not moved:
            raise AssertionError(f"rank {waiting[0]} would wait for ever")
    return slots


def _greedy(job: Job, costs: Costs) -> list[Slot]:
    """Each free rank takes the first of: a gradient that a neighbour waits for, a forward, gradients of weights.

    A rank keeps no more chunks than the schedule's paper allows.
    """
    ranks, count = job.pp, job.microbatches
    held = [[stage.index for stage in job.stages_of(rank)] for rank in range(ranks)]
    limits = [job.played.kept(rank, ranks, len(held[rank]), count) for rank in range(ranks)]
    done: dict[tuple[int, str, int], float] = {}
    following = {stage.index: {"F": 0, "I": 0, "W": 0} for stage in job.stages}
    free, kept = [0.0] * ranks, [0] * ranks
    slots: list[Slot] = []
    left = [3 * count * len(stages) for stages in held]
    candidates: list[tuple[float, int, int, Action] | None] = [None] * ranks
    changed = set(range(ranks))
    while any(left):
        for rank in changed:
            ready = [
                (max(at, free[rank]), order, action.microbatch, action)
                for order, action in _choices(held[rank], following, count, kept[rank] < limits[rank])
                if (at := _ready_at(job, costs, action, done)) is not None
            ]
            candidates[rank] = min(ready, key=lambda entry: entry[:3], default=None)
        best = min(((entry[:3], rank) for rank, entry in enumerate(candidates) if entry is not None), default=None)
        if best is None:
            raise AssertionError("no rank can go on")
        rank = best[1]
        found = candidates[rank]
        assert found is not None
        start, action = found[0], found[3]
        slot = Slot(rank, start, start + costs.of(action), action)
        slots.append(slot)
        following[action.stage][action.kind] += 1
        free[rank] = slot.end
        left[rank] -= 1
        kept[rank] += {"F": 1, "I": 0, "W": -1}[action.kind]
        mark = _done_as(action)
        if mark is not None:
            done[mark] = slot.end
        # Only this rank and those of the stages beside it can have got something to do.
        beside = (action.stage - 1, action.stage + 1)
        changed = {rank, *(job.stages[stage].rank for stage in beside if 0 <= stage < len(job.stages))}
    return slots


def _choices(
    stages: Sequence[int], following: Mapping[int, Mapping[str, int]], count: int, may_keep: bool
) -> Iterator[tuple[int, Action]]:
    """(order of preference, action) of what a rank could do next; on later stages first, which frees memory."""
    for stage in reversed(stages):
        ahead = following[stage]
        if ahead["I"] < ahead["F"]:
            yield 0, Action(stage, "I", ahead["I"])
        # Without room for the forward that its oldest microbatch waits for, a rank would never free anything.
        if ahead["F"] < count and (may_keep or stage == max(stages)):
            yield 1, Action(stage, "F", ahead["F"])
        if ahead["W"] < ahead["I"]:
            yield 2, Action(stage, "W", ahead["W"])
