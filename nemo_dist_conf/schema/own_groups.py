"""The config groups that are ours beyond those of the API page: what each one holds and what cannot work. No torch.

Their options are in ``names.OWN_GROUPS``, which every Hydra app imports. Values reach the rules of other layers and the
runtime as ``Checked.groups`` and ``Engine.groups``: group -> field -> value.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.context import ContextConf, context_problems, idle_context

__all__ = ["OWN_SCHEMAS", "OwnGroup", "default_groups", "own_group"]


@dataclass(frozen=True)
class OwnGroup:
    """One group.

    idle: why none of its settings would do anything, so that changed ones are refused; None: they would.
    problems: what cannot work in its values beside what else is asked for.
    """

    schema: type
    idle: Callable[[Asked], Idle | None]
    problems: Callable[[Mapping[str, Any], Asked], Iterable[Problem]]


_GROUPS: dict[str, OwnGroup] = {
    "context": OwnGroup(ContextConf, idle_context, context_problems),
}

#: Group -> its schema.
OWN_SCHEMAS: dict[str, type] = {name: group.schema for name, group in _GROUPS.items()}


def own_group(name: str) -> OwnGroup:
    """The group of this name."""
    return _GROUPS[name]


def default_groups() -> dict[str, Mapping[str, Any]]:
    """What all of them hold where nothing is asked for."""
    return {name: dataclasses.asdict(schema()) for name, schema in OWN_SCHEMAS.items()}
