"""What a rank keeps, computes and sends for a built model: as counted in its forward on meta, or as estimated.

A run of a whole microbatch on one rank is divided among ranks: along the sequence under cp, and under tp all but what
is as wide as the residual stream. These shares are estimates, as is what torch.compile saves.
"""

from __future__ import annotations

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.built_shape import BuiltShape, Run, Work
from nemo_dist_conf.plan.context_methods import kv_copies, method_of
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage

__all__ = [
    "attended_bytes",
    "built_of",
    "entered_bytes",
    "model_flops",
    "outer_saved",
    "run_of",
    "saved_bytes",
    "saved_outside",
    "selected_bytes",
    "stage_work",
]


def built_of(job: Job) -> BuiltShape | None:
    """The model, where it was read off a built one; None for a family whose row has formulas."""
    return job.model if isinstance(job.model, BuiltShape) else None


def run_of(job: Job, length: int | None = None, again: tuple[str, ...] = ()) -> Run:
    """A microbatch through the whole model on one rank. length: tokens of a row; None: those of a whole one.

    again: names of modules inside of blocks that run again in backward.
    """
    model = built_of(job)
    assert model is not None, "asked of built models alone"

    def run(dtype: str) -> Run:
        batch = (job.rows, length or job.seq_len, dtype, job.hardware.device != "cpu")
        return model.run_without(*batch, again, job.checkpointing == "selective") if again else model.run_of(*batch)

    try:
        return run(job.compute_dtype)
    except ConfigError:
        if job.autocast is None:
            raise
        return run("float32")  # as it is written it takes parameters in that alone, which autocast leaves so


def _stream(job: Job, size: int) -> int:
    """Bytes on a rank of what is as wide as the residual stream.

    Autocast leaves it in the parameters' dtype. Along the sequence split are a norm's copies; what the matrices after
    it take, which is a third, is gathered.
    """
    wider = DTYPE_BYTES[job.param_dtype] / DTYPE_BYTES[job.compute_dtype]
    shared = 2 / 3 / job.tp + 1 / 3 if job.sequence_parallel else 1.0
    return int(size * wider * shared) // job.cp


def _of_rank(job: Job, stream: int, inner: int) -> int:
    return _stream(job, stream) + inner // (job.tp * job.cp)


def saved_bytes(job: Job, layer: int) -> int:
    """Bytes that a block keeps where nothing is recomputed."""
    work = run_of(job).blocks[layer]
    if job.compiled:  # what is elementwise is recomputed from results of products
        return min(_whole(job, work), selected_bytes(job, layer)) + _exchange(job, layer, work)
    return _whole(job, work) + _exchange(job, layer, work)


def saved_outside(job: Job, layer: int) -> int:
    """The same where modules inside of blocks run again."""
    work = run_of(job, again=job.recomputed_inside).blocks[layer]
    if job.compiled:
        return min(_whole(job, work), selected_bytes(job, layer)) + _exchange(job, layer, work)
    return _whole(job, work) + _exchange(job, layer, work)


def _whole(job: Job, work: Work) -> int:
    if job.cp > 1 and method_of(job) == "ulysses":
        others = work.keys_and_values * (kv_copies(job) - 1) // (job.tp * job.cp)
    else:
        others = work.keys_and_values * (job.cp - 1) // (job.tp * job.cp)  # of the other ranks of cp
    return _of_rank(job, work.saved_stream, work.saved_inner) + others


def _exchange(job: Job, layer: int, work: Work) -> int:
    """A copy of the tokens on each side of an exchange with experts, there and back."""
    model = job.model
    if job.ep == 1 or not model.sparse[layer]:
        return 0
    return 2 * job.tokens * model.experts_per_token * model.hidden * DTYPE_BYTES[job.compute_dtype]


def selected_bytes(job: Job, layer: int) -> int:
    """What selective checkpointing keeps: the block's input, results of products and of attention."""
    work = run_of(job).blocks[layer]
    kept = _of_rank(job, work.entered + work.kept_stream, work.kept_inner)
    if job.sequence_parallel:  # results of rows after ranks have added them up, too
        kept += 2 * job.tokens * job.model.hidden * DTYPE_BYTES[job.compute_dtype] // job.tp
    kept = min(kept, _whole(job, work))
    if job.cp > 1 and method_of(job) == "ulysses":  # heads as they came, and tokens as they came back
        kept += (work.queries_and_outputs + work.keys_and_values * kv_copies(job)) // (job.tp * job.cp)
    return kept + _exchange(job, layer, work)


def entered_bytes(job: Job, layer: int) -> int:
    """A block's input."""
    return _stream(job, run_of(job).blocks[layer].entered)


def outer_saved(job: Job, stage: Stage) -> int:
    """What is kept outside of blocks, but for logits and loss."""
    run, found = run_of(job), 0
    if "embedding" in stage.outer:
        found += _of_rank(job, run.before.saved_stream, run.before.saved_inner)
    if "final_norm" in stage.outer:
        found += _of_rank(job, run.after.saved_stream, run.after.saved_inner)
    return found


def stage_work(job: Job, stage: Stage) -> tuple[float, float, float, float]:
    """(FLOPs of products, of attention with a causal mask, bytes moved, kernels) of a forward on a rank's stage."""
    run = run_of(job)
    works = list(run.blocks[stage.first : stage.last])
    works += [run.before] if "embedding" in stage.outer else []
    works += [run.after] if "final_norm" in stage.outer else []
    parts = job.tp * job.cp
    matmul = sum(work.matmul for work in works) / parts
    attention = sum(work.attention for work in works) / 2 / parts
    moved = sum(work.moved for work in works) / job.cp
    if job.tp > 1:  # half of it is on the residual stream
        moved *= 1 / job.tp if job.sequence_parallel else (1 + 1 / job.tp) / 2
    return matmul, attention, moved, float(sum(work.kernels for work in works))


def model_flops(job: Job) -> float:
    """Floating point operations of a step on all ranks, forward and backward, attention without discount."""
    run = run_of(job)
    works = (*run.blocks, run.before, run.after)
    return 3.0 * sum(work.matmul + work.attention for work in works) * job.global_rows / job.rows


def attended_bytes(job: Job, stage: Stage) -> list[tuple[int, int]]:
    """Bytes of whole sequences on a rank, (keys and values, queries and outputs), of each block that exchanges them."""
    works = run_of(job).blocks[stage.first : stage.last]
    return [
        (work.keys_and_values // job.tp, work.queries_and_outputs // job.tp) for work in works if work.keys_and_values
    ]
