"""Rules that need to know the model or the batch: what each axis must divide."""

from __future__ import annotations

from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.families.config_facts import ModelFacts, is_dense_family
from nemo_dist_conf.topology.sequence_chunks import chunk_problem
from nemo_dist_conf.topology.solve import divisors
from nemo_dist_conf.wording import Spelling, assigned

__all__ = ["layerdrop_problems", "model_problems", "tied_head_problems"]


def _tensor_parallel_sizes(facts: ModelFacts, ep: int) -> list[int] | None:
    """Every tp_size that divides heads, kv heads and the widths of MLPs; None when the model does not say them.

    Experts that the axis ep holds are whole.

    The vocabulary is not in it: torch shards it unevenly and the logits stay exact.
    """
    expert_width = facts.expert_width if ep == 1 else None
    widths = (facts.num_heads, facts.num_kv_heads, facts.intermediate_size, expert_width)
    known = [n for n in widths if n and n > 0]
    if not known:
        return None
    return [d for d in divisors(min(known)) if all(n % d == 0 for n in known)]


def layerdrop_problems(
    config: Mapping[str, Any],
    strategy: Mapping[str, Any],
    sizes: Mapping[str, Any],
    world_size: int,
    spelling: Spelling,
) -> list[Problem]:
    """What does not go with a model that skips layers at random, where its config says so.

    config: fields of a transformers model's config as they are typed. strategy: values of that node.
    """
    skipping = {k: v for k, v in config.items() if "layerdrop" in k.replace("_", "") and _is_number(v) and v > 0}
    for key, value in skipping.items():
        said, switch = spelling.set(f"model.config.{key}", value), "strategy.find_unused_parameters"
        off = f"{key}=0: a model that runs all its layers"
        if (sizes.get("pp_size") or 1) > 1:
            what = f"{said}: the stages of a pipeline would not skip the same layers"
            one = spelling.set("parallelism.pp_size", 1)
            asked = f"{said} {spelling.set('parallelism.pp_size', sizes['pp_size'])}"
            return [Problem(what=what, asked=asked, allowed=f"pp_size=1, or {off}", instead=one)]
        if world_size > 1 and strategy.get("find_unused_parameters") is False:
            what = f"{said}: layers that a step skips get no gradient, which DDP has to be told"
            on = spelling.set(switch, True)
            return [
                Problem(what=what, asked=f"{said} {spelling.set(switch, False)}", allowed=f"{on}, or {off}", instead=on)
            ]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def model_problems(
    facts: ModelFacts,
    sizes: Mapping[str, Any],
    world_size: int,
    seq_len: int | None = None,
    spelling: Spelling = Spelling(),
    moe: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """What in the sizes does not fit the model or the sequence length [tokens]; suggestions fit the world size too.

    moe: values of that group; None: its defaults.
    """
    problems = []
    tp, cp, ep = (sizes.get(name) or 1 for name in ("tp_size", "cp_size", "ep_size"))
    pp = sizes.get("pp_size") or 1
    legal = _tensor_parallel_sizes(facts, ep)
    if legal is not None and tp not in legal:
        odd = [
            f"{count} {title}"
            for count, title in (
                (facts.num_heads, "attention heads"),
                (facts.num_kv_heads, "key/value heads"),
                (facts.intermediate_size, "MLP columns"),
                (facts.expert_width if ep == 1 else None, "columns of an expert"),
            )
            if count and count % tp
        ]
        problems.append(
            Problem(
                what=f"tp_size={tp} does not divide the model's {' and '.join(odd)}",
                asked=spelling.set("parallelism.tp_size", tp),
                allowed=f"tp_size: {', '.join(map(str, legal))}",
                instead=spelling.set("parallelism.tp_size", max(d for d in legal if d <= tp and world_size % d == 0)),
            )
        )
    uneven = None if seq_len is None else chunk_problem(seq_len, cp, spelling)
    if uneven is not None:
        problems.append(uneven)
    if pp > 1 and facts.balances_experts:
        problems.append(
            Problem(
                what="the loss that balances experts is taken over all layers at once, and a pipeline rank has "
                "only its own",
                asked=f"{spelling.set('parallelism.pp_size', pp)} {_said(facts, 'output_router_logits')}",
                allowed="pp_size=1, or training without that loss",
                instead=spelling.set("parallelism.pp_size", 1)
                if facts.folder
                else "model.config.output_router_logits=false",
            )
        )
    if ep > 1:
        problems += _expert_problems(facts, ep, spelling)
        problems += tied_head_problems(moe or {}, spelling) if facts.tied else []
    return problems


def _said(facts: ModelFacts, field: str) -> str:
    """What asked for a field that is on: the folder of a checkpoint, or the field itself."""
    return assigned("model.name_or_path", facts.folder) if facts.folder else f"model.config.{field}=true"


def tied_head_problems(moe: Mapping[str, Any], spelling: Spelling = Spelling()) -> list[Problem]:
    """What of the group moe would make a unit of a head whose weights are the embedding's."""
    together = {"lm_head_precision": None, "wrap_outer_model": True}
    apart = [key for key, value in together.items() if moe.get(key, value) != value]
    if not apart:
        return []
    asked = [spelling.set(f"moe.{key}", getattr(moe[key], "name", moe[key])) for key in apart]
    instead = " ".join(spelling.set(f"moe.{key}", together[key]) for key in apart)
    return [
        Problem(
            what="the model's embedding and head are one parameter, which cannot be sharded in two units",
            asked=" ".join([*asked, "model.config.tie_word_embeddings=true"]),
            allowed=f"{instead}, or a head with weights of its own",
            instead=instead,
        )
    ]


def _expert_problems(facts: ModelFacts, ep: int, spelling: Spelling) -> list[Problem]:
    asked = spelling.set("parallelism.ep_size", ep)
    if facts.num_experts is None and not is_dense_family(facts.model_type or ""):
        return []  # the model is asked itself when it is built
    if not facts.num_experts:
        return [
            Problem(
                what=f"ep_size={ep}, but the model ({facts.model_type}) has no experts",
                asked=asked,
                allowed="ep_size=1, or a mixture-of-experts model",
                instead=spelling.set("parallelism.ep_size", 1),
            )
        ]
    if facts.num_experts % ep == 0:
        return []
    legal = divisors(facts.num_experts)
    return [
        Problem(
            what=f"ep_size={ep} does not divide the model's {facts.num_experts} experts",
            asked=asked,
            allowed=f"ep_size: {', '.join(map(str, legal))}",
            instead=spelling.set("parallelism.ep_size", max(d for d in legal if d <= ep)),
        )
    ]
