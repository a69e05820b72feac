"""A model read off what its config builds on the meta device, for a plan: names, shapes, blocks, experts, work.

No tensor has a value, so a model of any size takes seconds and no memory. Where blocks, experts and units are is asked
of what finds them for a run.
"""

from __future__ import annotations

import functools
import textwrap
from typing import Any, Iterable

import torch
from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.built_shape import BuiltShape, Gathered, Run, estimated_run
from nemo_dist_conf.families.config_facts import ModelFacts, facts_from_config, fields_of
from nemo_dist_conf.families.shapes import Weight
from nemo_dist_conf.runtime.engines.fsdp2_unit_rules import input_embeddings, output_embeddings, unshared
from nemo_dist_conf.runtime.engines.fsdp2_units import large_outer
from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.build import build_without_values
from nemo_dist_conf.runtime.model.meta_forward import run_on_meta
from nemo_dist_conf.runtime.model.towers import tower_words
from nemo_dist_conf.runtime.model.without_saving import without_saving
from nemo_dist_conf.runtime.techniques.activation_checkpointing import called_inside, kept_operators
from nemo_dist_conf.runtime.techniques.context.on_paper import gathered_on_paper
from nemo_dist_conf.runtime.techniques.context.parallel import Ways
from nemo_dist_conf.runtime.techniques.context.trial import ways_on_paper
from nemo_dist_conf.runtime.techniques.expert.parallel import find_experts
from nemo_dist_conf.runtime.techniques.tensor.plan_on_paper import known_plan
from nemo_dist_conf.wording import assigned

__all__ = ["read_model"]

