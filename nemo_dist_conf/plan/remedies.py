"""What to type for a job that does not fit, without another number of ranks."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Sequence

from nemo_dist_conf.plan.fit import NO, memories_of, verdict_of
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.step_time import timeline_of
from nemo_dist_conf.plan.strategies.base import Remedy
from nemo_dist_conf.wording import assigned

__all__ = ["ways_to_fit"]

#: So many ways are enough to choose from.
_ENOUGH = 3


def ways_to_fit(job: Job) -> list[str]:
    """Words with which the job would fit, the least costly first."""
    found: list[str] = []
    for remedies in _tried(job):
        changed = _changed(job, remedies)
        if verdict_of(memories_of(changed, timeline_of(changed)), job.hardware) != NO:
            found.append(" ".join(one.words for one in remedies))
        if len(found) == _ENOUGH:
            break
    return found


def _tried(job: Job) -> Iterator[Sequence[Remedy]]:
    """Every remedy alone, then with recomputing, then all of them with the strategy's last resort."""
    modes = [mode for mode in ("selective", True) if mode in job.strategy.activation_checkpointing]
    if job.pp > 1 and job.splits_backward:
        modes = []  # a rule forbids both together
    recomputing = [
        Remedy(assigned("activation_checkpointing", mode), {"checkpointing": mode})
        for mode in modes
        if mode != job.checkpointing and (mode is True or job.checkpointing is False)
    ]
    cheaper: list[Remedy] = []
    if job.rows > 1 and job.pp == 1:
        fields = {"rows": 1, "microbatches": job.rows * job.microbatches}
        cheaper.append(Remedy("train.micro_batch_size=1", fields))
    cheaper += job.costs.remedies(job)
    yield from ([one] for one in (*cheaper, *recomputing))
    yield from ([one, other] for one in cheaper for other in recomputing)
    last = job.costs.last_resort(job)
    if last is not None:
        yield [*cheaper, *recomputing[-1:], last]


def _changed(job: Job, remedies: Sequence[Remedy]) -> Job:
    fields: dict[str, Any] = {}
    options = dict(job.options)
    for one in remedies:
        fields |= one.fields
        options |= one.options
    return dataclasses.replace(job, **fields, options=options)
