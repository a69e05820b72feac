"""What strategy=megatron_fsdp costs, by its ZeRO stage; without the padding of the library's flat buffers."""

from __future__ import annotations

from math import prod
from typing import Iterator, Sequence

from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import Job, Stage
from nemo_dist_conf.plan.rank_shards import Unit, gathered_bytes, tp_shape, trained_part
from nemo_dist_conf.plan.strategies.base import Gathered, StrategyCosts, data_group

__all__ = ["COSTS"]

#: Parameters, their gradients, and what is gathered and reduced of them are float32.
_FP32 = 4


def _zero(job: Job) -> int:
    """What is sharded: 0 nothing, 1 states of the optimizer, 2 gradients too, 3 parameters too."""
    return int(job.options.get("zero_dp_strategy", 3))


class _MegatronFSDPCosts(StrategyCosts):
    def shards(self, job: Job) -> int:
        return data_group(job)[1]

    def rests_sharded(self, job: Job) -> bool:
        return _zero(job) == 3

    def resting(self, job: Job, parameters: int) -> tuple[int, int]:
        """Stage 3 counts shards already, and stage 0 has none."""
        part, zero = -(-parameters // job.shards), _zero(job)
        return (part if zero == 2 else parameters), (part if zero in (1, 2) else parameters)

    def gathered(self, job: Job, stages: Sequence[Stage]) -> Gathered:
        """Under stage 3, what is outside of blocks, and in a block's backward the block and the one after it.

        Below stage 3 all parameters rest whole, and are counted there.
        """
        if _zero(job) != 3:
            return Gathered()
        units = [unit for stage in stages for unit in self.units(job, stage)]
        outside = sum(gathered_bytes(job, unit, _FP32) for unit in units if unit.layer < 0)
        # Parameters of two blocks, the gradients of one as they come and as they are reduced.
        block = max((4 * gathered_bytes(job, unit, _FP32) for unit in units if unit.layer >= 0), default=0)
        return Gathered(at_loss=outside, in_backward=outside + block)

    def collectives(self, job: Job, stage: Stage, tp: int) -> Iterator[Collective]:
        if job.shards == 1:
            return
        zero, steps = _zero(job), job.microbatches
        axis = data_group(job)[0]
        for unit in self.units(job, stage):
            # What is outside of units stays until the update.
            gathers = 2 * steps if zero == 3 and unit.layer >= 0 else min(zero, 1)
            size = _whole_bytes(job, unit)
            yield Collective(axis, "all_gather", unit.count * gathers, size, "forward", True, unit.title)
            kind, reductions = ("all_reduce", 1) if zero == 0 else ("reduce_scatter", steps if zero >= 2 else 1)
            for part in trained_part(job, stage, unit):
                yield Collective(
                    axis, kind, part.count * reductions, _whole_bytes(job, part), "backward", True, unit.title
                )


def _whole_bytes(job: Job, unit: Unit) -> int:
    return _FP32 * sum(prod(tp_shape(job.styles, job.tp, name, weight, 0)) for name, weight in unit.weights)


COSTS = _MegatronFSDPCosts()
