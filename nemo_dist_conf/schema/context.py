"""The group ``context``: how tokens see the whole sequence, in effect where cp_size is above 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.wording import unknown_name

__all__ = ["ContextConf", "context_problems", "idle_context"]

#: What ``context.method`` accepts.
_METHODS: tuple[str, ...] = ("auto", "gather")


@dataclass
class ContextConf:
    """Context parallelism beyond its size."""

    method: str = option("auto", "auto, gather: keys and values of the whole sequence are gathered over the cp ranks")


def idle_context(asked: Asked) -> Idle | None:
    """Nothing is split along the sequence."""
    return Idle("cp_size", 1, "2 or more") if asked.sizes["cp_size"] == 1 else None


def context_problems(values: Mapping[str, Any], asked: Asked) -> Iterator[Problem]:
    """What cannot work in the settings."""
    if values["method"] not in _METHODS:
        yield unknown_name(
            values["method"],
            _METHODS,
            what=f"context.method={values['method']} is not a way to see the whole sequence",
            asked=asked.spelling.set("context.method", values["method"]),
            allowed=", ".join(_METHODS),
            offer=lambda known: asked.spelling.set("context.method", known),
        )
