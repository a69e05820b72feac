"""How attention sees the tokens of other ranks of the axis cp in a plan: what the runtime chooses, and its sizes."""

from __future__ import annotations

from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.topology.head_exchange import chosen_method, sent_kv_heads

__all__ = ["context_shown", "kv_copies", "method_of"]


def method_of(job: Job) -> str:
    """``gather`` or ``ulysses``, of attentions that ask the registry of transformers."""
    return chosen_method(job.context_method, *_heads(job), job.cp)


def kv_copies(job: Job) -> int:
    """How often ulysses sends each head of keys and values."""
    _, kv_heads = _heads(job)
    return sent_kv_heads(kv_heads, job.cp) // kv_heads if kv_heads else 1


def context_shown(job: Job) -> str:
    """The method and what it does, in words."""
    facts = job.model.facts if isinstance(job.model, BuiltShape) else None
    does = "keys and values are gathered"
    if facts is not None and facts.own_attention:
        does = "what attention is given is gathered"
    if method_of(job) == "ulysses":
        does = f"tokens are exchanged for {_heads(job)[0] or 0:,} heads"
    return f"{method_of(job)} (context.method={job.context_method}): {does}"


def _heads(job: Job) -> tuple[int | None, int | None]:
    """Heads of queries and of keys on a rank along tp."""
    model = job.model
    if isinstance(model, BuiltShape) and model.facts.own_attention:
        return None, None
    heads = model.heads
    kv_heads = model.kv_heads or heads
    if not heads or not kv_heads or heads % job.tp or kv_heads % job.tp:
        return heads, kv_heads
    return heads // job.tp, kv_heads // job.tp
