"""Bytes that a microbatch keeps for its backward on one rank, operator by operator.

Names of sizes: T tokens of the microbatch on this rank, H hidden, Q and K widths of queries and keys, I of the MLP,
V ids. Each term is a tensor that autograd saves in the modules of transformers (modeling_llama.py and its kin) run
without fused kernels; what torch.compile saves is estimated (see ``_norm`` and ``_mlp``). So it is for families whose
row has shapes; of other models plan/built_costs.py says what was counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Iterator

from nemo_dist_conf.families.shapes import ModelShape, Weight
from nemo_dist_conf.plan.built_costs import (
    built_of,
    entered_bytes,
    outer_saved,
    saved_bytes,
    saved_outside,
    selected_bytes,
)
from nemo_dist_conf.plan.context_methods import kv_copies, method_of
from nemo_dist_conf.plan.job import DTYPE_BYTES, Job, Stage

__all__ = ["Kept", "kept_by_stage", "loss_bytes", "stage_bytes"]

_FP32 = 4


@dataclass(frozen=True)
class Kept:
    """Bytes of a microbatch's activations.

    saved: from its forward to its backward. working: of the one block that backward is in: what is recomputed.
    """

    saved: int
    working: int


def _item(job: Job) -> int:
    return DTYPE_BYTES[job.compute_dtype]


def _shape(job: Job) -> ModelShape:
    """The model, where its family's row has shapes."""
    assert isinstance(job.model, ModelShape), "built models are counted"
    return job.model


def _stream(job: Job) -> int:
    """Bytes of an element of the residual stream: autocast leaves it in the parameters' dtype."""
    return DTYPE_BYTES[job.param_dtype]


def _split(job: Job) -> int:
    """Ranks that share the sequence outside of attention and MLP."""
    return job.tp if job.sequence_parallel else 1


def _norm(job: Job, readers_bytes: int) -> int:
    """RMSNorm of the residual stream, and its output as the layers after it keep it.

    In float32 its input, the normalised input and the output; in a narrower type the input is kept as its float32
    copy. Under sequence parallelism the layers keep the gathered output. Compiled, what is elementwise is recomputed
    from the input.
    """
    tokens, hidden, stream = job.tokens, _shape(job).hidden, _stream(job)
    split = _split(job)
    if job.compiled:
        return tokens * hidden * stream // split + tokens * _FP32 // split
    own = tokens * hidden * (_FP32 + stream) // split + tokens * _FP32 // split
    return own + tokens * hidden * readers_bytes


def _attention(job: Job) -> int:
    """q, k, v and the output as attention keeps them, with its log-sum-exp.

    Under cp k and v are of all tokens where they are gathered, and in copies where tokens are exchanged for heads.
    Where the attention of some layers is run on whole rows, all of it is of all tokens, in every layer.
    """
    model, item, tp = _shape(job), _item(job), job.tp
    if job.autocast and job.hardware.device == "cpu":
        item = _FP32  # rotary embeddings are float32 under autocast, and on a CPU attention takes them as they are
    tokens, whole = job.tokens, any(model.whole_rows)
    row = tokens * job.cp
    if whole:
        tokens = row
    elif job.cp > 1 and method_of(job) == "ulysses":
        row = tokens * kv_copies(job)
    kept = tokens * model.q_width * 2 * item // tp + row * model.kv_width * 2 * item // tp
    kept += tokens * model.heads * _FP32 // tp
    if _in_steps(job):  # q, and k and v of all heads, in float32; weights, what drops out, and both together
        kept = tokens * model.q_width * (3 * _FP32 + item) // tp + 3 * _scores(job)
    if job.cp > 1 and not whole:  # the output is put together from parts and laid out anew
        kept += tokens * model.q_width * item // tp
    if model.qk_norm and not job.compiled:
        kept += tokens * (model.q_width + model.kv_width) * (_FP32 + item) // tp
    return kept


def _in_steps(job: Job) -> bool:
    """Whether attention drops out where no fused kernel does: on a CPU."""
    return _shape(job).attention_dropout > 0 and job.hardware.device == "cpu" and job.cp == 1


def _scores(job: Job) -> int:
    """Bytes of the products of all queries and keys, which are float32 where no kernel is fused."""
    return job.rows * _shape(job).heads * job.seq_len**2 * _FP32 // job.tp


