"""What strategy=fsdp2 costs: parameters gathered unit by unit, gradients reduced to shards, replicas of the shards."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Mapping, Sequence

from nemo_dist_conf.composition.resolvers import compute_dtype
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import DTYPE_BYTES, Dtypes, Job, Stage
from nemo_dist_conf.plan.rank_shards import EMBEDDING, HEAD, Unit, gathered_bytes, stage_units, trained_part
from nemo_dist_conf.plan.schedule_timeline import orders
from nemo_dist_conf.plan.strategies.base import Gathered, Remedy, StrategyCosts
from nemo_dist_conf.strategies.fsdp2 import OUTER_UNIT_ELEMENTS

__all__ = ["COSTS"]


def _is_on(policy: Mapping[str, Any] | None) -> bool:
    return bool(policy and policy.get("enabled", True))


def _reduces_at_the_end(job: Job) -> bool:
    """Whether gradients of several microbatches are reduced once, in the last one's backward."""
    return bool(job.options.get("defer_fsdp_grad_sync", True))


def _frees(job: Job, last: bool, expert: bool) -> bool:
    """Whether a block's gathered parameters are freed after forward.

    last: it is the last block of its stage. expert: of the block's experts, which have an option of their own.
    """
    if expert:
        return bool(job.moe.get("reshard_after_forward"))
    asked = job.options.get("reshard_after_forward")
    return bool(asked) if asked is not None else job.pp == 1 and not last


def _gathered_ahead(job: Job) -> int:
    """Blocks whose parameters are gathered ahead in backward; torch gathers one by itself."""
    return int(job.options["fsdp2_backward_prefetch_depth"]) if job.options.get("enable_fsdp2_prefetch") else 1


def _shard_axis(job: Job) -> str:
    if job.cp == 1:
        return "dp_shard"
    return "dp_shard_cp" if job.mesh.size("dp_shard") > 1 else "cp"


