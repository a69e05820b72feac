"""Seconds of a step, from the work on a rank and what its hardware does in a second: an estimate, term by term.

Model FLOPs are counted as in PaLM (arXiv:2204.02311, appendix B): 6 for each weight that a token meets, and
12 x layers x width x tokens for attention without discount for the causal mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, Mapping

from nemo_dist_conf.families.shapes import ModelShape
from nemo_dist_conf.plan.built_costs import built_of, model_flops, stage_work
from nemo_dist_conf.plan.collectives import Collective
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage
from nemo_dist_conf.plan.memory import Memory
from nemo_dist_conf.plan.rank_groups import Groups, groups_of
from nemo_dist_conf.plan.schedule_timeline import Costs, Timeline, play
from nemo_dist_conf.plan.traffic import traffic_of

__all__ = [
    "FORMULAS",
    "StepTime",
    "quick_seconds",
    "step_time",
    "timeline_of",
]

#: What each line of the estimate is, for ``plan.formulas=true``.
FORMULAS: dict[str, str] = {
    "matmul": "2 x weights of matrix products x tokens / tp / (TFLOP/s x matmul_efficiency); backward twice that",
    "attention": "4 x tokens x keys x width / 2 (causal) / tp / (TFLOP/s x attention_efficiency); backward 2.5 times",
    "elementwise": "bytes that norms, rotary embeddings, activations, residuals and the loss read and write / GB/s",
    "launches": "kernels of a layer (140 eager, 50 compiled, both ways) x launch time, beyond all of the above",
    "recompute": "forward of every block again (full), or what is not a matrix product (selective)",
    "collective": "(n - 1) / n x bytes / (GB/s x efficiency) + log2(n) x latency; all_reduce twice; between nodes over "
    "as many adapters as the group has ranks on a node (ring collectives, bus bandwidth of NCCL's tests)",
    "exposed": "tensor, context and expert collectives in full; gathers and reductions of parameters where they take "
    "longer than nine tenths of the computing beside them, and the first gather",
    "pipeline": "the schedule played through with these times (nemo_dist_conf/plan/schedule_timeline.py)",
    "bubble": "part of the time of all pipeline ranks, while the schedule runs, in which they wait",
    "waiting": "what is left of a step beside all other parts, on the pipeline rank with the most to compute",
    "update": "bytes of parameters, gradients and states that the optimizer and clipping read and write / GB/s",
    "MFU": "model FLOPs (6 N + 12 L H S a token, PaLM) / (seconds x ranks x TFLOP/s)",
}

#: Bytes read and written for an element, forward and backward together, (eager, compiled): by counting kernels of
#: transformers' modules. A norm in eager mode is six kernels, partly on float32 copies.
_NORM = (96, 12)
_ROTARY = (48, 16)
_GATED = (30, 18)
_RESIDUAL = (12, 8)
_LOGITS = (34, 24)
_KERNELS = (140, 50)
#: Part of the bytes of operators that are no products which compiled blocks still move.
_FUSED = 1 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. parts: of the busiest pipeline rank, by what they go to. mfu: part of the peak, 0 to 1."""

    seconds: float
    parts: Mapping[str, float]
    mfu: float
    tokens_per_second: float
    timeline: Timeline | None = None

    @property
    def bubble(self) -> float:
        return 0.0 if self.timeline is None else self.timeline.bubble


def _model_flops(job: Job) -> float:
    """Floating point operations of a step on all ranks, forward and backward, as MFU counts them."""
    model = job.model
    if not isinstance(model, ModelShape):
        return model_flops(job)
    weights = model.active_parameters - model.vocab * model.hidden * (0 if model.tied else 1)
    per_token = 6 * weights + 12 * model.layers * model.q_width * job.seq_len
    return float(per_token) * job.global_rows * job.seq_len


def _peak(job: Job) -> float:
    """FLOP/s of a rank in the dtype that it computes in."""
    hardware = job.hardware
    return 1e12 * (hardware.fp32_tflops if job.compute_dtype == "float32" else hardware.bf16_tflops)


def _collective_seconds(entry: Collective, groups: Groups, job: Job) -> float:
    """Seconds of one call of a collective."""
    hardware, ranks = job.hardware, groups.size
    if ranks == 1:
        return 0.0
    if groups.inside_nodes:
        bandwidth, latency = hardware.intra_node_gb_s, hardware.intra_node_latency_us
    else:
        bandwidth = min(hardware.intra_node_gb_s, hardware.inter_node_gb_s * groups.ranks_on_a_node)
        latency = hardware.inter_node_latency_us
    rate = 1e9 * bandwidth * hardware.bandwidth_efficiency
    if entry.kind == "send":
        return entry.size / rate + 1e-6 * latency
    moved = entry.size * (ranks - 1) / ranks * (2 if entry.kind == "all_reduce" else 1)
    if entry.kind == "all_to_all" and not groups.inside_nodes:
        rate = 1e9 * hardware.inter_node_gb_s * hardware.bandwidth_efficiency  # every rank sends over its own adapter
    return moved / rate + 1e-6 * latency * math.log2(ranks)


