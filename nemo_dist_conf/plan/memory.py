"""Bytes on a rank: what rests there between steps, and the three moments of a step at which most is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from nemo_dist_conf.plan.activations import Kept, loss_bytes, stage_bytes
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.rank_shards import Place, held_elements, trained_units, units_of

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

    Parameters are stored in float32, their gradients too; the update keeps its states in the same dtype and shape, of
    what gets a gradient.
    """
    stages = job.stages_of(pp_rank)
    units = [unit for stage in stages for unit in units_of(job, stage)]
    parameters = 4 * sum(unit.count * held_elements(job, unit, place) for unit in units)
    tensors = sum(unit.count * len(unit.weights) for stage in stages for unit in trained_units(job, stage))
    gradients, states = job.costs.resting(job, _trained_bytes(job, pp_rank, place))
    return parameters, gradients, job.update.states * states + 4 * job.update.scalars * tensors


def _trained_bytes(job: Job, pp_rank: int, place: Place) -> int:
    """Bytes of the parameters that a rank trains, exact."""
    units = (unit for stage in job.stages_of(pp_rank) for unit in trained_units(job, stage))
    return 4 * sum(unit.count * held_elements(job, unit, place) for unit in units)


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
    gathered = job.costs.gathered(job, stages)
    states = parameters + optimizer
    host = 0
    if job.costs.offloads(job):
        host, states, resting_gradients = states + gradients, 0, 0
    else:
        resting_gradients = gradients
    one = max((saved[stage.index].saved // max(1, stage.layers) for stage in stages), default=0)
    earlier = _gradients_before(job, gathered.accumulated, resting_gradients)
    # Without a fused kernel the denominators of all updates are tensors of their own (torch's foreach AdamW).
    update = 0 if job.update.fused else _trained_bytes(job, pp_rank, place)
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