def _mlp(job: Job, sparse: bool) -> int:
    """Gate, its activation, up and their product; of experts for each token that they were sent."""
    model, item = _shape(job), _item(job)
    if not sparse:
        per_token = (2 if job.compiled else 4) * model.intermediate // job.tp
        return job.tokens * per_token * item
    rows = job.tokens * model.experts_per_token
    if job.ep > 1:  # each of the ranks that hold the same tokens sends a part of them
        rows = -(-rows // job.tp)
    # Tokens sorted by expert, gate and up, the activation, the product, and the output before its weight.
    per_row = 2 * model.hidden + 4 * model.expert_width // (1 if job.ep > 1 else job.tp)
    if job.ep > 1:  # a copy on each side of the exchange, there and back
        per_row += 2 * model.hidden
    return rows * per_row * item + job.tokens * model.experts * 2 * _FP32


def _block_bytes(job: Job, sparse: bool) -> int:
    """Everything that a block keeps where nothing is recomputed."""
    reader = _item(job)
    return 2 * _norm(job, reader) + _attention(job) + _mlp(job, sparse)


def _selective_bytes(job: Job, sparse: bool) -> int:
    """The block's input, results of matrix products and of attention. Products of grouped experts are recomputed."""
    model, item, tokens, tp = _shape(job), _item(job), job.tokens, job.tp
    kept = tokens * model.hidden * _stream(job) // _split(job)
    kept += tokens * (model.q_width + 2 * model.kv_width) * item // tp  # projections
    if _in_steps(job):
        kept += tokens * model.q_width * _FP32 // tp + _scores(job)
    else:
        kept += tokens * model.q_width * item // tp + tokens * model.heads * _FP32 // tp  # attention
    kept += tokens * model.hidden * item  # output projection, before ranks add up
    if job.sequence_parallel:
        kept += 2 * tokens * model.hidden * item // tp  # and after they have, as parts of the sequence
    if job.cp > 1 and method_of(job) == "ulysses":  # heads as they came, and tokens as they came back
        kept += 2 * tokens * (model.q_width + model.kv_width * kv_copies(job)) * item // tp
    if not sparse:
        kept += tokens * (2 * model.intermediate // tp + model.hidden) * item
    else:
        kept += tokens * model.experts * item
        if job.ep > 1:  # tokens as they came, and as they came back
            kept += 2 * tokens * model.experts_per_token * model.hidden * item
    return kept


def _block(job: Job, sparse: bool, recomputed: bool) -> Kept:
    if not recomputed:
        return Kept(_block_bytes(job, sparse), 0)
    saved = job.tokens * job.model.hidden * _stream(job) // _split(job)
    if job.checkpointing == "selective":
        saved = _selective_bytes(job, sparse)
        return Kept(saved, max(0, _block_bytes(job, sparse) - saved))
    return Kept(saved, _block_bytes(job, sparse))


def _built_block(job: Job, layer: int) -> Kept:
    """The same of a block of a built model."""
    whole = saved_bytes(job, layer)
    if not job.recomputed[layer]:
        saved = saved_outside(job, layer) if job.recomputed_inside else whole
        return Kept(saved, max(0, whole - saved))
    if job.checkpointing == "selective":
        saved = selected_bytes(job, layer)
        return Kept(saved, max(0, whole - saved))
    return Kept(entered_bytes(job, layer), whole)


def _blocks(job: Job, stage: Stage) -> Iterator[tuple[int, Kept]]:
    """(how many, what one keeps) of a stage's blocks."""
    if built_of(job) is not None:
        yield from ((1, _built_block(job, layer)) for layer in range(stage.first, stage.last))
        return
    recomputed = job.recomputed[stage.first : stage.last]
    if len(set(recomputed)) < 2:
        for sparse, count in _shape(job).kinds(stage.first, stage.last).items():
            yield count, _block(job, sparse, recomputed[0])
        return
    for (sparse, again), count in Counter(zip(_shape(job).sparse[stage.first : stage.last], recomputed)).items():
        yield count, _block(job, sparse, again)


def loss_bytes(job: Job) -> tuple[int, int]:
    """(kept, working): logits and their log-softmax in float32; the gradients of both."""
    elements = job.tokens * job.model.vocab
    item = DTYPE_BYTES[job.output_dtype]
    return elements * (item + _FP32), 2 * elements * _FP32


def stage_bytes(job: Job, stage: Stage) -> Kept:
    """Bytes that one microbatch keeps on a stage: blocks, final norm, head and loss; on later stages what came in."""
    saved = working = 0
    for count, kept in _blocks(job, stage):
        saved += count * kept.saved
        working = max(working, kept.working)
    if job.autocast:
        saved += _narrow_weights(job, stage)
    if "embedding" in stage.outer:
        saved += job.tokens * 8  # the ids
    if built_of(job) is not None:
        saved += outer_saved(job, stage)
    elif "final_norm" in stage.outer:
        saved += _norm(job, _item(job))
    if "final_norm" in stage.outer:
        saved += loss_bytes(job)[0]
    return Kept(saved, working)


def _narrow_weights(job: Job, stage: Stage) -> int:
    """autocast's copies of the weights of matrix products; inside blocks that are recomputed they do not last."""
    item = DTYPE_BYTES[job.compute_dtype]
    total = 0
    if job.checkpointing is False:
        for kind, count in job.model.kinds(stage.first, stage.last).items():
            total += count * sum(w.count for w in job.model.block_weights(kind) if len(w.shape) > 1)
    elif not all(job.recomputed[stage.first : stage.last]):
        for layer in range(stage.first, stage.last):
            if not job.recomputed[layer]:
                total += sum(weight.count for weight in _weights_outside(job, layer) if len(weight.shape) > 1)
    if "head" in stage.outer or (job.model.tied and "final_norm" in stage.outer):
        total += job.model.vocab * job.model.hidden
    return total * item // job.tp


def _weights_outside(job: Job, layer: int) -> Iterator[Weight]:
    """Weights of a block that are not of what runs again alone in it."""
    block = job.model.block_name(layer)
    for weight in job.model.block_weights(job.model.kind(layer)):
        if not job.is_recomputed(f"{block}.{weight.name}"):
            yield weight


def kept_by_stage(job: Job) -> dict[int, Kept]:
    return {stage.index: stage_bytes(job, stage) for stage in job.stages}
