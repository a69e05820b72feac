"""How the plan plays each pipeline schedule: its order, what a rank keeps, and its bubble, as formulas of integers.

The orders of gpipe, 1f1b, interleaved_1f1b and looped_bfs are torch's, action by action; a schedule file has its own.
The three schedules that split backward have none here and are played greedily, which comes close to torch's tables.
Sources: GPipe (arXiv:1811.06965), 1F1B (arXiv:2104.04473), zero bubble (arXiv:2401.10241), torch's pipelining.

A chunk is a microbatch on one stage. Arguments: rank of ranks, its stages (or how many it has), microbatches.
"""

from __future__ import annotations

import functools
import pkgutil
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.names import SCHEDULES, Schedule
from nemo_dist_conf.topology.schedule_file import Action, ScheduleFile
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = [
    "DUALPIPE_V",
    "GPIPE",
    "INTERLEAVED_1F1B",
    "INTERLEAVED_ZERO_BUBBLE",
    "LOOPED_BFS",
    "ONE_F_ONE_B",
    "PlayedSchedule",
    "ZBV_ZERO_BUBBLE",
    "from_file",
    "planned_schedules",
    "played_schedule",
    "unknown_schedule",
]


@dataclass(frozen=True)
class PlayedSchedule:
    """What the plan needs of a schedule; ``Schedule.played`` names one.

    kept: (rank, ranks, stages a rank, microbatches) -> chunks that a rank keeps for their backward at most.
    bubble: (ranks, stages a rank) -> what a rank waits, in forwards and backwards of a microbatch through its stages.
    order: (rank, ranks, its stages, microbatches) -> its actions; None, of a schedule that splits backward: played
    greedily, with ``kept`` as the limit.
    searched: whether a search tries it; the others need more memory or time than one of those for the same layout.
    """

    kept: Callable[[int, int, int, int], int]
    bubble: Callable[[int, int], float]
    order: Callable[[int, int, Sequence[int], int], Iterator[Action]] | None = None
    searched: bool = False


# ---------------------------------------------------------------------------------------------------- orders


def _gpipe(rank: int, ranks: int, stages: Sequence[int], count: int) -> Iterator[Action]:
    for kind in "FB":
        yield from (Action(stages[0], kind, index) for index in range(count))


def _one_f_one_b(rank: int, ranks: int, stages: Sequence[int], count: int) -> Iterator[Action]:
    warmup = min(count, ranks - rank)
    yield from (Action(stages[0], "F", index) for index in range(warmup))
    for index in range(count):
        yield Action(stages[0], "B", index)
        if index + warmup < count:
            yield Action(stages[0], "F", index + warmup)


def _looped_bfs(rank: int, ranks: int, stages: Sequence[int], count: int) -> Iterator[Action]:
    for stage in stages:
        yield from (Action(stage, "F", index) for index in range(count))
    for stage in reversed(stages):
        yield from (Action(stage, "B", index) for index in reversed(range(count)))


def _interleaved(rank: int, ranks: int, stages: Sequence[int], count: int) -> Iterator[Action]:
    """Rounds of microbatches go through a rank's stages in turn. Source: torch's ScheduleInterleaved1F1B."""
    here, rounds = len(stages), max(1, count // ranks)
    in_round, total = count // rounds, here * count
    warmup = min(total, (here - 1) * in_round + 2 * (ranks - 1 - rank))
    seen: dict[tuple[str, int], int] = {}

    def take(kind: str, step: int) -> Action:
        local = step // in_round % here
        stage = stages[local if kind == "F" else here - 1 - local]
        index = seen.get((kind, stage), 0)
        seen[kind, stage] = index + 1
        return Action(stage, kind, index)

    yield from (take("F", step) for step in range(warmup))
    for step in range(total):
        if warmup + step < total:
            yield take("F", warmup + step)
        yield take("B", step)


# ---------------------------------------------------------------------------------------------------- formulas


def _all_kept(rank: int, ranks: int, stages: int, count: int) -> int:
    return stages * count


def _one_f_one_b_kept(rank: int, ranks: int, stages: int, count: int) -> int:
    return min(count, ranks - rank)


def _interleaved_kept(rank: int, ranks: int, stages: int, count: int) -> int:
    return min(count * stages, (stages - 1) * ranks + 2 * (ranks - 1 - rank) + 1)


def _v_kept(rank: int, ranks: int, stages: int, count: int) -> int:
    """As many chunks as stages in the V."""
    return min(count * stages, 2 * ranks)


def _filling(ranks: int, stages: int) -> float:
    """Source: arXiv:2104.04473, section 2.2."""
    return (ranks - 1) / stages


def _third_of_filling(ranks: int, stages: int) -> float:
    """Gradients of weights fill about two thirds of it. Source: arXiv:2401.10241."""
    return _filling(ranks, stages) * (1 / 3)


# ---------------------------------------------------------------------------------------------------- schedules

GPIPE = PlayedSchedule(_all_kept, _filling, _gpipe)
ONE_F_ONE_B = PlayedSchedule(_one_f_one_b_kept, _filling, _one_f_one_b, searched=True)
INTERLEAVED_1F1B = PlayedSchedule(_interleaved_kept, _filling, _interleaved, searched=True)
LOOPED_BFS = PlayedSchedule(_all_kept, _filling, _looped_bfs)
INTERLEAVED_ZERO_BUBBLE = PlayedSchedule(_interleaved_kept, _third_of_filling)
ZBV_ZERO_BUBBLE = PlayedSchedule(_v_kept, _third_of_filling, searched=True)
DUALPIPE_V = PlayedSchedule(_v_kept, _third_of_filling)


def from_file(file: ScheduleFile) -> PlayedSchedule:
    """A schedule file, played as it is."""

    def kept(rank: int, ranks: int, stages: int, count: int) -> int:
        now = most = 0
        for action in file.rows[rank]:
            now += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
            most = max(most, now)
        return most

    def order(rank: int, ranks: int, stages: Sequence[int], count: int) -> Iterator[Action]:
        return iter(file.rows[rank])

    return PlayedSchedule(kept, _third_of_filling if file.splits_backward else _filling, order)


# ---------------------------------------------------------------------------------------------------- by name


def played_schedule(name: str) -> PlayedSchedule:
    """The object behind ``Schedule.played``, by the option's name.

    Raises ConfigError for a schedule that names none, and for one without an order whose backward is whole, which
    cannot be played greedily: no other one's order is taken for it.
    """
    played = _of_row(SCHEDULES[name])
    if played is None:
        raise unknown_schedule(name)
    return played


@functools.cache
def _of_row(schedule: Schedule) -> PlayedSchedule | None:
    if schedule.played is None:
        return None
    played: PlayedSchedule = pkgutil.resolve_name(schedule.played)
    return played if played.order is not None or schedule.splits_backward else None


def planned_schedules() -> list[str]:
    """Option names of the schedules that the plan can play."""
    return [name for name, schedule in SCHEDULES.items() if _of_row(schedule) is not None]


def unknown_schedule(name: str) -> ConfigError:
    """The refusal of a schedule by name, the nearest of those that can be planned first."""
    return ConfigError(
        unknown_name(
            name,
            planned_schedules(),
            what=f"the plan knows no schedule {name!r}",
            asked=assigned("pipeline.pp_schedule", name),
            offer=lambda known: f"pipeline={known}",
            otherwise="pipeline=1f1b",
        )
    )
