"""Everything that is known of a job before it runs, in one object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.context_methods import method_of
from nemo_dist_conf.plan.fit import FITS, memories_of, verdict_of
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.memory import Memory
from nemo_dist_conf.plan.rank_groups import Groups, all_groups
from nemo_dist_conf.plan.remedies import ways_to_fit
from nemo_dist_conf.plan.step_time import StepTime, step_time, timeline_of
from nemo_dist_conf.plan.traffic import traffic_of

__all__ = ["Plan", "make_plan"]


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
    def verdict(self) -> str:
        return verdict_of(self.memory, self.job.hardware)

    @cached_property
    def groups(self) -> list[Groups]:
        return all_groups(self.job.mesh, self.job.hardware.ranks_per_node)

    @cached_property
    def traffic(self) -> list[Collective]:
        """Collectives of a rank of the first pipeline stage, calls of one kind added up."""
        found: dict[tuple[str, str, int, str], Collective] = {}
        for entry in traffic_of(self.job, 0):
            key = (entry.axis, entry.kind, entry.size, entry.when)
            known = found.get(key)
            calls = entry.calls + (known.calls if known else 0)
            found[key] = dataclasses.replace(entry, calls=calls)
        return list(found.values())

    def ways_out(self) -> list[str]:
        """Words that make a job fit which does not, the least costly first; none where it fits."""
        return [] if self.verdict == FITS else ways_to_fit(self.job)

    @property
    def notes(self) -> list[str]:
        """What was asked for and is not in the numbers, a sentence each."""
        job = self.job
        found = list(job.costs.notes(job))
        if isinstance(job.model, BuiltShape) and job.model.why_estimated:
            why = f"{job.model.model_type} does not run on the meta device ({job.model.why_estimated})"
            found.append(f"activations and FLOPs, which are estimates from the sizes of weights: {why}")
        if job.untrained:
            found.append("trainable: what forward and backward save where nothing before or in a layer is trained")
        found += [f"optimizer.groups: states by the {key} of a group" for key in dict.fromkeys(job.update.of_groups)]
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

    @property
    def tried(self) -> list[str]:
        """What a run tries on a small input of its own model before it starts, and refuses where it differs."""
        job, family = self.job, find_family(self.job.model.model_type)
        proven = family.proven if family is not None else frozenset()
        is_built = isinstance(job.model, BuiltShape)
        found = []
        if job.tp > 1 and (is_built or "tp" not in proven or job.follows_stream):
            source = "" if job.options.get("tp_plan") else f"; here as it was found for a small {job.model.model_type}"
            found.append(f"how layers are split over tp{source}")
        if job.cp > 1 and (is_built or "cp" not in proven):
            found.append("parts of rows over cp, and which modules are run on whole ones; here on one process alone")
        return found + (["the cut into pipeline stages"] if job.pp > 1 and is_built else [])

    @property
    def _source(self) -> dict[str, str]:
        return {"read_off": self.job.model.source} if isinstance(self.job.model, BuiltShape) else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds, counts."""
        job = self.job
        return {
            "world_size": job.mesh.world_size,
            "strategy": job.strategy.name,
            "layout": job.mesh.describe(),
            "mesh": dict(zip(job.mesh.axes, job.mesh.shape)),
            **({"context_method": method_of(job)} if job.cp > 1 else {}),
            "hardware": job.hardware.name,
            "model": {"type": job.model.model_type, "parameters": job.model.parameters, **self._source},
            "verdict": self.verdict,
            "change": self.ways_out(),
            "notes": self.notes,
            "tried": self.tried,
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
    """Memory of every pipeline rank, and the time of a step. Raises ConfigError for what cannot be planned."""
    timeline = timeline_of(job)
    memory = memories_of(job, timeline)
    return Plan(job, memory, step_time(job, {m.pp_rank: m for m in reversed(memory)}, timeline))
