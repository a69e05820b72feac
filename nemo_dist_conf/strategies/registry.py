"""All strategies, by name and alias.

One of ours is a file in this package and a line in names.STRATEGY_NAMES. Another package adds one by an entry point in
the group ``nemo_dist_conf.strategies``: ``name = module:STRATEGY``, where STRATEGY is a ``Strategy`` of that name.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from nemo_dist_conf.entry_points import AddedRows
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import STRATEGY_NAMES
from nemo_dist_conf.strategies.spec import Strategy
from nemo_dist_conf.wording import Spelling, for_shell, typed, unknown_name

__all__ = [
    "STRATEGIES",
    "added_strategy_names",
    "default_strategy",
    "find_strategy",
    "strategy_names",
    "strategy_of_config",
    "strategy_of_target",
    "unknown_strategy",
]

STRATEGIES: tuple[Strategy, ...]

_OURS = [name for strategy, aliases in STRATEGY_NAMES.items() for name in (strategy, *aliases)]
_ADDED = AddedRows("nemo_dist_conf.strategies", Strategy, "strategy", _OURS)


@functools.cache
def _load(name: str) -> Strategy:
    strategy: Strategy = importlib.import_module(f"nemo_dist_conf.strategies.{name}").STRATEGY
    return strategy


def __getattr__(name: str) -> Any:
    """STRATEGIES when it is first asked for: composing needs the chosen one only."""
    if name != "STRATEGIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = (*map(_load, STRATEGY_NAMES), *_ADDED.all())
    return globals()[name]


def added_strategy_names() -> tuple[str, ...]:
    """Names of the strategies that other packages add."""
    return _ADDED.names()


def strategy_names() -> list[str]:
    """Every name that selects a strategy, aliases included."""
    return [*_OURS, *_ADDED.names()]


def default_strategy() -> str:
    """The name of the strategy that a config has which names none."""
    return next(iter(STRATEGY_NAMES))


def find_strategy(name: str, spelling: Spelling = Spelling()) -> Strategy:
    """The strategy of this name or alias. Raises ConfigError, the nearest name first."""
    for strategy, aliases in STRATEGY_NAMES.items():
        if name in (strategy, *aliases):
            return _load(strategy)
    added = _ADDED.find(name)
    if added is not None:
        return added
    raise ConfigError(unknown_strategy(name, spelling))


def unknown_strategy(name: Any, spelling: Spelling = Spelling()) -> Problem:
    """The problem of a word that names no strategy, or of what is no word."""
    return unknown_name(
        name,
        strategy_names(),
        what=f"there is no strategy {name!r}",
        asked=for_shell(spelling.choose("strategy", typed(name))),
        offer=lambda known: spelling.choose("strategy", known),
    )


def strategy_of_config(config: Any) -> Strategy | None:
    """The strategy whose typed config an object is; None for anything else."""
    ours = map(_load, STRATEGY_NAMES)
    return next((strategy for strategy in (*ours, *_ADDED.all()) if isinstance(config, strategy.config)), None)


def strategy_of_target(target: str) -> Strategy | None:
    """The strategy whose typed config a class path names, one of ours by any module that passes it on; else None."""
    package, _, rest = target.partition(".")
    name = rest.rpartition(".")[2]
    ours = [strategy for strategy in map(_load, STRATEGY_NAMES) if strategy.target.startswith(f"{package}.")]
    if ours:
        return next((strategy for strategy in ours if strategy.target.endswith(f".{name}")), None)
    return next((strategy for strategy in _ADDED.all() if strategy.target == target), None)
