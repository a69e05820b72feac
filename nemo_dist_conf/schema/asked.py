"""What else is asked for beside a group of ours, for its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

from nemo_dist_conf.wording import Spelling

__all__ = ["Asked", "Idle"]


@dataclass(frozen=True)
class Asked:
    """A config without the group at hand.

    strategy: its row (``strategies.Strategy``). values: of its node, by field. sizes: of the axes, by field
    (``cp_size``); the default in place of one that is refused. facts: of the model
    (``families.config_facts.ModelFacts``). groups: values of all groups of ours.
    """

    strategy: Any
    values: Mapping[str, Any]
    sizes: Mapping[str, Any]
    activation_checkpointing: bool | str
    facts: Any
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    spelling: Spelling = Spelling()


@dataclass(frozen=True)
class Idle:
    """The setting on account of which all of a group would do nothing, what it is, and what it would have to be."""

    key: str
    value: Any
    needed: str
