"""The costs that a strategy's row names, found without a comparison of names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.strategies import STRATEGIES, Strategy

if TYPE_CHECKING:
    from nemo_dist_conf.plan.strategies.base import StrategyCosts

__all__ = ["costs_of", "planned_strategies", "unplanned_strategies"]


def costs_of(strategy: Strategy) -> StrategyCosts:
    """The object behind ``Strategy.costs``. Raises ConfigError, by name, for a strategy that names none.

    Nothing is assumed of such a strategy: a plan that took it for another one would be wrong without a sign of it.
    """
    costs: StrategyCosts | None = strategy.load_costs()
    if costs is not None:
        return costs
    known = [one.name for one in planned_strategies()]
    raise ConfigError(
        Problem(
            what=f"the plan does not know what strategy={strategy.name} costs",
            asked=f"strategy={strategy.name}",
            allowed=", ".join(known),
            instead=f"strategy={known[0]}",
        )
    )


def planned_strategies() -> list[Strategy]:
    """Every strategy that a plan can be made of."""
    return [strategy for strategy in STRATEGIES if strategy.costs is not None]


def unplanned_strategies() -> list[Strategy]:
    """The others."""
    return [strategy for strategy in STRATEGIES if strategy.costs is None]
