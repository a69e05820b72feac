"""One file per strategy, and the registry of them. Torch is imported by the managers only, when they act."""

from __future__ import annotations

from typing import Any

from nemo_dist_conf.strategies.registry import (
    default_strategy,
    find_strategy,
    strategy_names,
    strategy_of_config,
    strategy_of_target,
    unknown_strategy,
)
from nemo_dist_conf.strategies.spec import Strategy

__all__ = [
    "STRATEGIES",
    "Strategy",
    "default_strategy",
    "find_strategy",
    "strategy_names",
    "strategy_of_config",
    "strategy_of_target",
    "unknown_strategy",
]

STRATEGIES: tuple[Strategy, ...]


def __getattr__(name: str) -> Any:
    if name == "STRATEGIES":
        from nemo_dist_conf.strategies.registry import STRATEGIES

        return STRATEGIES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
