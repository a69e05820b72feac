"""The group ``recompute``: what activation checkpointing runs again, in effect where that is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, List, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.wording import typed

__all__ = ["RecomputeConf", "idle_recompute", "recompute_problems"]


@dataclass
class RecomputeConf:
    """What activation_checkpointing runs again in backward: every block, or fewer."""

    scope: str = option(
        "all",
        "whose blocks run again: all; language, vision, audio: of towers that take that in; or the name of a module "
        "that holds blocks (encoder, model.visual)",
    )
    every: int = option(1, "of the blocks in scope, the first of each so many in a list; 1: all")
    modules: List[str] = option(
        list,
        "what of those blocks runs again: blocks (layers.0, layers.[02]) or modules in them (mlp), by the ends of "
        "their names, * within one part; []: whole blocks",
    )


def idle_recompute(asked: Asked) -> Idle | None:
    """Nothing is recomputed."""
    if asked.activation_checkpointing is not False:
        return None
    modes = [typed(mode) for mode in asked.strategy.activation_checkpointing if mode is not False]
    return Idle("activation_checkpointing", False, " or ".join(modes))


def recompute_problems(values: Mapping[str, Any], asked: Asked) -> Iterator[Problem]:
    """What cannot work in the settings, whatever the model; its towers and modules are asked when it is there."""
    if not values["scope"].strip("*. "):
        yield _problem(asked, "scope", values, "is no name", "all, language, vision, audio, or a module's name", "all")
    if values["every"] < 1:
        yield _problem(asked, "every", values, "leaves no block to run again", "a whole number, 1 or more", 1)
    empty = [name for name in values["modules"] if not isinstance(name, str) or not name.strip(". ")]
    if empty:
        rest = [name for name in values["modules"] if name not in empty]
        yield _problem(asked, "modules", values, "has what is no name", "[], or names of modules", rest)


def _problem(asked: Asked, field: str, values: Mapping[str, Any], wrong: str, allowed: str, best: Any) -> Problem:
    key, value = f"recompute.{field}", values[field]
    said = asked.spelling.set(key, value)
    return Problem(what=f"{said} {wrong}", asked=said, allowed=allowed, instead=asked.spelling.set(key, best))
