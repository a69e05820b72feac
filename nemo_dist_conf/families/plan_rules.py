"""What can be wrong with a typed plan of tensor parallelism, told without building the model; no torch.

runtime/techniques/tensor/parallel.py asks the built module the rest: a user's own module, and whether a style
fits its layer.
"""

from __future__ import annotations

from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.families.config_facts import ModelFacts
from nemo_dist_conf.families.plans import complete_plan
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.families.styles import STYLES, find_style, match_pattern, unalias
from nemo_dist_conf.names import nearest
from nemo_dist_conf.wording import Spelling

__all__ = ["known_modules", "plan_problems", "style_names"]

_KEY = "strategy.tp_plan"


def plan_problems(plan: Any, facts: ModelFacts, spelling: Spelling = Spelling()) -> list[Problem]:
    """Entries whose style has no such name, or whose pattern is no module of a known family's model.

    plan: value of ``strategy.tp_plan``; styles that are objects are left to the runtime.
    """
    if plan is None:
        return []
    asked = spelling.set(_KEY, plan)
    if not isinstance(plan, Mapping) or not plan:
        what = (
            f"{spelling.key(_KEY)} is {'empty' if isinstance(plan, Mapping) else repr(plan)}, not styles by module name"
        )
        allowed = "a mapping from module names (* allowed) to styles, or null for the model's own"
        return [Problem(what=what, asked=asked, allowed=allowed, instead=spelling.set(_KEY, None))]
    known = _modules(facts)
    found: list[tuple[str, str, str]] = []
    fixed: dict[str, Any] = {}
    for pattern, style in ((str(pattern), style) for pattern, style in plan.items()):
        better, name = style, pattern
        if isinstance(style, str) and find_style(style) is None:
            near, allowed = style_names(style)
            found.append((f"tp_plan: {style!r} is not the name of a style", f"{pattern}: {style}", allowed))
            better = near[0] if near else "replicated"
        if known and not any(match_pattern(pattern, module) for module in _matching(known, facts)):
            close = nearest(pattern, known) or known[:5]
            what = f"tp_plan: no module of {facts.model_type} is named {pattern}"
            found.append((what, f"{pattern}: {style}", ", ".join(close)))
            name = next((other for other in close if other not in plan), "")
        if name:
            fixed[name] = better
    # A family's own plan is known to fit; of any other only a run could tell.
    way_out = spelling.set(_KEY, fixed if _fits(fixed, facts) else None)
    return [Problem(what=what, asked=asked, allowed=allowed, instead=way_out) for what, asked, allowed in found]


def style_names(style: object) -> tuple[list[str], str]:
    """(style names that look like this one, all of them as a list for a reader)."""
    near = nearest(str(style), STYLES)
    known = (*near, *(name for name in STYLES if name not in near))
    return near, f"{', '.join(known)}; in Python also a torch ParallelStyle"


def _fits(plan: Mapping[str, Any], facts: ModelFacts) -> bool:
    """Whether a plan is known to compute the same: each attention and each MLP is split as its family's, or not at all.

    A matrix that is split without those beside it gives a part where the code between them takes the whole.
    """
    own = complete_plan(facts.model_type)
    if not plan or own is None:
        return False
    modules, split = _matching(_modules(facts), facts), set()
    for module in dict.fromkeys(modules):
        style = next((unalias(its) for pattern, its in plan.items() if match_pattern(pattern, module)), "replicated")
        usual = next((style for pattern, style in own.items() if match_pattern(pattern, module)), "replicated")
        if style not in ("replicated", usual):
            return False
        parts = module.split(".")
        if usual == "gather_input":  # may be left out: each layer inside then gathers for itself
            split |= {(module, True)} if style == usual else set()
        elif usual != "replicated" and any(part.isdigit() for part in parts):
            split.add((".".join(parts[:-1]), style == usual))
    return not any((holder, not whole) in split for holder, whole in split)


def _modules(facts: ModelFacts) -> list[str]:
    """Patterns of all modules of a causal language model; empty where its family's row does not say them all."""
    family = find_family(facts.model_type)
    if family is None or family.tensor_plan is None or facts.num_layers is None:
        return []
    styles, places = family.tensor_plan, family.places
    if places.unstyled is None:
        return []
    has_norms = family.shapes is not None and family.shapes.qk_norm
    layers = [name for name in styles.block if has_norms or not name.endswith(("q_norm", "k_norm"))]
    inside = [f"{places.blocks}.*.{name}" for name in (*layers, *styles.inputs, *styles.norms)]
    others = [places.embedding, places.final_norm, f"{places.blocks}.*", *places.unstyled]
    base = [places.base] if places.base else []
    return [*map(places.in_base, (*inside, *others)), places.head, *base]


def known_modules(facts: ModelFacts) -> list[str]:
    """Names of all modules of a causal language model; empty where its family's row does not say them all."""
    return list(dict.fromkeys(_matching(_modules(facts), facts)))


def _matching(patterns: list[str], facts: ModelFacts) -> list[str]:
    """The modules behind the patterns, of the first and the last block and all between."""
    layers = [str(index) for index in range(facts.num_layers or 0)]
    return [pattern.replace(".*", f".{index}", 1) for pattern in patterns for index in layers]
