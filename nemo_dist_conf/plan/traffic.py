"""Collectives of one step on a rank: how many, how large, over which axis. Exact for what the runtime calls.

Bytes are those of the whole tensor: what an all_gather returns, what a reduce_scatter and an all_reduce take, what a
rank's own tokens weigh in an all_to_all, what a send sends. Not counted: the scalars of metrics and of the gradient
norm, and DDP's agreement on its buckets in the second step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Iterator

from nemo_dist_conf.families.shapes import block_weights, outer_weights
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage
from nemo_dist_conf.plan.rank_shards import EMBEDDING, Unit, gathered_bytes, padded, tp_shape, units_of
from nemo_dist_conf.plan.schedule_timeline import orders

__all__ = ["Collective", "traffic_of"]

_MIB = 2**20


@dataclass
class Collective:
    """Calls of one kind in a step. calls of ``size`` bytes each. when: ``forward``, ``backward`` or ``recompute``.

    overlaps: the runtime issues it early, so that it can hide behind computing.
    """

    axis: str
    kind: str
    calls: int
    size: int
    when: str
    overlaps: bool = False
    why: str = field(default="", compare=False)

    @property
    def bytes(self) -> int:
        return self.calls * self.size


def traffic_of(job: Job, pp_rank: int, tp: int = 0) -> list[Collective]:
    """What a rank takes part in during a step, by its index on the axes pp and tp; calls of zero left out."""
    found = [
        entry
        for stage in job.stages_of(pp_rank)
        for entry in (*_tensor(job, stage), *_context(job, stage), *_expert(job, stage), *_sharding(job, stage, tp))
    ]
    found += _pipeline(job, pp_rank)
    return [entry for entry in found if entry.calls and entry.size]


# ---------------------------------------------------------------------------------------------------- data


def _sharding(job: Job, stage: Stage, tp: int) -> Iterator[Collective]:
    """Gathers of parameters and reductions of gradients, unit by unit."""
    if job.strategy == "ddp":
        yield from _buckets(job)
        return
    if job.strategy == "megatron_fsdp":
        yield from _megatron(job, stage)
        return
    narrow, wide = DTYPE_BYTES[job.param_dtype], DTYPE_BYTES[job.reduce_dtype]
    forwards = job.calls if job.pp > 1 else job.microbatches
    ahead, back = _gathers_of_stage(job, stage) if job.pp > 1 else (forwards, forwards)
    reductions = forwards if job.pp > 1 or not job.options.get("defer_fsdp_grad_sync", True) else 1
    if job.pp > 1 and not job.options.get("defer_fsdp_grad_sync", True):
        reductions = job.calls * job.microbatches
    for unit in units_of(job, stage):
        axis, ranks = ("ep_shard", job.ep_shard) if unit.expert else (job.shard_axis, job.shards)
        again = _gathered_again(job, unit)
        if ranks > 1:
            size = gathered_bytes(job, unit, narrow, tp)
            yield Collective(axis, "all_gather", unit.count * ahead, size, "forward", True, unit.title)
            yield Collective(axis, "all_gather", again * back, size, "backward", True, unit.title)
            size = gathered_bytes(job, unit, wide, tp)
            yield Collective(axis, "reduce_scatter", unit.count * reductions, size, "backward", True, unit.title)
        if job.replicas > 1 and not unit.expert:
            size = gathered_bytes(job, unit, wide, tp) // job.shards
            yield Collective("dp_replicate", "all_reduce", unit.count * reductions, size, "backward", True, unit.title)


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
    return sum(job.reshards(index == unit.count - 1, unit.expert) for index in range(unit.count))


def _buckets(job: Job) -> Iterator[Collective]:
    """DDP's buckets, in the order in which backward has the gradients.

    Source: torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size: a bucket is closed by the
    gradient with which it reaches its limit, the first one's being 1 MiB at most.
    """
    if job.data_size == 1:
        return
    cap = job.options.get("bucket_cap_mb")
    limit = int((25 if cap is None else cap) * _MIB)
    model = job.model
    outer = {weight.part: weight for weight in outer_weights(model)}
    order = [outer[part] for part in ("head", "final_norm") if part in outer]
    order += [weight for sparse in reversed(model.sparse) for weight in block_weights(model, sparse)]
    order.append(outer["embedding"])
    sizes: list[int] = []
    filled, first = 0, min(limit, _MIB)
    for weight in order:
        filled += 4 * weight.count
        if filled >= (limit if sizes else first):
            sizes.append(filled)
            filled = 0
    sizes += [filled] if filled else []
    for size in sorted(set(sizes), reverse=True):
        yield Collective("dp", "all_reduce", sizes.count(size), size, "backward", True, "bucket")


def _megatron(job: Job, stage: Stage) -> Iterator[Collective]:
    """By ZeRO stage; without the padding of the library's flat buffers."""
    if job.shards == 1:
        return
    zero, steps = job.options.get("zero_dp_strategy", 3), job.microbatches
    axis = job.shard_axis
    for unit in units_of(job, stage):
        size = 4 * sum(prod(tp_shape(job.styles, job.tp, name, weight, 0)) for name, weight in unit.weights)
        if zero == 0:
            yield Collective(axis, "all_reduce", unit.count, size, "backward", True, unit.title)
            continue
        gathers = 2 * steps if zero == 3 and unit.layer >= 0 else 1  # what is outside of units stays until the update
        yield Collective(axis, "all_gather", unit.count * gathers, size, "forward", True, unit.title)
        reductions = steps if zero >= 2 else 1
        yield Collective(axis, "reduce_scatter", unit.count * reductions, size, "backward", True, unit.title)