class _FSDP2Costs(StrategyCosts):
    def dtypes(self, options: Mapping[str, Any]) -> Dtypes:
        """As ``mp_policy`` has them; gradients are reduced in the dtype of parameters where it says nothing."""
        policy = options.get("mp_policy")
        if not _is_on(policy):
            return Dtypes()
        named = {key: getattr(value, "name", value) for key, value in dict(policy or {}).items()}
        param = named.get("param_dtype") or "float32"
        return Dtypes(param, named.get("reduce_dtype") or param, named.get("output_dtype"))

    def recipe_options(self, options: Mapping[str, Any], dtype: str, device: str) -> Mapping[str, Any]:
        narrow = compute_dtype(dtype, device)
        policy = {**options["mp_policy"], "param_dtype": narrow, "output_dtype": "float32"}
        return {**options, "mp_policy": policy}

    def shards(self, job: Job) -> int:
        return job.mesh.size("dp_shard") * job.cp

    def rests_sharded(self, job: Job) -> bool:
        return True

    def units(self, job: Job, stage: Stage) -> tuple[Unit, ...]:
        """A large embedding is a unit of its own, and so is the head, without stages and split experts."""
        has_outer = job.pp == 1 and job.ep == 1
        return stage_units(job.model, stage, job.ep > 1, OUTER_UNIT_ELEMENTS if has_outer else None)

    def offloads(self, job: Job) -> bool:
        return _is_on(job.options.get("offload_policy"))

    def gathered(self, job: Job, stages: Sequence[Stage]) -> Gathered:
        narrow, wide = DTYPE_BYTES[job.param_dtype], DTYPE_BYTES[job.reduce_dtype]
        asked = job.options.get("reshard_after_forward")
        keeps_whole = job.pp > 1 or (job.microbatches > 1 and _reduces_at_the_end(job))
        at_loss = in_backward = accumulated = 0
        in_block: dict[int, int] = {}
        for stage, unit in ((stage, unit) for stage in stages for unit in self.units(job, stage)):
            size = gathered_bytes(job, unit, narrow)
            trained = [(part.count, gathered_bytes(job, part, 1)) for part in trained_part(job, stage, unit)]
            whole = max((elements for _, elements in trained), default=0)
            if unit.layer == EMBEDDING:
                at_loss += size if asked is False else 0
                in_backward += size if asked is False else 0
            elif unit.layer < 0:
                at_loss += 0 if asked is True and job.pp == 1 else size
                in_backward += 0 if unit.layer == HEAD else size  # a head is done before the blocks
            else:
                kept = [not frees for frees in _freed(job, unit)]
                frees = _frees(job, False, unit.expert)
                at_loss += sum(kept) * size
                in_backward += 0 if frees else unit.count * size
                # In the backward of a block: its gradients as they come and as they are reduced, and the gathered
                # parameters of this block and of those ahead.
                once = whole * (narrow + wide) + ((1 + _gathered_ahead(job)) * size if frees else 0)
                in_block[unit.layer] = in_block.get(unit.layer, 0) + once
            accumulated += sum(count * elements for count, elements in trained) * wide if keeps_whole else 0
        return Gathered(at_loss, in_backward + max(in_block.values(), default=0), accumulated)

    def collectives(self, job: Job, stage: Stage, tp: int) -> Iterator[Collective]:
        narrow, wide = DTYPE_BYTES[job.param_dtype], DTYPE_BYTES[job.reduce_dtype]
        if job.pp > 1:
            ahead, back = _gathers_of_stage(job, stage)
            reductions = job.calls if _reduces_at_the_end(job) else job.calls * job.microbatches
        else:
            ahead = back = job.microbatches
            reductions = 1 if _reduces_at_the_end(job) else job.microbatches
        for unit in self.units(job, stage):
            axis, ranks = ("ep_shard", job.ep_shard) if unit.expert else (_shard_axis(job), job.shards)
            if ranks > 1:
                size = gathered_bytes(job, unit, narrow, tp)
                again = _gathered_again(job, unit)
                yield Collective(axis, "all_gather", unit.count * ahead, size, "forward", True, unit.title)
                yield Collective(axis, "all_gather", again * back, size, "backward", True, unit.title)
            for part in trained_part(job, stage, unit):
                size, calls = gathered_bytes(job, part, wide, tp), part.count * reductions
                if ranks > 1:
                    yield Collective(axis, "reduce_scatter", calls, size, "backward", True, unit.title)
                if job.replicas > 1 and not unit.expert:
                    size //= job.shards
                    yield Collective("dp_replicate", "all_reduce", calls, size, "backward", True, unit.title)

    def remedies(self, job: Job) -> Iterable[Remedy]:
        if job.tp > 1 and not job.sequence_parallel and job.model.experts == 0:
            yield Remedy("strategy.sequence_parallel=true", options={"sequence_parallel": True})
        if job.options.get("reshard_after_forward") is False:
            yield Remedy("strategy.reshard_after_forward=null", options={"reshard_after_forward": None})

    def last_resort(self, job: Job) -> Remedy:
        policy = {"enabled": True, "pin_memory": True}
        return Remedy("strategy.offload_policy.enabled=true", options={"offload_policy": policy})

    def notes(self, job: Job) -> Iterable[str]:
        if job.options.get("enable_async_tensor_parallel"):
            yield "strategy.enable_async_tensor_parallel: its overlap is not in the time"
        if job.follows_stream:
            yield "strategy.sequence_parallel: parts of a block that are neither a norm, an attention nor an MLP"


def _gathers_of_stage(job: Job, stage: Stage) -> tuple[int, int]:
    """How often a stage gathers its parameters in a step, (before a forward, before a backward).

    Once where they stay. Else a forward frees them, and a backward leaves them to whatever comes next.
    """
    rows = orders(job) if job.options.get("reshard_after_forward") else None
    if rows is None:
        return job.calls, job.calls
    ahead = back = 0
    is_whole = False
    for action in (action for action in rows[stage.rank] if action.stage == stage.index):
        ahead += action.kind == "F" and not is_whole
        back += action.kind != "F" and not is_whole
        is_whole = action.kind != "F"
    return ahead * job.calls, back * job.calls


def _gathered_again(job: Job, unit: Unit) -> int:
    """How many of a unit's kind free their parameters after forward and need them in backward."""
    if unit.layer == EMBEDDING:  # backward does not need it
        return 0
    if unit.layer < 0:
        return 1 if job.options.get("reshard_after_forward") else 0
    return sum(_freed(job, unit))


def _freed(job: Job, unit: Unit) -> list[bool]:
    """Of each of a unit's kind, whether its parameters are freed after forward."""
    return [_frees(job, unit.has_last and index == unit.count - 1, unit.expert) for index in range(unit.count)]


COSTS = _FSDP2Costs()
