"""The group ``context``: how tokens see the whole sequence, in effect where cp_size is above 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.wording import Spelling, unknown_name

__all__ = ["ContextConf", "MASKLESS", "context_problems", "head_problems", "idle_context"]

#: What ``context.method`` accepts.
_METHODS: tuple[str, ...] = ("auto", "gather", "ulysses")
#: Known and refused.
_RING = "ring"
#: Implementations of attention that take no mask of queries and keys.
MASKLESS = ("flash_attention", "flex_attention")


@dataclass
class ContextConf:
    """Context parallelism beyond its size."""

    method: str = option(
        "auto",
        "how attention sees other cp ranks' tokens; gather: keys and values of all tokens on each; ulysses: tokens "
        "exchanged for heads, all tokens of heads / cp_size on each; auto: ulysses where cp_size divides heads (of a "
        "tp rank) and it sends less: heads + key/value heads as sent < cp_size x key/value heads; else gather",
    )


def idle_context(asked: Asked) -> Idle | None:
    """Nothing is split along the sequence."""
    return Idle("cp_size", 1, "2 or more") if asked.sizes["cp_size"] == 1 else None


def context_problems(values: Mapping[str, Any], asked: Asked) -> Iterator[Problem]:
    """What cannot work in the settings."""
    method, spelling = values["method"], asked.spelling
    if method == _RING:
        yield Problem(
            what="context.method=ring: torch's ring attention has kernels for CUDA alone and takes no windows, "
            "documents, sinks or soft caps, and nothing shows that a model would compute the same with it",
            asked=spelling.set("context.method", _RING),
            allowed=", ".join(_METHODS),
            instead=spelling.set("context.method", "auto"),
        )
    elif method not in _METHODS:
        yield unknown_name(
            method,
            _METHODS,
            what=f"context.method={method} is not a way to see the whole sequence",
            asked=spelling.set("context.method", method),
            allowed=", ".join(_METHODS),
            offer=lambda known: spelling.set("context.method", known),
        )
    yield from head_problems(method, asked.facts, asked.sizes, spelling)
    yield from _own_attention_problems(method, asked)


def head_problems(
    method: str, facts: Any, sizes: Mapping[str, Any], spelling: Spelling = Spelling()
) -> Iterator[Problem]:
    """That heads are not to be had in equal parts by the ranks which exchange tokens for them, where a config says so.

    facts: of the model (``families.config_facts.ModelFacts``). A tp_size that does not divide them is another rule's.
    """
    tp, cp = (sizes.get(name) or 1 for name in ("tp_size", "cp_size"))
    heads = facts.num_heads
    if method != "ulysses" or cp == 1 or not heads or heads % tp or heads // tp % cp == 0:
        return
    of_rank = f"{heads // tp:,} heads of a tp rank" if tp > 1 else f"{heads:,} attention heads"
    legal = [size for size in range(1, heads // tp + 1) if heads // tp % size == 0]
    asked = [spelling.set("context.method", method), spelling.set("parallelism.cp_size", cp)]
    asked += [spelling.set("parallelism.tp_size", tp)] if tp > 1 else []
    yield Problem(
        what=f"context.method=ulysses: cp_size={cp} does not divide the model's {of_rank}",
        asked=" ".join(asked),
        allowed=f"cp_size: {', '.join(map(str, legal))}; or context.method=gather",
        instead=spelling.set("context.method", "gather"),
    )


def _own_attention_problems(method: str, asked: Asked) -> Iterator[Problem]:
    """What a model cannot have whose attention asks no registry, so that each rank runs it on whole rows."""
    facts, spelling = asked.facts, asked.spelling
    if asked.sizes["cp_size"] == 1 or not facts.own_attention:
        return
    cp = spelling.set("parallelism.cp_size", asked.sizes["cp_size"])
    does = f"{facts.model_type}'s attention asks no registry of transformers, so every cp rank runs it on whole rows"
    if method == "ulysses":
        gather = spelling.set("context.method", "gather")
        yield Problem(
            what=f"context.method=ulysses would do nothing: {does}",
            asked=f"{spelling.set('context.method', method)} {cp}",
            allowed=f"{gather}, which gathers what that attention is given",
            instead=gather,
        )
    kernel = facts.attention or ""
    if kernel.startswith(MASKLESS) or "/" in kernel:
        yield Problem(
            what=f"{does}, with a mask that {kernel} does not take",
            asked=f"model.config.attn_implementation={kernel} {cp}",
            allowed="attn_implementation=eager, or cp_size=1",
            instead="++model.config.attn_implementation=eager",  # whether or not a file has it
        )