#: Rows and tokens of the first run, which tells whether a model's forward can be counted at all.
_SMALL = (1, 16)
#: Elements, 8 GiB of float32, up to which a part of the model is given values to try something on it.
_MOST_TRIED = 2**31
#: How configs of transformers call the number of experts that a token is sent to.
_TOP = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def read_model(node: Any) -> BuiltShape:
    """The shape of the model that a config's node ``model`` describes, its own class (``_target_``) too.

    Raises ConfigError or DataError, with the reason, for what cannot be built without values.
    """
    built = build_without_values(node)
    model, config = built.model, getattr(built.model, "config", None)
    blocks = find_blocks(model, built.blocks)
    if not blocks:
        what = f"{type(model).__name__} shows no repeated layers, of which a plan is made"
        allowed = "a list of layers of one class, or model.distributed_blocks"
        raise ConfigError(Problem(what=what, asked="model", allowed=allowed, instead="model=llama3_8b"))
    facts = facts_from_config(fields_of(config)) if hasattr(config, "to_dict") else ModelFacts()
    small, why = _tried(model.train(), blocks)
    held, outer = _weights(model, blocks, small)
    embedding, head = input_embeddings(model), output_embeddings(model)
    names = {id(module): name for name, module in model.named_modules()}
    front, back = large_outer(model, list(blocks.values()))
    experts = facts.num_experts or 0
    top = _first_whole(config, _TOP) if experts else None
    total = sum(weight.count for weights in (*held, outer) for weight in weights)
    shape = BuiltShape(
        model_type=facts.model_type or type(model).__name__,
        source=f"{type(model).__name__} built without values (torch was imported for it)",
        facts=facts,
        names=tuple(blocks),
        held=held,
        outer=outer,
        hidden=_hidden(small, model, config),
        vocab=(small.vocab if small is not None else 0) or facts.vocab_size or 0,
        tied=_weight(head) is not None and _weight(head) is _weight(embedding),
        experts=experts,
        experts_per_token=top or 0,
        active_parameters=total - (_routed(held) * (experts - top) // experts if experts and top else 0),
        front=(names[id(front)],) if front is not None else (),
        back=tuple(names[id(module)] for module in back),
        plan_of=functools.lru_cache(lambda split: plan(split)),
        run_of=lambda rows, length, dtype, fuses_dropout: run(rows, length, dtype, fuses_dropout),
        run_without=lambda rows, length, dtype, fuses_dropout, names, selective: run(
            rows, length, dtype, fuses_dropout, names, selective
        ),
        gathered_of=lambda size, rows, length, dtype: gathered(size, rows, length, dtype),
        why_estimated=why,
        rotary_width=_first_whole(config, ("qk_rope_head_dim",)) or 0,
        words=tower_words(model, blocks),
        inside=called_inside(blocks),
        aliases=_aliases(model),
    )

    @functools.lru_cache(maxsize=256)
    def run(
        rows: int, length: int, dtype: str, fuses_dropout: bool, again: tuple[str, ...] = (), selective: bool = False
    ) -> Run:
        if why:
            return estimated_run(shape, rows, length, getattr(torch, dtype).itemsize)
        try:
            with without_saving(map(model.get_submodule, again), kept_operators() if selective else frozenset()):
                return run_on_meta(model, blocks, kept_operators(), rows, length, dtype, fuses_dropout)
        except Exception as error:  # whatever a model's own forward raises
            raise ConfigError(_not_counted(model, blocks, rows, length, dtype, error)) from error

    def plan(sequence_parallel: bool) -> dict[str, Any]:
        return known_plan(model, sequence_parallel, _twin_elements(shape) <= _MOST_TRIED)

    @functools.cache
    def ways(size: int) -> Ways:
        return ways_on_paper(model, size, blocks) if _twin_elements(shape) <= _MOST_TRIED else Ways()

    @functools.lru_cache(maxsize=64)
    def gathered(size: int, rows: int, length: int, dtype: str) -> tuple[Gathered, ...]:
        return gathered_on_paper(model, blocks, ways(size), rows, length, dtype)

    return shape


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters -> their first ones."""
    first: dict[int, str] = {}
    named = ((name, id(one)) for name, one in model.named_parameters(remove_duplicate=False))
    return {name: first[key] for name, key in named if first.setdefault(key, name) != name}


def _not_counted(model: nn.Module, blocks: Blocks, rows: int, length: int, dtype: str, error: Exception) -> Problem:
    """Whether it is the number of tokens, or the dtype, that a model's forward does not take."""
    name = type(model).__name__
    try:
        run_on_meta(model, blocks, kept_operators(), rows, length, "float32")
    except Exception:  # the same
        what = f"{name} does not take {rows} x {length} tokens: {_reason(error)}"
        allowed, asked = f"what its forward takes, as {_SMALL[1]} tokens", f"data.seq_len={length}"
        return Problem(what=what, asked=asked, allowed=allowed, instead=assigned("data.seq_len", _SMALL[1]))
    what = f"{name} cannot compute with parameters in {dtype} as it is written: {_reason(error)}"
    asked, allowed = f"train.dtype={dtype}", "float32; a model that casts (buffer.to(x.dtype))"
    return Problem(what=what, asked=asked, allowed=allowed, instead="train.dtype=float32")


def _twin_elements(shape: BuiltShape) -> int:
    """Elements of one block of each kind, and of all that is outside of blocks."""
    held = [shape.held[kind] for kind in shape.kinds()]
    return sum(weight.count for weights in (*held, shape.outer) for weight in weights)


def _tried(model: nn.Module, blocks: Blocks) -> tuple[Run | None, str]:
    """(a small run, "") or (None, why its forward cannot be counted)."""
    try:
        return run_on_meta(model, blocks, kept_operators(), *_SMALL, "float32"), ""
    except Exception as error:  # whatever a model's own forward raises
        return None, _reason(error)


def _reason(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return textwrap.shorten(lines[0], 160, placeholder=" ...")


def _weights(
    model: nn.Module, blocks: Blocks, small: Run | None
) -> tuple[tuple[tuple[Weight, ...], ...], tuple[Weight, ...]]:
    """(weights of each block, those outside); of a block that shares a parameter with anything, all are outside."""
    units = unshared(model, blocks)
    experts = {id(p): module for module in find_experts(model).values() for p in module.parameters()}
    owners = dict(model.named_modules())
    held: dict[str, list[Weight]] = {name: [] for name in blocks}
    outer: list[Weight] = []
    for name, parameter in model.named_parameters():
        block, module = _block_of(name, blocks), owners[name.rpartition(".")[0]]
        layer = type(module).__name__
        is_expert = id(parameter) in experts and parameter.dim() > 1
        trained = parameter.requires_grad and (small is None or small.used is None or name in small.used)
        if block in units:
            own = name.removeprefix(f"{block}.")
            held[block].append(Weight(own, tuple(parameter.shape), "", is_expert, layer, trained))
        else:
            part = _part_of(name, model, blocks, small)
            outer.append(Weight(name, tuple(parameter.shape), part, False, layer, trained))
    # Backward has the gradients of what runs last first.
    return tuple(tuple(reversed(weights)) for weights in held.values()), tuple(outer)


def _block_of(name: str, blocks: Iterable[str]) -> str:
    """The block that a parameter is in; "" outside of them."""
    parts = name.split(".")
    return next((block for end in range(len(parts), 0, -1) if (block := ".".join(parts[:end])) in blocks), "")


def _part_of(name: str, model: nn.Module, blocks: Blocks, small: Run | None) -> str:
    """``embedding`` before the blocks, ``head``, or ``final_norm``: what else comes after them."""
    owner = name.rpartition(".")[0]
    head = output_embeddings(model)
    if head is not None and any(module is model.get_submodule(owner) for module in head.modules()):
        return "head"
    if small is not None:
        return "embedding" if owner in small.first else "final_norm"
    order = [place for place, _ in model.named_modules()]
    return "embedding" if order.index(owner) < order.index(next(iter(blocks))) else "final_norm"


def _hidden(small: Run | None, model: nn.Module, config: Any) -> int:
    """The width of the residual stream."""
    found = small.width if small is not None else 0
    embedding = input_embeddings(model)
    return found or getattr(config, "hidden_size", 0) or getattr(embedding, "embedding_dim", 0)


def _weight(module: nn.Module | None) -> Any:
    return getattr(module, "weight", None)


def _routed(held: Iterable[tuple[Weight, ...]]) -> int:
    """Elements of all experts that tokens are sent to."""
    return sum(w.count for weights in held for w in weights if w.expert or "experts" in w.name.split("."))


def _first_whole(config: Any, names: Iterable[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)
