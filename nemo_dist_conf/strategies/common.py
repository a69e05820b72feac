"""Rules that more than one strategy has."""

from __future__ import annotations

from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.topology import Paths

__all__ = ["autocast_problems", "off_but_changed"]


def autocast_problems(conf: Mapping[str, Any], paths: Paths) -> list[Problem]:
    """torch.autocast in float32 does nothing, so asking for it is a mistake."""
    if getattr(conf["autocast_dtype"], "name", conf["autocast_dtype"]) != "float32":
        return []
    return [
        Problem(
            "strategy.autocast_dtype=float32 would change nothing",
            paths.set("strategy.autocast_dtype", "float32"),
            "bfloat16, float16, or null for no autocast",
            paths.set("strategy.autocast_dtype", None),
        )
    ]


def off_but_changed(node: Mapping[str, Any] | None, default: Any, name: str, paths: Paths) -> list[Problem]:
    """A policy that is off while one of its values was changed: which of the two was meant?"""
    if node is None or node["enabled"]:
        return []
    changed = [key for key, value in node.items() if key != "enabled" and value != getattr(default, key)]
    if not changed:
        return []
    key = f"{name}.{changed[0]}"
    value = getattr(node[changed[0]], "name", node[changed[0]])
    return [
        Problem(
            f"{key} was changed, but the policy is off",
            paths.set(key, value),
            f"{paths.set(f'{name}.enabled', True)} with it, or its default",
            f"{paths.set(f'{name}.enabled', True)} {paths.set(key, value)}",
        )
    ]
