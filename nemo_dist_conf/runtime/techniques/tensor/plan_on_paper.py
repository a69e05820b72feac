"""How a model would be split that is planned and not run: nothing is tried on ranks."""

from __future__ import annotations

from typing import Any, Mapping

from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.found_styles import found_styles
from nemo_dist_conf.families.styles import find_style, match_pattern, unalias
from nemo_dist_conf.runtime.model.blocks import find_blocks
from nemo_dist_conf.runtime.model.trial import first_line, small_input, twin
from nemo_dist_conf.runtime.techniques.tensor.brought_plan import (
    declared_plan,
    family_plan,
    has_other_adapters,
    inside_wrapper,
    is_pattern,
    is_transformers,
    model_type,
    with_tied,
)
from nemo_dist_conf.runtime.techniques.tensor.derived_plan import likely_plan
from nemo_dist_conf.runtime.techniques.tensor.stream import (
    CannotFollow,
    not_followed,
    refuse_shared_parameters,
    sequence_ways,
)

__all__ = ["known_plan"]

#: Of a small input.
_TOKENS = 8


def known_plan(model: nn.Module, sequence_parallel: bool = False, follows: bool = True) -> dict[str, Any]:
    """Pattern -> style name for a model on paper: what it comes with, else what would be tried first.

    Nothing is tried on ranks. sequence_parallel: where the family says nothing of it, the residual stream is followed
    through a small twin on the CPU; follows False: each style's own twin is taken.
    Raises ConfigError for a model that has nothing to split, or whose residual stream cannot be followed.
    """
    declared = declared_plan(model)
    if declared is not None:
        return {str(pattern): style for pattern, style in dict(declared[1]).items() if isinstance(style, str)}
    found = None if has_other_adapters(model) else family_plan(model, sequence_parallel)
    if found is None and sequence_parallel:
        plain = known_plan(model)
        if not follows:
            known = {pattern: find_style(style) for pattern, style in plain.items()}
            return {pattern: (style and style.sequence_twin) or plain[pattern] for pattern, style in known.items()}
        return _followed(model, plain)
    if found is not None:
        return _as_found(model, with_tied(model, found))
    why = ""
    try:
        found = likely_plan(model) if is_transformers(model) else {}
    except Exception as error:  # the model's own code
        found, why = {}, f": it does not run on a small input ({first_line(error)})"
    if not found:
        what = f"nothing is known of how {type(model).__name__} would be split over ranks{why}"
        allowed = "tp_size=1, a tp_plan here or as an attribute of the model"
        raise ConfigError(
            Problem(what=what, asked="parallelism.tp_size", allowed=allowed, instead="parallelism.tp_size=1")
        )
    return _as_found(model, found)


def _as_found(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """A plan on paper as trying one has changed it for a small model of the family."""
    wrapper, inner = inside_wrapper(model)
    found = found_styles(model_type(inner))
    if wrapper:
        found = {f"{wrapper}.{pattern}": style for pattern, style in found.items()}
    return {**found, **{pattern: style for pattern, style in plan.items() if pattern not in found}}


def _followed(model: nn.Module, plan: Mapping[str, str]) -> dict[str, Any]:
    """Module name -> styles, the first way in which the residual stream of a model on paper can be split."""
    blocks = find_blocks(model)
    places = [*(name for name, _ in model.named_modules() if name), *(name for name, _ in model.named_parameters())]
    patterns = [pattern for pattern in plan if is_pattern(pattern)]
    named: dict[str, str] = {}
    for name in places:
        meant = name if name in plan else next((p for p in patterns if match_pattern(p, name)), None)
        named |= {name: unalias(plan[meant])} if meant is not None else {}
    try:
        refuse_shared_parameters(model, list(blocks))
        tried = twin(model, blocks)
        inputs = small_input(tried, _TOKENS)
        if inputs is None:
            raise CannotFollow("nobody says what its forward takes")
        return dict(sequence_ways(tried, list(blocks), named, inputs)[0])
    except CannotFollow as error:
        raise ConfigError(not_followed(model, str(error), "")) from None