# ---------------------------------------------------------------------------------------------------- model


def _tensor(job: Job, stage: Stage) -> Iterator[Collective]:
    """Of tensor parallelism: two sums a block forward and two backward, or their halves along the sequence."""
    if job.tp == 1:
        return
    model, times = job.model, job.microbatches * job.calls
    size = job.tokens * model.hidden * DTYPE_BYTES[job.compute_dtype]
    sums, layers = job.sequence_parallel, stage.layers
    head, embedding = "final_norm" in stage.outer, "embedding" in stage.outer
    if sums:
        # What stages hand on is whole: put together before, cut again after, and the other way round in backward.
        cuts = (not head, not embedding)
        yield Collective("tp", "all_gather", cuts[0] * times, size, "forward", why="between stages")
        yield Collective("tp", "all_gather", cuts[1] * times, size, "backward", why="between stages")
        yield Collective("tp", "reduce_scatter", (2 * layers + embedding) * times, size, "forward", why="row sums")
        yield Collective("tp", "all_gather", (2 * layers + head) * times, size, "forward", why="column inputs")
        yield Collective("tp", "reduce_scatter", (2 * layers + head) * times, size, "backward", why="column inputs")
        yield Collective("tp", "all_gather", (2 * layers + embedding) * times, size, "backward", why="row sums")
        norm = model.hidden * DTYPE_BYTES[job.param_dtype]
        yield Collective("tp", "all_reduce", (2 * layers + head) * times, norm, "backward", why="norms")
    else:
        yield Collective("tp", "all_reduce", (2 * layers + embedding) * times, size, "forward", why="row sums")
        yield Collective("tp", "all_reduce", (2 * layers + head) * times, size, "backward", why="column inputs")
    if model.qk_norm:
        norm = model.head_dim * DTYPE_BYTES[job.param_dtype]
        yield Collective("tp", "all_reduce", 2 * layers * times, norm, "backward", why="norms of heads")
    if head:
        logits = job.tokens * padded(model.vocab, job.tp) * DTYPE_BYTES[job.compute_dtype]
        yield Collective("tp", "all_gather", times, logits, "forward", why="logits")
    if job.checkpointing:
        yield from _tensor_again(job, layers, size, times)


def _tensor_again(job: Job, layers: int, size: int, times: int) -> Iterator[Collective]:
    """What recomputing a block calls again: all but its last sum, with which torch stops early."""
    if not job.sequence_parallel:
        yield Collective("tp", "all_reduce", layers * times, size, "recompute", why="row sums")
        return
    yield Collective("tp", "all_gather", 2 * layers * times, size, "recompute", why="column inputs")
    if job.checkpointing is True:  # selective keeps what reduce_scatter returned
        yield Collective("tp", "reduce_scatter", layers * times, size, "recompute", why="row sums")


def _context(job: Job, stage: Stage) -> Iterator[Collective]:
    """Keys and values of the whole sequence gathered, their gradients scattered back."""
    if job.cp == 1:
        return
    times = 2 * stage.layers * job.microbatches * job.calls
    size = job.tokens * job.cp * job.model.kv_width * DTYPE_BYTES[job.compute_dtype] // job.tp
    yield Collective("cp", "all_gather", times, size, "forward", why="keys and values")
    yield Collective("cp", "reduce_scatter", times, size, "backward", why="keys and values")
    if job.checkpointing:
        yield Collective("cp", "all_gather", times, size, "recompute", why="keys and values")


def _expert(job: Job, stage: Stage) -> Iterator[Collective]:
    """Tokens to their experts and back, in forward and in backward; before each, how many there will be."""
    layers = job.model.kinds(stage.first, stage.last).get(True, 0)
    if job.ep == 1 or not layers:
        return
    times = layers * job.microbatches * job.calls
    size = job.tokens * job.model.experts_per_token * job.model.hidden * DTYPE_BYTES[job.compute_dtype]
    counts = 8 * job.model.experts
    passes = {"forward": 2, "backward": 2}
    if job.checkpointing:  # selective keeps what all_to_all returned
        passes["recompute"] = 2 if job.checkpointing is True else 0
    for when, calls in passes.items():
        yield Collective("ep", "all_to_all", calls * times, size, when, why="tokens")
        if when != "backward":
            yield Collective("ep", "all_to_all", times, counts, when, why="token counts")


def _pipeline(job: Job, pp_rank: int) -> Iterator[Collective]:
    """What a rank sends: a microbatch's hidden states to the next stage, their gradients to the one before."""
    if job.pp == 1:
        return
    sent = job.pipeline.get("dtype")
    # Under autocast stages hand on what they were given.
    item = DTYPE_BYTES[getattr(sent, "name", sent) or job.param_dtype]
    size = job.tokens * job.model.hidden * item
    times = job.microbatches * job.calls
    ahead = back = 0
    for stage in job.stages_of(pp_rank):
        if stage.index + 1 < len(job.stages) and job.stages[stage.index + 1].rank != pp_rank:
            ahead += 1
        if stage.index > 0 and job.stages[stage.index - 1].rank != pp_rank:
            back += 1
    yield Collective("pp", "send", ahead * times, size, "forward", True, "hidden states")
    yield Collective("pp", "send", back * times, size, "backward", True, "their gradients")
    yield Collective("pp", "all_reduce", job.calls, 8, "backward", why="loss")