def _stage_seconds(job: Job, stage: Stage) -> dict[str, float]:
    """Seconds of one microbatch on a stage, computing only: by part, forward and backward together."""
    hardware, tokens = job.hardware, job.tokens
    matmul, attention, bytes_moved, kernels, times = _work_of_blocks(job, stage)
    peak, memory = _peak(job), 1e9 * hardware.memory_gb_s * hardware.bandwidth_efficiency
    again = (matmul, attention, bytes_moved / 3) if job.checkpointing is True else (0.0, 0.0, 0.0)
    if job.checkpointing == "selective":
        again = (0.0, 0.0, bytes_moved / 3)
    share = job.recomputed_share(stage)
    if "final_norm" in stage.outer:
        model, style = job.model, 1 if job.compiled else 0
        is_built = built_of(job) is not None  # then head and norm are counted
        matmul += 0 if is_built else 2 * model.vocab * model.hidden * tokens / job.tp
        bytes_moved += tokens * (model.vocab * _LOGITS[style] + (0 if is_built else model.hidden * _NORM[style]))
    product, attend = peak * hardware.matmul_efficiency, peak * hardware.attention_efficiency
    parts = {
        "matmul": 3 * matmul / product,
        "attention": 3.5 * attention / attend,
        "elementwise": bytes_moved / memory,
        "recompute": share * (again[0] / product + again[1] / attend + again[2] / memory),
    }
    kernels *= 1 + share / 3
    launches = 1e-6 * hardware.kernel_launch_us * kernels * times
    return {**parts, "launches": max(0.0, launches - sum(parts.values()))}


def _work_of_blocks(job: Job, stage: Stage) -> tuple[float, float, float, float, int]:
    """(FLOPs of products in a forward, of attention, bytes moved forward and backward, kernels both ways, how often
    those) of a microbatch; of a built model with what is outside of blocks, but for the loss."""
    model, tokens = job.model, job.tokens
    if not isinstance(model, ModelShape):
        product, attended, moved, kernels = stage_work(job, stage)
        fused, fewer = (_FUSED, _KERNELS[1] / _KERNELS[0]) if job.compiled else (1.0, 1.0)
        return product, attended, 3 * moved * fused, 3 * kernels * fewer, 1
    matmul = attention = bytes_moved = 0.0
    style = 1 if job.compiled else 0
    item = DTYPE_BYTES[job.compute_dtype] / 2
    split = job.tp if job.sequence_parallel else 1
    for sparse, count in model.kinds(stage.first, stage.last).items():
        active = 0.0
        for weight in model.block_weights(sparse):
            share = model.experts_per_token / model.experts if weight.expert else 1.0
            active += share * weight.count if len(weight.shape) > 1 else 0.0
        matmul += count * 2 * active * tokens / job.tp
        keys = min(job.seq_len, model.window or job.seq_len)
        attention += count * 4 * tokens * keys * model.q_width / 2 / job.tp
        wide = (model.intermediate if not sparse else model.expert_width * model.experts_per_token) / job.tp
        moved = model.hidden * (2 * _NORM[style] + 2 * _RESIDUAL[style]) / split + wide * _GATED[style]
        moved += (model.q_width + model.kv_width) * _ROTARY[style] / job.tp
        if sparse:
            moved += model.hidden * model.experts_per_token * 24  # sorted, sent and weighted
        bytes_moved += count * tokens * moved * item
    return matmul, attention, bytes_moved, _KERNELS[style], stage.layers + 1


@dataclass(frozen=True)
class _Work:
    """What a microbatch costs on every stage, (forward, backward) [s], and what collectives add in line, by axis."""

    parts: Mapping[int, Mapping[str, float]]
    costs: Mapping[int, tuple[float, float]]
    exposed: Mapping[int, Mapping[str, float]]
    hop: float
    calls: Mapping[int, list[Collective]]
    groups: Mapping[str, Groups]


