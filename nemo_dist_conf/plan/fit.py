"""Whether a job fits: the memory of every pipeline stage's ranks while the schedule runs, beside what a rank has."""

from __future__ import annotations

import functools
from typing import Sequence

from nemo_dist_conf.plan.activations import kept_by_stage
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.memory import Memory, memory_of
from nemo_dist_conf.plan.rank_shards import Place
from nemo_dist_conf.plan.schedule_timeline import Timeline
from nemo_dist_conf.schema.hardware import HardwareConf

__all__ = ["FITS", "NO", "TIGHT", "memories_of", "usable_bytes", "verdict_of"]

FITS, TIGHT, NO = "fits", "tight", "does not fit"
#: Above this part of the memory that is free for torch a plan is called tight.
_TIGHT = 0.9


def usable_bytes(hardware: HardwareConf) -> float:
    """Memory of a rank that torch can use."""
    return (hardware.memory_gib - hardware.reserved_gib) * 2**30


def verdict_of(memories: Sequence[Memory], hardware: HardwareConf) -> str:
    """FITS, TIGHT or NO, by the rank that needs most."""
    peak, usable = max(memory.peak for memory in memories), usable_bytes(hardware)
    return NO if peak > usable else TIGHT if peak > _TIGHT * usable else FITS


def memories_of(job: Job, timeline: Timeline | None) -> tuple[Memory, ...]:
    """Memory of the first and last rank of every pipeline rank. timeline: the schedule as it runs, with a pipeline."""
    saved = {index: kept.saved for index, kept in kept_by_stage(job).items()}
    kept = None if timeline is None else functools.partial(timeline.kept, size=saved.__getitem__)
    last = Place(job.tp - 1, job.shards - 1, job.ep - 1, job.ep_shard - 1)
    found: list[Memory] = []
    for rank in range(job.pp):
        both = [memory_of(job, rank, place, kept) for place in (Place(), last)]
        found += both if both[0] != both[1] else both[:1]
    return tuple(found)
