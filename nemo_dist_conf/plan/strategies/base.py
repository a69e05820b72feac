"""What the plan asks of a strategy, and the answers of one that keeps the whole model on every rank.

Another package's strategy names an object of its own in ``Strategy.costs`` ("package.module:NAME"): an instance of
``StrategyCosts``, or of a subclass that overrides what its ranks do otherwise. ``WHOLE_MODEL`` will do for a strategy
whose ranks each keep the model and reduce its gradients once a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Mapping, Sequence

from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import Dtypes, Job, Stage
from nemo_dist_conf.plan.rank_shards import Place, Unit, held_elements, stage_units, trained_units

__all__ = ["Gathered", "Remedy", "StrategyCosts", "WHOLE_MODEL", "data_group"]


@dataclass(frozen=True)
class Gathered:
    """Bytes that are whole for a while, beside what rests: parameters, and gradients that wait to be reduced.

    at_loss: at the loss. in_backward: while backward is in a block. accumulated: gradients of earlier microbatches.
    """

    at_loss: int = 0
    in_backward: int = 0
    accumulated: int = 0


@dataclass(frozen=True)
class Remedy:
    """A change that saves memory on the same ranks. words: what to type for it.

    fields: of Job, and options: of the strategy, which it changes.
    """

    words: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def data_group(job: Job) -> tuple[str, int]:
    """(axis, ranks) of all ranks that have other rows, or other tokens of them, for the same parameters."""
    axis = "dp" if job.cp == 1 else "cp" if job.data_size == 1 else "dp_cp"
    return axis, job.data_size * job.cp


class StrategyCosts:
    """What one strategy costs; by itself that of the whole model on every rank, its gradients reduced once a step.

    Answers depend on what is given alone, so one object serves all jobs. options: the strategy node, by field.
    Options of other parallelisms mean the same in every strategy that has them, and are read elsewhere: ``tp_plan``,
    ``sequence_parallel``, ``enable_compile``, and ``activation_checkpointing`` with the modes of the strategy's row.
    """

    # ------------------------------------------------------------------------------------------------ dtypes

    def dtypes(self, options: Mapping[str, Any]) -> Dtypes:
        """Dtypes of gathered parameters, reduced gradients and logits."""
        return Dtypes()

    def recipe_options(self, options: Mapping[str, Any], dtype: str, device: str) -> Mapping[str, Any]:
        """The strategy's defaults as the recipe's own config of it has them, which follows ``train.dtype``.

        A search needs them, because it composes no config of the strategies that it tries.
        """
        return options

    # ------------------------------------------------------------------------------------------------ what rests

    def shards(self, job: Job) -> int:
        """Ranks over which parameters, or what is kept for their update, are split."""
        return 1

    def rests_sharded(self, job: Job) -> bool:
        """Whether a rank keeps only its shard of the parameters between steps."""
        return False

    def units(self, job: Job, stage: Stage) -> tuple[Unit, ...]:
        """Parameters of a stage that are gathered and reduced together: a block, its split experts, the rest."""
        return stage_units(job.model, stage, splits_experts=job.ep > 1)

    def resting(self, job: Job, parameters: int) -> tuple[int, int]:
        """(bytes of gradients, bytes of one state of the optimizer) between steps.

        parameters: bytes of a rank's, of those that are trained and get a gradient.
        """
        return parameters, parameters

    def offloads(self, job: Job) -> bool:
        """Whether parameters and their update are in host memory."""
        return False

    # ------------------------------------------------------------------------------------------------ during a step

    def gathered(self, job: Job, stages: Sequence[Stage]) -> Gathered:
        """What a rank with these stages has whole for a while."""
        return Gathered()

    def collectives(self, job: Job, stage: Stage, tp: int) -> Iterator[Collective]:
        """Gathers of parameters and reductions of gradients in a step, of a rank by its index on the axis tp."""
        for unit in trained_units(job, stage):
            axis, ranks = ("ep_shard", job.ep_shard) if unit.expert else data_group(job)
            if ranks > 1:
                size = 4 * held_elements(job, unit, Place(tp=tp))
                yield Collective(axis, "all_reduce", unit.count, size, "backward", True, unit.title)

    # ------------------------------------------------------------------------------------------------ advice

    def remedies(self, job: Job) -> Iterable[Remedy]:
        """Options that would save memory, the least costly first; each is tried alone and with recomputing."""
        return ()

    def last_resort(self, job: Job) -> Remedy | None:
        """What saves most memory at any price; tried last, together with everything else."""
        return None

    def notes(self, job: Job) -> Iterable[str]:
        """What the strategy was asked for and is not in the numbers, a sentence each."""
        return ()


WHOLE_MODEL = StrategyCosts()
