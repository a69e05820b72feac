"""Bytes on a rank: what rests there between steps, and the three moments of a step at which most is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from nemo_dist_conf.plan.activations import Kept, loss_bytes, stage_bytes
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage
from nemo_dist_conf.plan.rank_shards import EMBEDDING, HEAD, Place, gathered_bytes, held_elements, units_of

__all__ = ["Memory", "memory_of", "resting_bytes"]

_GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The first three rest between steps; gradients do from a backward to the update.

    activations: saved by the microbatches in flight. gathered: parameters made whole, and gradients that wait to be
    reduced, when most of it is there. working: of the block or loss that is being computed. moment: when the sum is
    largest: ``loss``, ``backward`` or ``update``. peak: the sum at that moment, on the device.
    """

    pp_rank: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    working: int
    peak: int
    moment: str
    host: int = 0

    @property
    def peak_gib(self) -> float:
        return self.peak / _GIB


def resting_bytes(job: Job, pp_rank: int, place: Place) -> tuple[int, int, int]:
    """(parameters, gradients, optimizer state) of a rank, exact.

    Parameters are stored in float32, their gradients too; the update keeps its states in the same dtype and shape.
    """
    elements = tensors = 0
    for stage in job.stages_of(pp_rank):
        for unit in units_of(job, stage):
            elements += unit.count * held_elements(job, unit, place)
            tensors += unit.count * len(unit.weights)
    parameters = 4 * elements
    gradients = states = parameters
    if job.strategy == "megatron_fsdp":
        zero = job.options.get("zero_dp_strategy", 3)
        gradients = parameters if zero in (0, 3) else -(-parameters // job.shards) if zero == 2 else parameters
        states = parameters if zero in (0, 3) else -(-parameters // job.shards)
    return parameters, gradients, job.update.states * states + 4 * job.update.scalars * tensors


@dataclass(frozen=True)
class _Gathered:
    """Bytes of whole parameters and unreduced gradients: at the loss, and while backward is in a block."""

    at_loss: int
    in_backward: int
    accumulated: int


def _gathered(job: Job, stages: list[Stage]) -> _Gathered:
    if job.strategy == "ddp":
        # Buckets are copies of all gradients, unless gradients live in them; one rank has none.
        none = job.data_size == 1 or job.options.get("gradient_as_bucket_view")
        buckets = 0 if none else 4 * job.model.parameters
        return _Gathered(buckets, buckets, 0)
    narrow, wide = DTYPE_BYTES[job.param_dtype], DTYPE_BYTES[job.reduce_dtype]
    at_loss = in_backward = accumulated = 0
    in_block: dict[int, int] = {}
    for stage in stages:
        for unit in units_of(job, stage):
            size = gathered_bytes(job, unit, narrow)
            whole = gathered_bytes(job, unit, 1)
            if unit.layer == EMBEDDING:
                kept_whole = job.options.get("reshard_after_forward") is False
                at_loss += size if kept_whole else 0
                in_backward += size if kept_whole else 0
            elif unit.layer < 0:
                freed = job.options.get("reshard_after_forward") is True and job.pp == 1
                at_loss += 0 if freed else size
                in_backward += 0 if unit.layer == HEAD else size  # a head is done before the blocks
            else:
                kept = [not job.reshards(index == unit.count - 1, unit.expert) for index in range(unit.count)]
                frees = job.reshards(False, unit.expert)
                at_loss += sum(kept) * size
                in_backward += 0 if frees else unit.count * size
                # In the backward of a block: its gradients as they come and as they are reduced, and the gathered
                # parameters of this block and of those ahead.
                once = whole * (narrow + wide) + ((1 + job.prefetch_depth) * size if frees else 0)
                in_block[unit.layer] = in_block.get(unit.layer, 0) + once
            if job.splits_steps or job.pp > 1:
                accumulated += unit.count * whole * wide
    if job.strategy == "megatron_fsdp" and job.options.get("zero_dp_strategy") != 3:
        return _Gathered(0, 0, 0)
    return _Gathered(at_loss, in_backward + max(in_block.values(), default=0), accumulated)


def memory_of(job: Job, pp_rank: int, place: Place, kept: Callable[[int], int] | None = None) -> Memory:
    """What a rank holds.

    kept: activations in flight on a pipeline rank (schedule.Timeline.kept), None: one microbatch's.
    """
    parameters, gradients, optimizer = resting_bytes(job, pp_rank, place)
    stages = job.stages_of(pp_rank)
    saved: dict[int, Kept] = {stage.index: stage_bytes(job, stage) for stage in stages}
    in_flight = sum(saved[stage.index].saved for stage in stages) if kept is None else kept(pp_rank)
    recomputed = max((saved[stage.index].working for stage in stages), default=0)
    has_loss = any("final_norm" in stage.outer for stage in stages)
    loss = loss_bytes(job)[1] if has_loss else 0
    gathered = _gathered(job, stages)
    states = parameters + optimizer
    host = 0
    if _offloaded(job):
        host, states, resting_gradients = states + gradients, 0, 0
    else:
        resting_gradients = gradients
    one = max((saved[stage.index].saved // max(1, stage.layers) for stage in stages), default=0)
    earlier = _gradients_before(job, gathered.accumulated, resting_gradients)
    # Without a fused kernel the denominators of all updates are tensors of their own (torch's foreach AdamW).
    update = 0 if job.update.fused else parameters
    moments = {
        "loss": (states + in_flight + gathered.at_loss + earlier, loss),
        # The first block to go backward: all activations but those of the loss; the last one: all gradients.
        "backward": (states + gathered.in_backward + max(earlier, resting_gradients) + one, recomputed),
        "update": (states + resting_gradients, 0 if host else update),
    }
    without_loss = in_flight - (loss_bytes(job)[0] if has_loss else 0)
    moments["first block"] = (states + without_loss + gathered.in_backward + earlier, recomputed)
    moment = max(moments, key=lambda name: sum(moments[name]))
    base, working = moments[moment]
    return Memory(
        pp_rank,
        parameters,
        gradients,
        optimizer,
        in_flight,
        gathered.accumulated + (gathered.at_loss if moment == "loss" else gathered.in_backward),
        working,
        base + working,
        "backward" if moment == "first block" else moment,
        host,
    )


def _gradients_before(job: Job, accumulated: int, resting: int) -> int:
    """Gradients of earlier microbatches that are there at a later one's loss."""
    if job.pp > 1:  # of this call whole, of earlier calls reduced
        return accumulated + (resting if job.calls > 1 else 0)
    if accumulated:
        return accumulated
    return resting if job.microbatches > 1 else 0


def _offloaded(job: Job) -> bool:
    policy = job.options.get("offload_policy")
    return bool(policy and policy.get("enabled", True))
