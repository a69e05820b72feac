"""Everything that is known of a job before it runs, in one object."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Iterator

from nemo_dist_conf.plan.activations import kept_by_stage
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.memory import Memory, memory_of
from nemo_dist_conf.plan.rank_groups import Groups, all_groups
from nemo_dist_conf.plan.rank_shards import Place
from nemo_dist_conf.plan.step_time import StepTime, step_time
from nemo_dist_conf.plan.strategies.base import Remedy
from nemo_dist_conf.plan.text_report import amount, duration, percent, table
from nemo_dist_conf.plan.traffic import traffic_of

__all__ = ["FITS", "NO", "Plan", "TIGHT", "make_plan"]

FITS, TIGHT, NO = "fits", "tight", "does not fit"
#: Above this part of the memory that is free for torch a plan is called tight.
_TIGHT = 0.9


@dataclass(frozen=True)
class Plan:
    """The plan of a job. memory: of the first and of the last rank of each pipeline stage's ranks."""

    job: Job
    memory: tuple[Memory, ...]
    step: StepTime

    @cached_property
    def most(self) -> Memory:
        return max(self.memory, key=lambda memory: memory.peak)

    @cached_property
    def least(self) -> Memory:
        return min(self.memory, key=lambda memory: memory.peak)

    @property
    def room(self) -> float:
        """Memory of a rank that torch can use [bytes]."""
        return (self.job.hardware.memory_gib - self.job.hardware.reserved_gib) * 2**30

    @property
    def verdict(self) -> str:
        return NO if self.most.peak > self.room else TIGHT if self.most.peak > _TIGHT * self.room else FITS

    @cached_property
    def groups(self) -> list[Groups]:
        return all_groups(self.job.mesh, self.job.hardware.ranks_per_node)

    @cached_property
    def traffic(self) -> list[Collective]:
        """Of a rank of the first pipeline stage, calls of one kind added up."""
        found: dict[tuple[str, str, int, str], Collective] = {}
        for entry in traffic_of(self.job, 0):
            key = (entry.axis, entry.kind, entry.size, entry.when)
            known = found.get(key)
            calls = entry.calls + (known.calls if known else 0)
            found[key] = dataclasses.replace(entry, calls=calls)
        return list(found.values())

    def ways_out(self) -> list[str]:
        """Words that make a job fit which does not, the least costly first; none where it fits."""
        if self.verdict == FITS:
            return []
        found = []
        for words, job in _smaller(self.job):
            if make_plan(job).verdict != NO:
                found.append(words)
            if len(found) == 3:
                break
        return found

    @property
    def notes(self) -> list[str]:
        """What was asked for and is not in the numbers, a sentence each."""
        job = self.job
        found = list(job.costs.notes(job))
        policy = job.moe.get("mp_policy")
        changed = {
            "lm_head_precision": job.moe.get("lm_head_precision") is not None,
            "wrap_outer_model": job.moe.get("wrap_outer_model") is False,
            "mp_policy": bool(policy and policy.get("enabled")),
        }
        if job.ep > 1:
            asked = [key for key, is_changed in changed.items() if is_changed]
            found += [f"moe.{key}: its units and dtypes are not in memory and traffic" for key in asked]
        return found

    def table(self, formulas: bool = False) -> str:
        return table(self, formulas)

    def short(self) -> str:
        """One line: memory, time and verdict."""
        job, step = self.job, self.step
        return (
            f"{amount(self.most.peak)} of {job.hardware.memory_gib:g} GiB ({self.verdict}), "
            f"{duration(step.seconds)} a step, {step.tokens_per_second:,.0f} tokens/s, MFU {percent(step.mfu)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds, counts."""
        job = self.job
        return {
            "world_size": job.mesh.world_size,
            "strategy": job.strategy.name,
            "layout": job.mesh.describe(),
            "mesh": dict(zip(job.mesh.axes, job.mesh.shape)),
            "hardware": job.hardware.name,
            "model": {"type": job.model.model_type, "parameters": job.model.parameters},
            "verdict": self.verdict,
            "change": self.ways_out(),
            "notes": self.notes,
            "memory_bytes": [dataclasses.asdict(memory) for memory in self.memory],
            "groups": [
                {"axis": g.axis, "size": g.size, "count": g.count, "nodes": g.nodes, "first": g.members(0)[:64]}
                for g in self.groups
            ],
            "traffic": [
                {"axis": e.axis, "kind": e.kind, "calls": e.calls, "bytes": e.bytes, "when": e.when, "why": e.why}
                for e in self.traffic
            ],
            "step_seconds": self.step.seconds,
            "seconds_by_part": dict(self.step.parts),
            "bubble": self.step.bubble,
            "mfu": self.step.mfu,
            "tokens_per_second": self.step.tokens_per_second,
        }


def make_plan(job: Job) -> Plan:
    """Memory of the first and last rank of every pipeline rank, and the time of a step."""
    first = step_time(job)
    saved = {index: kept.saved for index, kept in kept_by_stage(job).items()}
    timeline = first.timeline
    kept = None if timeline is None else functools.partial(timeline.kept, size=saved.__getitem__)
    last = Place(job.tp - 1, job.shards - 1, job.ep - 1, job.ep_shard - 1)
    memory: list[Memory] = []
    for rank in range(job.pp):
        both = [memory_of(job, rank, place, kept) for place in (Place(), last)]
        memory += both if both[0] != both[1] else both[:1]
    return Plan(job, tuple(memory), step_time(job, {m.pp_rank: m for m in reversed(memory)}, first.timeline))


def _smaller(job: Job) -> Iterator[tuple[str, Job]]:
    """Changes that save memory without another number of ranks, alone, two together, and last all of them."""
    modes = [mode for mode in ("selective", True) if mode in job.strategy.activation_checkpointing]
    if job.pp > 1 and job.splits_backward:
        modes = []  # a rule forbids both together
    recomputing = [
        Remedy(f"activation_checkpointing={str(mode).lower()}", {"checkpointing": mode})
        for mode in modes
        if mode != job.checkpointing and (mode is True or job.checkpointing is False)
    ]
    cheaper: list[Remedy] = []
    if job.rows > 1 and job.pp == 1:
        fields = {"rows": 1, "microbatches": job.rows * job.microbatches}
        cheaper.append(Remedy("train.micro_batch_size=1", fields))
    cheaper += job.costs.remedies(job)
    tried = [[one] for one in (*cheaper, *recomputing)]
    tried += [[one, other] for one in cheaper for other in recomputing]
    last = job.costs.last_resort(job)
    if last is not None:
        tried.append([*cheaper, *recomputing[-1:], last])
    for together in tried:
        yield " ".join(one.words for one in together), _changed(job, together)


def _changed(job: Job, remedies: list[Remedy]) -> Job:
    fields: dict[str, Any] = {}
    options = dict(job.options)
    for one in remedies:
        fields |= one.fields
        options |= one.options
    return dataclasses.replace(job, **fields, options=options)
