"""What strategy=ddp costs: the whole model on every rank, gradients summed bucket by bucket."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Sequence

from nemo_dist_conf.composition.resolvers import autocast_dtype
from nemo_dist_conf.families.shapes import weights
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import Job, Stage
from nemo_dist_conf.plan.strategies.base import Gathered, StrategyCosts

__all__ = ["COSTS"]

_MIB = 2**20


class _DDPCosts(StrategyCosts):
    def recipe_options(self, options: Mapping[str, Any], dtype: str, device: str) -> Mapping[str, Any]:
        return {**options, "autocast_dtype": autocast_dtype(dtype, device)}

    def gathered(self, job: Job, stages: Sequence[Stage]) -> Gathered:
        """Buckets, which are copies of all gradients, unless gradients live in them; one rank has none."""
        if job.data_size == 1 or job.options.get("gradient_as_bucket_view"):
            return Gathered()
        buckets = 4 * sum(weight.count for name, weight in weights(job.model) if name not in job.untrained)
        return Gathered(at_loss=buckets, in_backward=buckets)

    def collectives(self, job: Job, stage: Stage, tp: int) -> Iterator[Collective]:
        """Buckets, in the order in which backward has the gradients.

        Source: torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size: a bucket is closed by the
        gradient with which it reaches its limit, the first one's being 1 MiB at most.
        """
        if job.data_size == 1:
            return
        cap = job.options.get("bucket_cap_mb")
        limit = int((25 if cap is None else cap) * _MIB)
        model = job.model
        outer, layers = model.outer_weights(), reversed(range(model.layers))
        order = [(weight.name, weight) for part in ("head", "final_norm") for weight in outer if weight.part == part]
        order += [
            (f"{model.block_name(layer)}.{weight.name}", weight)
            for layer in layers
            for weight in model.block_weights(model.kind(layer))
        ]
        order += [(weight.name, weight) for weight in outer if weight.part == "embedding"]
        sizes: list[int] = []
        filled, first = 0, min(limit, _MIB)
        for weight in (weight for name, weight in order if name not in job.untrained):
            filled += 4 * weight.count
            if filled >= (limit if sizes else first):
                sizes.append(filled)
                filled = 0
        sizes += [filled] if filled else []
        for size in sorted(set(sizes), reverse=True):
            yield Collective("dp", "all_reduce", sizes.count(size), size, "backward", True, "bucket")


COSTS = _DDPCosts()
