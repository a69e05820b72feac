"""What a strategy is to the rest of the package: one row, torch-free."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Callable, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import ACTIVATION_CHECKPOINTING_MODES, STRATEGY_NAMES
from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.wording import Spelling

__all__ = ["Rules", "Strategy"]

#: (the strategy node as plain values, the sizes, spelling of keys) -> what cannot work
Rules = Callable[[Mapping[str, Any], Mapping[str, Any], Spelling], list[Problem]]


@dataclass(frozen=True)
class Strategy:
    """One strategy: its schema, its axes, its rules, and where its typed config and its manager are.

    typed, manager: ``module:Class``, imported when the strategy is executed, never while composing.
    executes: axes whose execution exists; the others compose and are planned, but are refused before a start.
    costs: ``module:OBJECT``, an instance of nemo_dist_conf.plan.strategies.base.StrategyCosts, imported by the plan
    alone; None: the plan refuses the strategy by name.
    """

    name: str
    schema: type
    typed: str
    axes: AxisRules
    rules: Rules
    manager: str
    activation_checkpointing: tuple[bool | str, ...] = ACTIVATION_CHECKPOINTING_MODES
    executes: frozenset[str] = frozenset()
    costs: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *STRATEGY_NAMES[self.name])

    @property
    def target(self) -> str:
        """Class path of the typed config, which identifies a composed node of this strategy."""
        return f"nemo_dist_conf.config.{self.typed.partition(':')[2]}"

    @property
    def config(self) -> Any:
        """The class of the typed config, which holds torch's objects: asking for it imports torch."""
        return _load(self.typed)

    def load_manager(self) -> Any:
        return _load(self.manager)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