def _work(job: Job, ranks: Iterable[int]) -> _Work:
    parts = {stage.index: _stage_seconds(job, stage) for rank in ranks for stage in job.stages_of(rank)}
    calls = {rank: traffic_of(job, rank) for rank in ranks}
    axes = {entry.axis for entries in calls.values() for entry in entries}
    groups = {axis: groups_of(job.mesh, axis, job.hardware.ranks_per_node) for axis in axes}
    runs = job.microbatches * job.calls
    costs: dict[int, tuple[float, float]] = {}
    exposed: dict[int, dict[str, float]] = {}
    hop = 0.0
    for rank, entries in calls.items():
        exposed[rank] = {}
        in_line = {True: 0.0, False: 0.0}
        for entry in entries:
            if entry.overlaps or entry.axis == "pp":
                hop = max(hop, _collective_seconds(entry, groups["pp"], job)) if entry.kind == "send" else hop
                continue
            seconds = entry.calls * _collective_seconds(entry, groups[entry.axis], job)
            exposed[rank][entry.axis] = exposed[rank].get(entry.axis, 0.0) + seconds
            in_line[entry.when == "forward"] += seconds
        stages = job.stages_of(rank)
        layers = sum(stage.layers for stage in stages) or 1
        for stage in stages:
            own = parts[stage.index]
            share = stage.layers / layers / runs
            ahead = (own["matmul"] + own["elementwise"] + own["launches"]) / 3 + own["attention"] / 3.5
            back = sum(own.values()) - ahead
            costs[stage.index] = (ahead + in_line[True] * share, back + in_line[False] * share)
    return _Work(parts, costs, exposed, hop, calls, groups)


def quick_seconds(job: Job) -> float:
    """The estimate without playing the schedule through: its bubble by formula, the first and last rank's work."""
    work = _work(job, sorted({0, job.pp - 1}))
    of_rank = [sum(sum(work.costs[stage.index]) for stage in job.stages_of(rank)) for rank in work.calls]
    bubble = job.played.bubble(job.pp, len(job.stages) // job.pp) if job.pp > 1 else 0
    busy = job.calls * (job.microbatches + bubble) * max(of_rank)
    return busy + max(_unhidden(job, work.calls[rank], work.groups, busy) for rank in work.calls)


def timeline_of(job: Job) -> Timeline | None:
    """The schedule as it runs with the times of this job; None without a pipeline."""
    return _played(job, _work(job, range(job.pp))) if job.pp > 1 else None


def _played(job: Job, work: _Work) -> Timeline | None:
    if job.pp == 1:
        return None
    forward, backward = ({index: cost[side] for index, cost in work.costs.items()} for side in (0, 1))
    return play(job, Costs(forward, backward, work.hop))


def step_time(job: Job, memories: Mapping[int, Memory] | None = None, timeline: Timeline | None = None) -> StepTime:
    """The estimate for a step.

    memories: of each pipeline rank, for the update's bytes. timeline: the schedule, where it has been played already.
    """
    work = _work(job, range(job.pp))
    runs = job.microbatches * job.calls
    if timeline is None:
        timeline = _played(job, work)
    busy = runs * sum(work.costs[0]) if timeline is None else job.calls * timeline.seconds
    busiest = max(range(job.pp), key=lambda rank: sum(sum(work.costs[s.index]) for s in job.stages_of(rank)))
    sharding = max(_unhidden(job, work.calls[rank], work.groups, busy) for rank in range(job.pp))
    update = max(_update_seconds(job, memory) for memory in memories.values()) if memories else 0.0
    seconds = busy + sharding + update
    stages = job.stages_of(busiest)
    parts = {name: runs * sum(work.parts[s.index][name] for s in stages) for name in work.parts[stages[0].index]}
    parts |= {axis: value for axis, value in work.exposed[busiest].items() if value}
    parts |= {"sharding": sharding, "update": update}
    parts["waiting"] = max(0.0, seconds - sum(parts.values())) if job.pp > 1 else 0.0
    tokens = job.global_rows * job.seq_len
    mfu = _model_flops(job) / (seconds * job.mesh.world_size * _peak(job))
    return StepTime(seconds, parts, mfu, tokens / seconds, timeline)


def _unhidden(job: Job, calls: list[Collective], groups: Mapping[str, Groups], busy: float) -> float:
    """What gathers and reductions of parameters add: beyond the computing beside them, and the first gather.

    What is needed before anything can be computed, and what comes after everything, hides behind nothing: one unit.
    """
    total = first = 0.0
    for entry in calls:
        if entry.overlaps and entry.axis != "pp":
            one = _collective_seconds(entry, groups[entry.axis], job)
            total += entry.calls * one
            if entry.kind in ("all_gather", "all_reduce"):
                first = max(first, one if entry.calls else 0.0)
    # Collectives and products share a GPU's memory and multiprocessors; nine tenths of the computing can hide them.
    return max(total - 0.9 * busy, min(total, 2 * first))


def _update_seconds(job: Job, memory: Memory) -> float:
    """Reading and writing parameters, gradients and states; twice as much where kernels are not fused."""
    touched = 2 * memory.parameters + memory.gradients + 2 * memory.optimizer
    clipped = 3 * memory.gradients
    rate = 1e9 * job.hardware.memory_gb_s * job.hardware.bandwidth_efficiency
    return (touched * (1.0 if job.update.fused else 2.0) + clipped) / rate
