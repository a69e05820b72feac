"""Collectives of one step on a rank: how many, how large, over which axis. Exact for what the runtime calls.

Bytes are those of the whole tensor: what an all_gather returns, what a reduce_scatter and an all_reduce take, what a
rank's own tokens weigh in an all_to_all, what a send sends. Not counted: the scalars of metrics and of the gradient
norm, DDP's agreement on its buckets in the second step, and what modules inside of blocks call that run again alone
(``recompute.modules``).
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Iterator

from nemo_dist_conf.families.shapes import ModelShape
from nemo_dist_conf.plan.built_costs import attended_bytes, built_of
from nemo_dist_conf.plan.built_traffic import context_gathers, tensor_collectives
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.context_methods import kv_copies, method_of
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage
from nemo_dist_conf.plan.rank_shards import padded

__all__ = ["traffic_of"]

#: What attention gathers under cp.
_KEYS = "keys and values"
#: Routers compute their weights in float32.
_ROUTED_BYTES = 4


def traffic_of(job: Job, pp_rank: int, tp: int = 0) -> list[Collective]:
    """What a rank takes part in during a step, by its index on the axes pp and tp; calls of zero left out."""
    found: list[Collective] = []
    for stage in job.stages_of(pp_rank):
        found += (*_tensor(job, stage), *_context(job, stage), *_expert(job, stage))
        found += job.costs.collectives(job, stage, tp)
    found += _pipeline(job, pp_rank)
    return [entry for entry in found if entry.calls and entry.size]


def _tensor(job: Job, stage: Stage) -> Iterator[Collective]:
    """What tensor parallelism sends: sums of rows forward, of columns backward, or their halves along the sequence.

    A block of a family with a row has two of each; of a built model each module is asked.
    """
    if job.tp == 1:
        return
    model, times = job.model, job.microbatches * job.calls
    size = job.tokens * model.hidden * DTYPE_BYTES[job.compute_dtype]
    rows = columns = 2 * stage.layers
    embedding, head = "embedding" in stage.outer, "final_norm" in stage.outer
    sparse = sum(model.sparse[stage.first : stage.last])
    apart = sparse if job.ep > 1 else 0  # whole experts have whole rows of the block's input, and add up nothing
    if job.sequence_parallel:
        # What stages hand on is whole: put together before, cut again after, and the other way round in backward.
        cuts = (not head, not embedding)
        yield Collective("tp", "all_gather", cuts[0] * times, size, "forward", why="between stages")
        yield Collective("tp", "all_gather", cuts[1] * times, size, "backward", why="between stages")
    if built_of(job) is not None:
        yield from tensor_collectives(job, stage)
        return
    if job.sequence_parallel:
        # Experts are given whole rows, and add up whole rows where each rank has a part of them.
        inside = sparse - apart
        yield Collective("tp", "reduce_scatter", (rows - sparse + embedding) * times, size, "forward", why="row sums")
        yield Collective("tp", "all_reduce", inside * times, size, "forward", why="row sums")
        yield Collective("tp", "all_gather", (columns + head) * times, size, "forward", why="column inputs")
        yield Collective(
            "tp", "reduce_scatter", (columns - sparse + head) * times, size, "backward", why="column inputs"
        )
        yield Collective("tp", "all_reduce", inside * times, size, "backward", why="column inputs")
        yield Collective("tp", "all_gather", (rows + embedding) * times, size, "backward", why="row sums")
        norm = model.hidden * DTYPE_BYTES[job.param_dtype]
        yield Collective("tp", "all_reduce", (columns + head) * times, norm, "backward", why="norms")
        yield from _experts_beside(job, sparse * times, size)
    else:
        yield Collective("tp", "all_reduce", (rows - apart + embedding) * times, size, "forward", why="row sums")
        yield Collective("tp", "all_reduce", (columns - apart + head) * times, size, "backward", why="column inputs")
        yield from _experts_beside(job, sparse * times, size)
    if isinstance(model, ModelShape) and model.qk_norm:
        norm = model.head_dim * DTYPE_BYTES[job.param_dtype]
        yield Collective("tp", "all_reduce", 2 * stage.layers * times, norm, "backward", why="norms of heads")
    if head:
        logits = job.tokens * padded(model.vocab, job.tp) * DTYPE_BYTES[job.compute_dtype]
        yield Collective("tp", "all_gather", times, logits, "forward", why="logits")
    if again := sum(job.recomputed[stage.first : stage.last]):
        rows, columns = (count * again // stage.layers for count in (rows, columns))
        yield from _tensor_again(job, rows, columns, size, times)


def _experts_beside(job: Job, times: int, size: int) -> Iterator[Collective]:
    """What experts add: gradients of routing weights; of whole experts also what each rank had computed of its tokens.

    times: experts that run in a step.
    """
    weights = job.tokens * job.model.experts_per_token * _ROUTED_BYTES
    if job.ep == 1:
        yield Collective("tp", "all_reduce", times, weights, "backward", why="routing weights")
        return
    yield Collective("tp", "all_gather", times, size, "forward", why="outputs of experts")
    yield Collective("tp", "all_gather", times, size, "backward", why="inputs of experts")
    yield Collective("tp", "all_gather", times, weights, "backward", why="routing weights")


def _tensor_again(job: Job, rows: int, columns: int, size: int, times: int) -> Iterator[Collective]:
    """What recomputing a block calls again: all but its last sum, the second of two, with which torch stops early."""
    if not job.sequence_parallel:
        yield Collective("tp", "all_reduce", rows // 2 * times, size, "recompute", why="row sums")
        return
    yield Collective("tp", "all_gather", columns * times, size, "recompute", why="column inputs")
    if job.checkpointing is True:  # selective keeps what reduce_scatter returned
        yield Collective("tp", "reduce_scatter", rows // 2 * times, size, "recompute", why="row sums")


def _context(job: Job, stage: Stage) -> Iterator[Collective]:
    """Keys and values of the whole sequence gathered, their gradients scattered back; or tokens exchanged for heads.

    Where a mixer is run on whole rows, its input is gathered.
    """
    if job.cp == 1:
        return
    times, item = job.microbatches * job.calls, DTYPE_BYTES[job.compute_dtype]
    recomputed = job.recomputed[stage.first : stage.last]
    #: (why, calls, of them again where blocks are recomputed, bytes, whether it has a gradient)
    gathered: list[tuple[str, int, int, int, bool]] = []
    #: Of whole sequences: (attentions, of them recomputed, bytes of keys and values, of queries and outputs).
    attended: list[tuple[int, int, int, int]] = []
    if isinstance(job.model, ModelShape):
        whole_rows = job.model.whole_rows[stage.first : stage.last] or (False,) * stage.layers
        whole, again = sum(whole_rows), sum(map(operator.and_, whole_rows, recomputed))
        sequence = job.tokens * job.cp * item
        kv, q = (2 * sequence * width // job.tp for width in (job.model.kv_width, job.model.q_width))
        attended.append((stage.layers - whole, sum(recomputed) - again, kv, q))
        gathered.append(("whole rows", whole, again, sequence * job.model.hidden, True))
    else:
        again_of = context_gathers(job, stage, recomputed=True)
        for key, calls in context_gathers(job, stage).items():
            why, size, has_gradient = key
            gathered.append((why, calls, again_of[key], size, has_gradient))
        for sizes, count in Counter(attended_bytes(job, stage)).items():
            attended.append((count, count * sum(recomputed) // stage.layers, *sizes))
    if method_of(job) == "ulysses":
        gathered = [entry for entry in gathered if entry[0] != _KEYS]
        for count, again, kv, q in attended:
            sent = kv * kv_copies(job) // job.cp, q // job.cp
            yield from _exchanged_for_heads(job, count * times, again * times, *sent)
    elif isinstance(job.model, ModelShape):
        gathered += [(_KEYS, 2 * count, 2 * again, kv // 2, True) for count, again, kv, _ in attended]
    for why, calls, again, size, has_gradient in gathered:
        yield Collective("cp", "all_gather", calls * times, size, "forward", why=why)
        if has_gradient:
            yield Collective("cp", "reduce_scatter", calls * times, size, "backward", why=why)
        yield Collective("cp", "all_gather", again * times, size, "recompute", why=why)


def _exchanged_for_heads(job: Job, times: int, again: int, kv: int, q: int) -> Iterator[Collective]:
    """Queries, keys and values there in one all-to-all, outputs back in another; kv, q: of a rank's tokens.

    again: of attentions that are recomputed; selective keeps what all_to_all returned.
    """
    for when, calls in {"forward": times, "backward": times, "recompute": again}.items():
        if when == "recompute" and job.checkpointing is not True:
            continue
        yield Collective("cp", "all_to_all", calls, q // 2 + kv, when, why="queries, keys and values")
        yield Collective("cp", "all_to_all", calls, q // 2, when, why="outputs of heads")


def _expert(job: Job, stage: Stage) -> Iterator[Collective]:
    """Tokens to their experts and back, in forward and in backward; before each, how many there will be."""
    layers = sum(job.model.sparse[stage.first : stage.last])
    if job.ep == 1 or not layers:
        return
    runs = job.microbatches * job.calls
    again = sum(
        map(operator.and_, job.model.sparse[stage.first : stage.last], job.recomputed[stage.first : stage.last])
    )
    # Ranks along tp hold the same tokens, and each sends its part of them.
    rows = -(-job.tokens // job.tp) * job.model.experts_per_token
    size = rows * job.model.hidden * DTYPE_BYTES[job.compute_dtype]
    counts = 8 * job.model.experts
    passes = {"forward": (2, layers), "backward": (2, layers)}
    passes["recompute"] = (2 if job.checkpointing is True else 0, again)  # selective keeps what all_to_all returned
    for when, (calls, of_layers) in passes.items():
        yield Collective("ep", "all_to_all", calls * of_layers * runs, size, when, why="tokens")
        if when != "backward":
            yield Collective("ep", "all_to_all", of_layers * runs, counts, when, why="token counts")


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
    ends = {job.stages[0].rank, job.stages[-1].rank}
    tables = (weight.name for weight in job.model.outer_weights() if weight.part == "embedding")
    is_trained = not job.untrained.issuperset(tables)
    if job.model.tied and is_trained and len(ends) > 1 and pp_rank in ends:
        rows = padded(-(-job.model.vocab // job.tp), job.shards) // job.shards
        size = rows * job.model.hidden * 4  # kept in float32
        yield Collective("pp", "send", job.calls, size, "backward", why="gradients of tied embeddings")
    yield Collective("pp", "all_reduce", job.calls, 8, "backward", why="loss")
